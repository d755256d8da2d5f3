"""DINOv3 ConvNeXt: timm <-> Hub, against timm itself."""

import pytest
import torch

from dinov3_hf.convert.lazy_tensor import LazyTensor, read_all
from dinov3_hf.convert.timm_convnext import TIMM_CONVNEXT
from dinov3_hf.convert.timm_vit import TIMM_VIT
from dinov3_hf.models.dinov3_convnext.configuration_dinov3_convnext import DINOv3ConvNextConfig
from dinov3_hf.models.dinov3_convnext.modeling_dinov3_convnext import DINOv3ConvNextModel
from dinov3_hf.models.dinov3_convnext.presets import PRESETS

timm = pytest.importorskip("timm")

from tests.convert.timm_folders import (  # noqa: E402
    assert_same_tensors,
    build_timm,
    lazy,
    open_timm,
    relative_difference,
    save_timm,
    shapes,
)

TINY = {"dims": [8, 16, 24, 32], "depths": [1, 2, 1, 1]}
IMAGE_STATISTICS = ([0.4, 0.5, 0.6], [0.2, 0.2, 0.2])


def images(num_channels: int = 3) -> torch.Tensor:
    return torch.randn(2, num_channels, 70, 100, generator=torch.Generator().manual_seed(1))


def features_of_timm(model: torch.nn.Module, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised pooled features (B, D) and positions (B, P, D)."""
    features = model.forward_features(pixels)  # (B, D, h, w)
    return model.forward_head(features, pre_logits=True), model.head.norm(features).flatten(2).transpose(1, 2)


@pytest.mark.parametrize("arguments", [{}, {"in_chans": 1}, {"num_classes": 5}], ids=str)
def test_from_timm_and_back(tmp_path, arguments):
    theirs = build_timm("convnext_tiny.dinov3_lvd1689m", **TINY, **arguments)
    fields, tensors = save_timm(theirs, tmp_path / "theirs")
    config = TIMM_CONVNEXT.config_from_json(fields, tensors)
    there = TIMM_CONVNEXT.to_hf(tensors, config)
    assert not there.derived and not there.dropped and not there.differences
    assert set(there.extras) == ({"timm.head.fc.weight", "timm.head.fc.bias"} if "num_classes" in arguments else set())

    ours = DINOv3ConvNextModel(config).eval()
    ours.load_state_dict(read_all(there.tensors))
    with torch.no_grad():
        found = ours(images(config.num_channels))
        pooled, positions = features_of_timm(theirs, images(config.num_channels))
    assert relative_difference(found.pooler_output, pooled) < 1e-5
    assert relative_difference(found.last_hidden_state[:, 1:], positions) < 1e-5

    back = TIMM_CONVNEXT.from_hf({**there.tensors, **there.extras}, config)
    assert_same_tensors(back.tensors, tensors)
    written = TIMM_CONVNEXT.config_to_json(config, back.tensors, *IMAGE_STATISTICS)
    assert written.keys() == fields.keys()
    assert written["num_classes"] == fields["num_classes"]
    again = open_timm(tmp_path / "ours", written, back.tensors)
    with torch.no_grad():
        assert torch.equal(again(images(config.num_channels)), theirs(images(config.num_channels)))


@pytest.mark.parametrize("layer_scale", [0.5, None])
def test_timm_opens_our_folder_and_computes_the_same(tmp_path, layer_scale):
    config = DINOv3ConvNextConfig(
        hidden_sizes=TINY["dims"], depths=TINY["depths"], layer_scale_init_value=layer_scale, initializer_range=0.2
    )
    ours = DINOv3ConvNextModel(config).eval()
    there = TIMM_CONVNEXT.from_hf(lazy(ours.state_dict()), config)
    written = TIMM_CONVNEXT.config_to_json(config, there.tensors, *IMAGE_STATISTICS)
    theirs = open_timm(tmp_path / "timm", written, there.tensors)
    with torch.no_grad():
        expected = ours(images())
        pooled, positions = features_of_timm(theirs, images())
    assert relative_difference(pooled, expected.pooler_output) < 1e-5
    assert relative_difference(positions, expected.last_hidden_state[:, 1:]) < 1e-5

    read = TIMM_CONVNEXT.config_from_json(written, there.tensors)
    assert_same_tensors(TIMM_CONVNEXT.to_hf(there.tensors, read).tensors, lazy(ours.state_dict()))
    assert (read.hidden_sizes, read.depths) == (config.hidden_sizes, config.depths)
    assert read.layer_scale_init_value == layer_scale


@pytest.mark.parametrize("preset", PRESETS)
def test_released_sizes_have_the_names_and_shapes_of_timm(preset):
    config = DINOv3ConvNextConfig.from_preset(preset)
    with torch.device("meta"):
        ours = DINOv3ConvNextModel(config)
        theirs = timm.create_model(f"{preset}.dinov3_lvd1689m")
    tensors = {name: LazyTensor.full(tensor.shape, 0, tensor.dtype) for name, tensor in ours.state_dict().items()}
    converted = TIMM_CONVNEXT.from_hf(tensors, config)
    assert shapes(converted.tensors) == shapes(theirs.state_dict())
    written = TIMM_CONVNEXT.config_to_json(config, converted.tensors, *IMAGE_STATISTICS)
    assert written["architecture"] == preset == TIMM_CONVNEXT.architecture(config) and "model_args" not in written
    read = TIMM_CONVNEXT.read_config(converted.tensors)
    assert (read.hidden_sizes, read.depths) == (config.hidden_sizes, config.depths)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layer_norm_eps": 1e-5}, "layer_norm_eps = 1e-05"),
        ({"hidden_act": "relu"}, "hidden_act = 'relu'"),
        ({"hidden_sizes": [8, 16], "depths": [1, 1]}, "stages = 2"),
    ],
)
def test_networks_that_timm_has_not_are_refused(fields, message):
    config = DINOv3ConvNextConfig(**{"hidden_sizes": TINY["dims"], "depths": TINY["depths"], **fields})
    with pytest.raises(ValueError, match=message):
        TIMM_CONVNEXT.from_hf(lazy(DINOv3ConvNextModel(config).state_dict()), config)


def test_a_patch_grid_is_a_difference():
    config = DINOv3ConvNextConfig(hidden_sizes=TINY["dims"], depths=TINY["depths"], patch_size=16)
    (line,) = TIMM_CONVNEXT.from_hf(lazy(DINOv3ConvNextModel(config).state_dict()), config).differences
    assert "patches of 16 pixels" in line


def test_folders_and_files_that_are_no_dinov3_are_refused(tmp_path):
    fields, tensors = save_timm(build_timm("convnext_tiny.dinov3_lvd1689m", **TINY), tmp_path)
    with pytest.raises(ValueError, match="'convnextv2_tiny' is not one of"):
        TIMM_CONVNEXT.config_from_json({"architecture": "convnextv2_tiny"}, tensors)
    with pytest.raises(ValueError, match="have conv_mlp = True"):
        TIMM_CONVNEXT.config_from_json({**fields, "model_args": {"conv_mlp": True}}, tensors)
    with pytest.raises(ValueError, match="ls_init_value = 'b'; it is a positive number"):
        TIMM_CONVNEXT.config_from_json({**fields, "model_args": {"ls_init_value": "b"}}, tensors)
    incomplete = {name: tensor for name, tensor in tensors.items() if not name.startswith("stages.2.")}
    with pytest.raises(ValueError, match=r"has no stages\.2\.blocks"):
        TIMM_CONVNEXT.read_config(incomplete)
    with pytest.raises(ValueError, match="a convolution has 4 axes"):
        TIMM_CONVNEXT.read_config({**tensors, "stem.0.weight": LazyTensor.of(torch.tensor(1.0))})
    with pytest.raises(ValueError, match=r"grn\.weight is not a parameter"):
        TIMM_CONVNEXT.to_hf({"stages.0.blocks.0.mlp.grn.weight": tensors["stem.0.bias"]}, DINOv3ConvNextConfig())


def test_the_two_families_are_told_apart_by_names(tmp_path):
    _, tensors = save_timm(build_timm("convnext_tiny.dinov3_lvd1689m", **TINY), tmp_path)
    assert TIMM_CONVNEXT.recognises(tensors) and not TIMM_VIT.recognises(tensors)
    ours = DINOv3ConvNextModel(DINOv3ConvNextConfig(hidden_sizes=TINY["dims"], depths=TINY["depths"]))
    assert not TIMM_CONVNEXT.recognises(ours.state_dict())
