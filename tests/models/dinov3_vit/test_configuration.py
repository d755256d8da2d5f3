"""The configuration: presets, checks, agreement with the class of transformers."""

import pytest
import torch
import transformers

from dinov3_hf.models.dinov3_vit.configuration_dinov3_vit import DINOv3ViTConfig, DINOv3ViTNativeConfig
from dinov3_hf.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTModel
from dinov3_hf.models.dinov3_vit.presets import PRESETS
from tests.models.dinov3_vit.tiny import ALL_VARIANTS, NATIVE_VARIANTS, tiny_config

# Depth, width, heads, FFN width, gated, and millions of parameters, of the released models.
RELEASED = {
    "vits16": (12, 384, 6, 1536, False, 21.6),
    "vits16plus": (12, 384, 6, 1536, True, 28.7),
    "vitb16": (12, 768, 12, 3072, False, 85.7),
    "vitl16": (24, 1024, 16, 4096, False, 303),
    "vitl16plus": (24, 1024, 16, 4096, True, 404),
    "vith16plus": (32, 1280, 20, 5120, True, 841),
    "vit7b16": (40, 4096, 32, 8192, True, 6716),
    "vitl16_sat493m": (24, 1024, 16, 4096, False, 303),
    "vit7b16_sat493m": (40, 4096, 32, 8192, True, 6716),
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    config = DINOv3ViTConfig.from_preset(name)
    depth, width, heads, ffn, gated, millions = RELEASED[name]
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (depth, width, heads)
    assert (config.intermediate_size, config.use_gated_mlp) == (ffn, gated)
    assert config.hidden_act == ("silu" if gated else "gelu")
    assert (config.patch_size, config.num_register_tokens, config.layer_norm_eps) == (16, 4, 1e-5)
    assert (config.layerscale_value, config.pos_embed_rescale, config.key_bias) == (1e-5, 2.0, False)
    assert config.query_bias == config.value_bias == ("7b" not in name)
    assert config.untie_global_and_local_cls_norm == ("7b" in name or "sat493m" in name)
    assert config.is_stock_representable
    with torch.device("meta"):
        model = DINOv3ViTModel(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count / 1e6 == pytest.approx(millions, rel=0.005)


def test_presets_can_be_changed():
    config = DINOv3ViTConfig.from_preset("vits16", patch_size=8, drop_path_rate=0.1)
    assert (config.patch_size, config.drop_path_rate, config.hidden_size) == (8, 0.1, 384)
    with pytest.raises(ValueError, match=r"there is no preset 'vits_16'; did you mean vits16\?"):
        DINOv3ViTConfig.from_preset("vits_16")
    with pytest.raises(ValueError, match="there is no preset 'x'; use one of vits16, "):
        DINOv3ViTConfig.from_preset("x")


def test_defaults_are_those_of_transformers():
    ours, stock = DINOv3ViTConfig().to_dict(), transformers.DINOv3ViTConfig().to_dict()
    assert {name: ours[name] for name in stock} == stock


@pytest.mark.parametrize("fields", ALL_VARIANTS.values(), ids=ALL_VARIANTS)
def test_dictionaries(fields):
    config = tiny_config(**fields)
    written = config.to_dict()
    native = fields in NATIVE_VARIANTS.values()
    assert written["model_type"] == ("dinov3_vit_native" if native else "dinov3_vit")
    assert (written["rope_theta"] is None) == native
    again = DINOv3ViTConfig.from_dict(written)
    assert again.to_dict() == written
    assert again.rope_theta == config.rope_theta
    # As a part of another configuration, whose file repeats these fields.
    assert DINOv3ViTNativeConfig(**written).to_dict() == written


BAD_FIELDS = {
    "patch_size": ({"patch_size": [4, 8]}, r"patch_size \[4, 8\] is not square; give one number"),
    "zero": ({"num_hidden_layers": 0}, "num_hidden_layers 0 is not an integer of at least 1"),
    "text": ({"patch_size": "16"}, "patch_size '16' is not an integer of at least 1"),
    "truth": ({"num_channels": True}, "num_channels True is not an integer"),
    "registers": ({"num_register_tokens": -1}, "num_register_tokens -1 is not an integer of at least 0"),
    "heads": ({"hidden_size": 36}, "hidden_size 36 cannot be split into 2 heads .* use hidden_size 32 or another"),
    "few values": ({"hidden_size": 4}, "hidden_size 4 cannot be split into 2 heads .* use hidden_size 8"),
    "drop path": ({"drop_path_rate": 1.0}, r"drop_path_rate 1.0 is not in \[0, 1\)"),
    "no periods": ({"rope_theta": None, "rope_min_period": 1.0}, "the RoPE periods are not defined"),
    "periods twice": ({"rope_min_period": 1.0, "rope_max_period": 9.0}, "the RoPE periods are defined twice"),
    "norm": ({"norm_type": "batchnorm"}, "norm_type 'batchnorm' is not known; use one of layernorm, rmsnorm"),
    "coords": ({"rope_normalize_coords": "mean"}, "rope_normalize_coords 'mean' is not known"),
    "rope_dtype": ({"rope_dtype": "bf16"}, "rope_dtype 'bf16' is not known; use one of float32, bfloat16"),
    "jitter": ({"pos_embed_jitter": 0.5}, r"pos_embed_jitter 0.5 is below 1, .* from \[1/x, x\]; use 2"),
    "cls in maps": (
        {"class_token_in_feature_maps": True},
        "finds no place in maps .*; set reshape_hidden_states=False",
    ),
    "rescale": ({"pos_embed_rescale": 0.8}, "pos_embed_rescale 0.8 is below 1, .* use 1.25"),
}


@pytest.mark.parametrize(("fields", "message"), BAD_FIELDS.values(), ids=BAD_FIELDS)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**fields)


def test_numbers_are_brought_to_the_form_that_transformers_takes():
    config = tiny_config(patch_size=[4, 4], pos_embed_rescale=2, layerscale_value=1, rope_theta=100)
    assert config.patch_size == 4
    for name in ("pos_embed_rescale", "layerscale_value", "rope_theta"):
        assert type(config.__dict__[name]) is float
    fields = config.to_dict()
    stock = transformers.DINOv3ViTConfig.from_dict(fields)
    assert {name: fields[name] for name in stock.to_dict()} == stock.to_dict()


def test_fields_changed_by_hand_are_checked_when_a_model_is_built():
    config = tiny_config()
    config.num_attention_heads = 5
    with pytest.raises(ValueError, match="hidden_size 32 cannot be split into 5 heads"):
        DINOv3ViTModel(config)
