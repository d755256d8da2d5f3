"""Native ViT checkpoints there and back. That the networks compute the same is checked by `tests.reference`."""

import pytest
import torch
from safetensors.torch import load_file

from dinov3_hf.convert.dinov3_vit import config_from_native, state_dict_from_native, state_dict_to_native
from dinov3_hf.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTModel
from tests.models.dinov3_vit.tiny import ALL_VARIANTS, images, tiny_config, tiny_model
from tests.reference.io import Case, find_cases
from tests.testing_utils import FIXTURES

SIZES = {"embed_dim": 32, "depth": 3, "num_heads": 2}
NATIVE_CASES = [case for case in find_cases(FIXTURES / "a_vit") if (case / "weights.safetensors").exists()]
# The original knows no queries without a bias whose values have one.
FUSIBLE = {name: fields for name, fields in ALL_VARIANTS.items() if name != "few_biases"}


@pytest.mark.parametrize("case", NATIVE_CASES, ids=lambda case: case.name)
def test_a_native_checkpoint_there_and_back(case):
    native = load_file(case / "weights.safetensors")
    config = config_from_native(Case(case).constructor)
    ours = state_dict_from_native(native, config)
    model = DINOv3ViTModel(config)
    model.load_state_dict(ours)
    back = state_dict_to_native(model.state_dict(), config)
    assert back.keys() == native.keys()
    for name, tensor in native.items():
        masked = native.get(f"{name}_mask", torch.ones(())) if name.endswith("qkv.bias") else 1
        expected = tensor * masked  # what the mask hides is not kept
        assert back[name].dtype == tensor.dtype, name
        if name == "rope_embed.periods":
            torch.testing.assert_close(back[name], expected, rtol=1e-6, atol=0)
        else:
            assert torch.equal(back[name], expected), name


@pytest.mark.parametrize("fields", FUSIBLE.values(), ids=FUSIBLE)
def test_ours_there_and_back(fields):
    model = tiny_model(**fields)
    native = state_dict_to_native(model.state_dict(), model.config)
    again = DINOv3ViTModel(model.config).eval()
    again.load_state_dict(state_dict_from_native(native, model.config))
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    pixels = images(channels=model.config.num_channels)
    assert torch.equal(again(pixels).last_hidden_state, model(pixels).last_hidden_state)


def test_native_names_and_shapes():
    model = tiny_model()
    native = state_dict_to_native(model.state_dict(), model.config)
    attention = model.layer[1].attention
    weight, bias, mask = (native[f"blocks.1.attn.qkv.{name}"] for name in ("weight", "bias", "bias_mask"))
    assert torch.equal(weight[32:64], attention.k_proj.weight)
    assert torch.equal(bias, torch.cat((attention.q_proj.bias, torch.zeros(32), attention.v_proj.bias)))
    assert mask.tolist() == [1.0] * 32 + [0.0] * 32 + [1.0] * 32
    assert native["mask_token"].shape == (1, 32)
    assert native["storage_tokens"].shape == (1, 2, 32)
    assert native["rope_embed.periods"].shape == (4,)
    without = tiny_model(num_register_tokens=0, query_bias=False, value_bias=False)
    names = state_dict_to_native(without.state_dict(), without.config)
    assert "storage_tokens" not in names
    assert not any("qkv.bias" in name for name in names)


def test_converted_tensors_do_not_share_memory_with_the_checkpoint():
    model = tiny_model()
    native = state_dict_to_native(model.state_dict(), model.config)
    ours = state_dict_from_native(native, model.config)
    native["blocks.0.attn.qkv.weight"].zero_()
    assert ours["layer.0.attention.q_proj.weight"].abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes_stay(dtype):
    model = tiny_model().to(dtype)
    native = state_dict_to_native(model.state_dict(), model.config)
    assert {tensor.dtype for name, tensor in native.items() if name != "rope_embed.periods"} == {dtype}
    assert {tensor.dtype for tensor in state_dict_from_native(native, model.config).values()} == {dtype}


@pytest.mark.parametrize(
    ("ffn_layer", "ratio", "width"),
    [
        ("mlp", 4.0, 128),
        ("mlp", 3.3, 105),
        ("swiglu", 6, 128),
        ("swiglu", 3.3, 72),
        ("swiglu32", 3.3, 96),
        ("swiglu64", 3.3, 128),
        ("swiglu128", 7, 256),
    ],
)
def test_width_of_the_ffn(ffn_layer, ratio, width):
    config = config_from_native({**SIZES, "ffn_layer": ffn_layer, "ffn_ratio": ratio})
    assert config.intermediate_size == width
    assert config.use_gated_mlp == (ffn_layer != "mlp")


def test_defaults_are_those_of_the_original():
    config = config_from_native(SIZES)
    expected = {
        "layer_norm_eps": 1e-6,
        "layerscale_value": None,
        "rope_dtype": "bfloat16",
        "key_bias": True,
        "num_register_tokens": 0,
        "pos_embed_rescale": None,
        "rope_theta": 100.0,
    }
    assert {name: config.__dict__[name] for name in expected} == expected
    assert config_from_native({**SIZES, "norm_layer": "layernormbf16"}).layer_norm_eps == 1e-5
    assert config_from_native({**SIZES, "layerscale_init": 0.0}).layerscale_value is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"drop_rate": 0.1}, "'drop_rate' is not an argument of the original ViT; remove it"),
        ({"norm_layer": "batchnorm"}, "norm_layer 'batchnorm' is not known; use one of layernorm, layernormbf16"),
        ({"ffn_layer": "relu"}, "ffn_layer 'relu' is not known; use one of swiglu, .*, mlp"),
        ({"pos_embed_rope_dtype": "fp16"}, "pos_embed_rope_dtype 'fp16' is not known; use one of fp32, bf16"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        config_from_native({**SIZES, "ffn_ratio": 4, **arguments})


def test_missing_arguments():
    with pytest.raises(ValueError, match="the original ViT needs 'depth'; add it"):
        config_from_native({"embed_dim": 32, "num_heads": 2})


def test_checkpoints_that_do_not_fit():
    model = tiny_model()
    native = state_dict_to_native(model.state_dict(), model.config)
    with pytest.raises(ValueError, match=r"head\.weight is not a parameter of this architecture"):
        state_dict_from_native({**native, "head.weight": torch.zeros(1)}, model.config)
    with pytest.raises(ValueError, match="the checkpoint has no mask_token; check that it holds a whole ViT"):
        state_dict_from_native({"cls_token": native["cls_token"]}, model.config)
    gated = tiny_config(use_gated_mlp=True)
    with pytest.raises(ValueError, match=r"blocks.0.mlp.fc1.* is not a parameter of this architecture"):
        state_dict_from_native(native, gated)
    few = tiny_model(**ALL_VARIANTS["few_biases"])
    with pytest.raises(ValueError, match="the original has a bias on queries and values together"):
        state_dict_to_native(few.state_dict(), few.config)
