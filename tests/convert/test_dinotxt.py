"""dino.txt from the original's names and back, and what its tensors say about the network."""

import pytest
import torch

from dinov3_hf.convert.dinotxt import (
    KEYS,
    RELEASED,
    architecture,
    config_from_native,
    from_hf,
    read_config,
    recognises,
    state_dict_from_native,
    state_dict_to_native,
    to_hf,
)
from dinov3_hf.convert.lazy_tensor import LazyTensor, read_all
from dinov3_hf.models.dinotxt.configuration_dinotxt import DinoTxtConfig
from dinov3_hf.models.dinotxt.modeling_dinotxt import DinoTxtModel
from dinov3_hf.models.dinov3_vit.configuration_dinov3_vit import DINOv3ViTConfig
from tests.models.dinotxt.tiny import CONVNEXT, VARIANT_TEXT, VARIANT_VISION, tiny_model

# One head of the width that a native file stands for, and options of the backbone that it does say.
TEXT = {"hidden_size": 64, "num_attention_heads": 1}
BACKBONE = {
    **{"patch_size": 4, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"num_register_tokens": 2, "layerscale_value": 1e-5},
}
VARIANTS = {"released": ({}, {}), "other": ({**VARIANT_TEXT, "pooling": "argmax"}, VARIANT_VISION)}


@pytest.fixture(params=VARIANTS)
def model(request) -> DinoTxtModel:
    text, vision = VARIANTS[request.param]
    return tiny_model({**TEXT, **text}, {"backbone_config": BACKBONE, **vision})


def lazily(tensors: dict) -> dict[str, LazyTensor]:
    return {name: LazyTensor.of(tensor) for name, tensor in tensors.items()}


def test_there_and_back(model):
    native = state_dict_to_native(model.state_dict(), model.config)
    assert recognises(native)
    assert "text_model.backbone.blocks.1.attention.qkv.weight" in native
    assert native["visual_model.backbone.blocks.0.attn.qkv.bias_mask"].sum() == 64
    back = state_dict_from_native(native, model.config)
    assert back.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, back[name]) for name, tensor in model.state_dict().items())


def test_the_order_of_queries_keys_and_values(model):
    native = state_dict_to_native(model.state_dict(), model.config)
    attention = model.vision_model.layer[0].attention
    parts = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
    assert torch.equal(native["visual_model.head.blocks.0.attn.qkv.weight"], torch.cat(parts))


def test_a_masked_key_bias_and_rounded_periods_come_back(model):
    native = state_dict_to_native(model.state_dict(), model.config)
    prefix = "visual_model.backbone."
    native[f"{prefix}blocks.0.attn.qkv.bias"][32:64] = 3.0  # what the mask hides
    native[f"{prefix}rope_embed.periods"] = native[f"{prefix}rope_embed.periods"].bfloat16()
    converted = to_hf(lazily(native), model.config)
    assert converted.extras.keys() == {
        f"native.{prefix}blocks.0.attn.k.bias",
        f"native.{prefix}rope_embed.periods",
    }
    back = read_all(from_hf(converted.tensors | converted.extras, model.config).tensors)
    assert back.keys() == native.keys()
    assert all(torch.equal(back[name], tensor) and back[name].dtype == tensor.dtype for name, tensor in native.items())


def test_tensors_tell_the_configuration(model):
    found = read_config(lazily(state_dict_to_native(model.state_dict(), model.config)))
    ignored = ("initializer_range", "layerscale_value", "image_size", "auto_map")  # without a say in what is computed

    def fields(config):
        if isinstance(config, dict):
            return {name: fields(value) for name, value in config.items() if name not in ignored}
        return config

    assert fields(found.to_dict()) == fields(model.config.to_dict())


def test_each_name_has_one_place():
    assert KEYS.inverse().inverse().table == KEYS.table


def test_the_released_settings():
    config = config_from_native(
        {
            "embed_dim": 1024,
            "depth": 24,
            "num_heads": 16,
            "n_storage_tokens": 4,
            "norm_layer": "layernormbf16",
            "pos_embed_rope_rescale_coords": 2,
            "pos_embed_rope_dtype": "fp32",
            "layerscale_init": 1e-5,
            "mask_k_bias": True,
        },
        {
            "context_length": 77,
            "vocab_size": 49408,
            "dim": 1280,
            "num_heads": 20,
            "num_layers": 24,
            "ffn_ratio": 4,
            "is_causal": True,
            "ls_init_value": None,
            "dropout_prob": 0.0,
        },
        {
            "embed_dim": 2048,
            "vision_model_use_class_token": True,
            "vision_model_use_patch_tokens": True,
            "vision_model_num_head_blocks": 2,
            "vision_model_head_blocks_drop_path": 0.3,
            "vision_model_use_linear_projection": False,
            "text_model_num_head_blocks": 0,
            "text_model_head_blocks_is_causal": False,
            "text_model_tokens_pooler_type": "argmax",
            "text_model_use_linear_projection": True,
        },
    )
    assert architecture(config) == RELEASED
    assert (
        config.to_dict()
        == DinoTxtConfig(vision_config={"backbone_config": DINOv3ViTConfig.from_preset("vitl16")}).to_dict()
    )
    config.text_config.num_hidden_layers = 12
    assert architecture(config) is None


def test_settings_that_we_have_no_network_for():
    with pytest.raises(ValueError, match="vision_model_patch_tokens_pooler_type 'max' is not supported"):
        config_from_native({}, {}, {"vision_model_patch_tokens_pooler_type": "max"})


def test_files_that_are_no_whole_model(model):
    native = lazily(state_dict_to_native(model.state_dict(), model.config))
    alone = {name: tensor for name, tensor in native.items() if not name.startswith("visual_model.backbone.")}
    assert recognises(alone)
    with pytest.raises(ValueError, match="give its backbone too"):
        read_config(alone)
    with pytest.raises(ValueError, match="extra is not a parameter of this architecture"):
        to_hf({**native, "text_model.backbone.extra": native["logit_scale"]}, model.config)
    narrow = native["text_model.backbone.token_embedding.weight"]
    with pytest.raises(ValueError, match="no heads of width 64 make up"):
        read_config({**native, "text_model.backbone.token_embedding.weight": narrow.view(64 * narrow.shape[0], 1)})


def test_the_original_has_no_convolutional_backbone():
    model = tiny_model({"projection_dim": 32}, {"backbone_config": CONVNEXT})
    with pytest.raises(ValueError, match="has a ViT as its backbone"):
        from_hf(lazily(model.state_dict()), model.config)
