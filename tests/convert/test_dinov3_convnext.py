"""Native ConvNeXt checkpoints there and back. That the networks compute the same is checked by `tests.reference`."""

import pytest
import torch
from safetensors.torch import load_file

from dinov3_hf.convert.dinov3_convnext import NATIVE_CONVNEXT, config_from_native
from dinov3_hf.convert.lazy_tensor import LazyTensor, read_all
from dinov3_hf.models.dinov3_convnext.configuration_dinov3_convnext import DINOv3ConvNextConfig
from dinov3_hf.models.dinov3_convnext.modeling_dinov3_convnext import DINOv3ConvNextModel
from dinov3_hf.models.dinov3_convnext.presets import PRESETS
from tests.models.dinov3_convnext.tiny import STOCK_VARIANTS, images, tiny_config, tiny_model
from tests.models.dinov3_vit.tiny import tiny_model as tiny_vit
from tests.reference.io import Case, find_cases
from tests.testing_utils import FIXTURES

NATIVE_CASES = list(find_cases(FIXTURES / "b_convnext"))
ALIASES = {"norms.3.weight", "norms.3.bias"}


def lazy(tensors: dict[str, torch.Tensor]) -> dict[str, LazyTensor]:
    return {name: LazyTensor.of(tensor) for name, tensor in tensors.items()}


def native_of(model: DINOv3ConvNextModel) -> dict[str, LazyTensor]:
    return NATIVE_CONVNEXT.from_hf(lazy(model.state_dict()), model.config).tensors


