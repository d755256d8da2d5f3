"""What names and shapes of a native checkpoint say about the network."""

import pytest
import torch

from dinov3_hf.convert.dinov3_vit import NATIVE_VIT, config_from_native
from dinov3_hf.convert.dinov3_vit_from_tensors import read_config
from dinov3_hf.convert.lazy_tensor import LazyTensor
from dinov3_hf.models.dinov3_vit.configuration_dinov3_vit import DINOv3ViTConfig
from dinov3_hf.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTModel
from dinov3_hf.models.dinov3_vit.presets import PRESETS
from dinov3_hf.models.dinov3_vit.rope import RopeParameters, rope_periods
from tests.convert.files import VIT_CASES, native_weights
from tests.reference.io import Case, read_json
from tests.testing_utils import FIXTURES

# What a file does not say, and what acts in training only.
UNSAID = {"layer_norm_eps", "rope_normalize_coords", "rope_dtype", "image_size", "drop_path_rate", "layerscale_value"}
UNSAID |= {"pos_embed_rescale", "pos_embed_shift", "pos_embed_jitter"}


def native_shapes(config):
    """The native state dict of a network, of which only the periods have values."""
    with torch.device("meta"):
        state = DINOv3ViTModel(config).state_dict()
    shapes = {name: LazyTensor(tuple(tensor.shape), tensor.dtype, tensor.detach) for name, tensor in state.items()}
    return NATIVE_VIT.from_hf(shapes, config).tensors


@pytest.mark.parametrize("preset", PRESETS)
def test_released_architectures_are_recognised(preset):
    config = DINOv3ViTConfig.from_preset(preset)
    native = native_shapes(config)
    assert NATIVE_VIT.recognises(native)
    assert read_config(native).to_dict() == config.to_dict()
    # Satellite and web weights of the 7B have the same shapes.
    assert NATIVE_VIT.architecture(config) == f"dinov3_{preset.replace('vit7b16_sat493m', 'vit7b16')}"
    # Without periods the size tells the number of heads.
    stripped = {name: tensor for name, tensor in native.items() if name != "rope_embed.periods"}
    assert read_config(stripped).to_dict() == config.to_dict()


def test_an_inventory_of_the_original():
    recorded = read_json(FIXTURES / "l_inventory" / "dinov3_vitl16_sat493m.json")
    shapes = {name: LazyTensor.full(shape, 1, torch.float32) for name, (shape, _, _) in recorded["state_dict"].items()}
    shapes["rope_embed.periods"] = LazyTensor.of(100.0 ** (torch.arange(16) / 16))
    config = read_config(shapes)
    assert NATIVE_VIT.architecture(config) == "dinov3_vitl16_sat493m"
    given = config_from_native(recorded["constructor_calls"][0]["kwargs"]).to_dict()
    assert {name: config.to_dict()[name] for name in given} == given


@pytest.mark.parametrize("case", VIT_CASES, ids=lambda case: case.name)
def test_recorded_networks(case):
    native = {name: LazyTensor.of(tensor) for name, tensor in native_weights(case).items()}
    found, expected = read_config(native).to_dict(), config_from_native(Case(case).constructor).to_dict()
    if expected["rope_dtype"] == "bfloat16" or expected["rope_normalize_coords"] != "separate":
        for fields in (found, expected):  # they stand under another name in the file of a native type
            fields["rope_theta"] = fields.get("native_rope_theta") or fields["rope_theta"]
    different = {name for name in expected if found.get(name) != expected[name]}
    assert different <= UNSAID | {"model_type", "native_rope_theta"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": 100.0},
        {"rope_theta": 10000.0},
        {"rope_theta": 20.0},
        {"rope_theta": None, "rope_min_period": 0.5, "rope_max_period": 30.0},
        {"rope_theta": None, "rope_min_period": 2.0, "rope_max_period": 64.0},
    ],
)
@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_periods_tell_their_parametrisation(fields, dtype, head_dim):
    config = DINOv3ViTConfig(hidden_size=2 * head_dim, num_attention_heads=2, **fields)
    native = native_shapes(config)
    native["rope_embed.periods"] = LazyTensor.of(rope_periods(RopeParameters.from_config(config)).to(dtype))
    found = read_config(native)
    assert found.num_attention_heads == 2
    if dtype == torch.float32:
        assert {name: found.to_dict().get(name) for name in fields} == {
            name: config.to_dict().get(name) for name in fields
        }
    periods = rope_periods(RopeParameters.from_config(found))
    torch.testing.assert_close(periods, rope_periods(RopeParameters.from_config(config)), rtol=0.01, atol=0)
