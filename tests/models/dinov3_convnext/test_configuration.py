"""The configuration: presets, checks, agreement with the class of transformers."""

import pytest
import torch
import transformers

from dinov3_hf.models.dinov3_convnext.configuration_dinov3_convnext import (
    DINOv3ConvNextConfig,
    DINOv3ConvNextNativeConfig,
)
from dinov3_hf.models.dinov3_convnext.modeling_dinov3_convnext import DINOv3ConvNextModel
from dinov3_hf.models.dinov3_convnext.presets import PRESETS
from tests.models.dinov3_convnext.tiny import ALL_VARIANTS, NATIVE_VARIANTS, tiny_config

# Depths, first and last width, and parameters, of the released models.
RELEASED = {
    "convnext_tiny": ([3, 3, 9, 3], 96, 768, 27_820_128),
    "convnext_small": ([3, 3, 27, 3], 96, 768, 49_454_688),
    "convnext_base": ([3, 3, 27, 3], 128, 1024, 87_566_464),
    "convnext_large": ([3, 3, 27, 3], 192, 1536, 196_230_336),
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    config = DINOv3ConvNextConfig.from_preset(name)
    depths, first, last, num_parameters = RELEASED[name]
    assert (config.depths, config.hidden_sizes[0], config.hidden_size) == (depths, first, last)
    assert (config.layer_norm_eps, config.layer_scale_init_value, config.patch_size) == (1e-6, 1e-6, None)
    assert (config.num_stages, config.stride) == (4, 32)
    assert config.is_stock_representable
    with torch.device("meta"):
        model = DINOv3ConvNextModel(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters


def test_presets_can_be_changed():
    config = DINOv3ConvNextConfig.from_preset("convnext_tiny", patch_size=16, drop_path_rate=0.1)
    assert (config.patch_size, config.drop_path_rate, config.depths) == (16, 0.1, [3, 3, 9, 3])
    config.depths.append(1)
    assert DINOv3ConvNextConfig.from_preset("convnext_tiny").depths == DINOv3ConvNextConfig().depths == [3, 3, 9, 3]
    with pytest.raises(ValueError, match=r"there is no preset 'convnext_tny'; did you mean convnext_tiny\?"):
        DINOv3ConvNextConfig.from_preset("convnext_tny")


def test_defaults_are_those_of_transformers():
    ours, stock = DINOv3ConvNextConfig().to_dict(), transformers.DINOv3ConvNextConfig().to_dict()
    assert {name: ours[name] for name in stock} == stock


@pytest.mark.parametrize("fields", ALL_VARIANTS.values(), ids=ALL_VARIANTS)
def test_dictionaries(fields):
    config = tiny_config(**fields)
    written = config.to_dict()
    native = fields in NATIVE_VARIANTS.values()
    assert written["model_type"] == ("dinov3_convnext_native" if native else "dinov3_convnext")
    assert (written["layer_scale_init_value"] is None) == native
    again = DINOv3ConvNextConfig.from_dict(written)
    assert again.to_dict() == written
    assert again.layer_scale_init_value == config.layer_scale_init_value
    # As a part of another configuration, whose file repeats these fields.
    assert DINOv3ConvNextNativeConfig(**written).to_dict() == written


BAD_FIELDS = {
    "patch_size": ({"patch_size": 0}, "patch_size 0 is not an integer of at least 1"),
    "channels": ({"num_channels": True}, "num_channels True is not an integer"),
    "stages": ({"depths": [1, 1]}, r"hidden_sizes \[8, 12, 16, 24\] and depths \[1, 1\] do not describe the same"),
    "no stages": ({"depths": [], "hidden_sizes": []}, "do not describe the same stages; give one number for each"),
    "depth": ({"depths": [1, 0, 1, 1]}, r"depths\[1\] 0 is not an integer of at least 1"),
    "width": ({"hidden_sizes": [8, 8, 8.5, 8]}, r"hidden_sizes\[2\] 8.5 is not an integer of at least 1"),
    "drop path": ({"drop_path_rate": 1.0}, r"drop_path_rate 1.0 is not in \[0, 1\)"),
}


@pytest.mark.parametrize(("fields", "message"), BAD_FIELDS.values(), ids=BAD_FIELDS)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**fields)


def test_integers_become_floats_as_transformers_wants_them():
    config = tiny_config(layer_scale_init_value=1, drop_path_rate=0)
    assert type(config.layer_scale_init_value) is type(config.drop_path_rate) is float
    fields = config.to_dict()
    stock = transformers.DINOv3ConvNextConfig.from_dict(fields)
    assert {name: fields[name] for name in stock.to_dict()} == stock.to_dict()


def test_fields_changed_by_hand_are_checked_when_a_model_is_built():
    config = tiny_config()
    config.depths = [1, 1, 1]
    with pytest.raises(ValueError, match="do not describe the same stages"):
        DINOv3ConvNextModel(config)