@pytest.mark.parametrize("case", NATIVE_CASES, ids=lambda case: case.name)
def test_a_native_checkpoint_there_and_back(case):
    native = load_file(case / "weights.safetensors")
    assert NATIVE_CONVNEXT.recognises(native)
    config = NATIVE_CONVNEXT.read_config(lazy(native))
    # The patch grid is an argument, not a weight.
    assert config.to_dict() == config_from_native({**Case(case).constructor, "patch_size": None}).to_dict()
    there = NATIVE_CONVNEXT.to_hf(lazy(native), config)
    assert set(there.dropped) == ALIASES and not (there.extras or there.derived or there.differences)
    DINOv3ConvNextModel(config).load_state_dict(read_all(there.tensors))
    back = NATIVE_CONVNEXT.from_hf(there.tensors, config)
    assert set(back.derived) == ALIASES and not (back.extras or back.dropped or back.differences)
    assert back.tensors.keys() == native.keys()
    for name, tensor in read_all(back.tensors).items():
        assert tensor.dtype == native[name].dtype and torch.equal(tensor, native[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ours_there_and_back(dtype):
    model = tiny_model().to(dtype)
    back = NATIVE_CONVNEXT.to_hf(native_of(model), model.config).tensors
    ours = model.state_dict()
    assert back.keys() == ours.keys()
    assert all(each.dtype == dtype and torch.equal(each.read(), ours[name]) for name, each in back.items())


def test_names_on_both_sides():
    model = tiny_model()
    native = read_all(native_of(model))
    stage = model.stages[1]
    expected = {
        "downsample_layers.1.0.weight": stage.downsample_layers[0].weight,
        "downsample_layers.1.1.bias": stage.downsample_layers[1].bias,
        "stages.1.1.gamma": stage.layers[1].gamma,
        "stages.1.1.dwconv.weight": stage.layers[1].depthwise_conv.weight,
        "stages.1.1.norm.bias": stage.layers[1].layer_norm.bias,
        "stages.1.1.pwconv1.weight": stage.layers[1].pointwise_conv1.weight,
        "stages.1.1.pwconv2.weight": stage.layers[1].pointwise_conv2.weight,
        "norm.weight": model.layer_norm.weight,
        "norms.3.weight": model.layer_norm.weight,
    }
    assert all(torch.equal(native[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("preset", PRESETS)
def test_released_architectures_have_their_names(preset):
    config = DINOv3ConvNextConfig.from_preset(preset)
    assert NATIVE_CONVNEXT.architecture(config) == f"dinov3_{preset}"
    with torch.device("meta"):
        model = DINOv3ConvNextModel(config)
    found = NATIVE_CONVNEXT.read_config(native_of(model))
    assert found.to_dict() == config.to_dict()


def test_other_architectures_have_none():
    assert NATIVE_CONVNEXT.architecture(tiny_config()) is None
    for fields in ({"layer_scale_init_value": None}, {"num_channels": 1}, {"layer_norm_eps": 1e-5}):
        assert NATIVE_CONVNEXT.architecture(DINOv3ConvNextConfig(**fields)) is None, fields
    trained_with = DINOv3ConvNextConfig(drop_path_rate=0.3, layer_scale_init_value=1e-5)
    assert NATIVE_CONVNEXT.architecture(trained_with) == "dinov3_convnext_tiny"


def test_the_configuration_read_from_shapes():
    for fields in ({}, {"num_channels": 5}, {"layer_scale_init_value": None}, {"depths": [1, 1, 3, 2]}):
        model = tiny_model(**fields)
        found = NATIVE_CONVNEXT.read_config(native_of(model))
        assert found.to_dict() == {**model.config.to_dict(), "image_size": 224}


def test_what_a_native_file_cannot_say_is_named():
    model = tiny_model(patch_size=16, layer_norm_eps=1e-5)
    differences = NATIVE_CONVNEXT.from_hf(lazy(model.state_dict()), model.config).differences
    assert [line.split(" has no place")[0] for line in differences] == ["layer_norm_eps = 1e-05", "patch_size = 16"]


def test_arguments_of_the_original():
    assert config_from_native({}).to_dict() == DINOv3ConvNextConfig().to_dict()
    for off in (0, 0.0, None):
        assert config_from_native({"layer_scale_init_value": off}).layer_scale_init_value is None
    with pytest.raises(ValueError, match="'drop_rate' is not an argument of the original ConvNeXt; remove it"):
        config_from_native({"drop_rate": 0.1})


def test_only_its_own_files_are_recognised():
    assert not NATIVE_CONVNEXT.recognises(tiny_model().state_dict())
    assert not NATIVE_CONVNEXT.recognises(tiny_vit().state_dict())
    assert not NATIVE_CONVNEXT.recognises(["stem.0.weight", "stages.0.blocks.0.conv_dw.weight"])


def test_checkpoints_that_do_not_fit():
    model = tiny_model()
    native = native_of(model)
    with pytest.raises(ValueError, match=r"head\.weight is not a parameter of this architecture"):
        NATIVE_CONVNEXT.to_hf({**native, "head.weight": native["norm.weight"]}, model.config)
    other = LazyTensor.full((24,), 1.5, torch.float32)
    with pytest.raises(ValueError, match=r"norms\.3\.bias and norm\.bias are not equal, but name one tensor"):
        NATIVE_CONVNEXT.to_hf({**native, "norms.3.bias": other}, model.config)
    with pytest.raises(ValueError, match=r"norms\.3\.bias and norm\.bias are not equal"):
        NATIVE_CONVNEXT.to_hf({name: each for name, each in native.items() if name != "norm.bias"}, model.config)

    def without(prefix: str) -> dict[str, LazyTensor]:
        return {name: each for name, each in native.items() if not name.startswith(prefix)}

    for prefix, message in {
        "stages.1.0.": r"has no stages\.1\.0; check that it is whole",
        "stages.3.": r"has no stages\.3\.0; check that it is whole",
        "stages.2.0.dwconv": r"has no stages\.2\.0\.dwconv\.weight; check that it holds a whole ConvNeXt",
        "downsample_layers.0.0": r"has no downsample_layers\.0\.0\.weight",
    }.items():
        with pytest.raises(ValueError, match=message):
            NATIVE_CONVNEXT.read_config(without(prefix))
    with pytest.raises(ValueError, match=r"has the shape \(24,\); a DINOv3 ConvNeXt has 4 axes there"):
        NATIVE_CONVNEXT.read_config({**native, "downsample_layers.0.0.weight": other})


@pytest.mark.parametrize("name", ["three_stages", "silu"])
def test_networks_that_the_original_has_not(name):
    model = tiny_model(**STOCK_VARIANTS[name])
    with pytest.raises(ValueError, match=r"of \d stages with \w+ has no native form; the original has 4 stages"):
        NATIVE_CONVNEXT.from_hf(lazy(model.state_dict()), model.config)


def test_a_file_with_one_name_of_the_final_norm():
    model = tiny_model()
    native = {name: each for name, each in native_of(model).items() if name not in ALIASES}
    there = NATIVE_CONVNEXT.to_hf(native, model.config)
    assert not there.dropped
    loaded = DINOv3ConvNextModel(model.config).eval()
    loaded.load_state_dict(read_all(there.tensors))
    assert torch.equal(loaded(images()).last_hidden_state, model(images()).last_hidden_state)
