"""Model folders: round trips, other numbers of channels, fresh weights."""

import json

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import nn
from torch.utils import deterministic
from transformers import AutoConfig, AutoModel

import dinov3_hf.auto  # noqa: F401  (registers when it is imported)
from dinov3_hf.models.dinov3_convnext.configuration_dinov3_convnext import (
    DINOv3ConvNextConfig,
    DINOv3ConvNextNativeConfig,
)
from dinov3_hf.models.dinov3_convnext.modeling_dinov3_convnext import (
    DINOv3ConvNextBackbone,
    DINOv3ConvNextModel,
    DINOv3ConvNextNativeModel,
)
from tests.models.dinov3_convnext.tiny import ALL_VARIANTS, NATIVE_VARIANTS, images, tiny_config, tiny_model


@pytest.mark.parametrize("fields", ALL_VARIANTS.values(), ids=ALL_VARIANTS)
def test_round_trip(fields, tmp_path):
    model = tiny_model(**fields)
    model.save_pretrained(tmp_path)
    loaded, loading = DINOv3ConvNextModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values()), loading
    assert not loaded.training
    expected, found = model.state_dict(), loaded.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/config.json").read_text() == (tmp_path / "config.json").read_text()
    assert all(loaded.config.__dict__[name] == value for name, value in fields.items())
    pixels = images(channels=model.config.num_channels)
    assert torch.equal(loaded(pixels).last_hidden_state, model(pixels).last_hidden_state)


@pytest.mark.parametrize("fields", ALL_VARIANTS.values(), ids=ALL_VARIANTS)
def test_the_model_type_says_who_can_open_the_folder(fields, tmp_path):
    model = tiny_model(**fields)
    model.save_pretrained(tmp_path)
    native = fields in NATIVE_VARIANTS.values()
    assert model.config.is_stock_representable != native
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == ("dinov3_convnext_native" if native else "dinov3_convnext")
    opened = AutoModel.from_pretrained(tmp_path)
    if native:
        assert type(AutoConfig.from_pretrained(tmp_path)) is DINOv3ConvNextNativeConfig
        assert type(opened) is DINOv3ConvNextNativeModel
    else:
        assert type(opened) is transformers.DINOv3ConvNextModel
    pixels = images(channels=model.config.num_channels)
    assert torch.equal(opened(pixels).last_hidden_state, model(pixels).last_hidden_state)


def test_a_native_folder_saved_again_stays_native(tmp_path):
    model = tiny_model(patch_size=16, layer_scale_init_value=1e-3)
    model.save_pretrained(tmp_path / "once")
    AutoModel.from_pretrained(tmp_path / "once").save_pretrained(tmp_path / "twice")
    once, twice = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("once", "twice"))
    assert once.pop("architectures") == ["DINOv3ConvNextModel"]
    assert twice.pop("architectures") == ["DINOv3ConvNextNativeModel"]
    assert once == twice
    loaded = DINOv3ConvNextModel.from_pretrained(tmp_path / "twice")
    assert (loaded.config.patch_size, loaded.config.layer_scale_init_value) == (16, 1e-3)
    assert torch.equal(loaded(images()).pooler_output, model(images()).pooler_output)


def test_backbone_and_model_share_files(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    backbone, loading = DINOv3ConvNextBackbone.from_pretrained(
        tmp_path / "model", out_features=["stage4"], output_loading_info=True
    )
    assert not any(loading.values()), loading
    expected = model.get_intermediate_layers(images(), reshape=True, norm=False)[0]
    assert torch.equal(backbone(images()).feature_maps[0], expected)
    backbone.save_pretrained(tmp_path / "backbone")
    _, loading = DINOv3ConvNextModel.from_pretrained(tmp_path / "backbone", output_loading_info=True)
    assert loading["missing_keys"] == {"layer_norm.weight", "layer_norm.bias"}  # which a backbone does not have


def test_shards_and_dtype(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    loaded = DINOv3ConvNextModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    expected = model.bfloat16().state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


def test_given_tensors_are_saved_instead_of_the_models(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path, state_dict={name: 2 * tensor for name, tensor in model.state_dict().items()})
    loaded = DINOv3ConvNextModel.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], 2 * tensor), name


@pytest.mark.parametrize("model_type", ["convnext", "dinov3_vit"])
def test_a_folder_of_another_architecture(model_type, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "hidden_size": 32}))
    with pytest.raises(ValueError, match=f"holds a '{model_type}' model, not a DINOv3 ConvNeXt; use a checkpoint of"):
        DINOv3ConvNextModel.from_pretrained(tmp_path)


def test_fields_of_a_configuration_can_be_overridden(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    loaded = DINOv3ConvNextModel.from_pretrained(tmp_path, drop_path_rate=0.2, patch_size=16)
    assert (loaded.config.drop_path_rate, loaded.config.patch_size) == (0.2, 16)
    assert loaded.get_intermediate_layers(images(), reshape=True)[0].shape == (2, 24, 6, 4)


# ---- fresh weights -----------------------------------------------------------------------------------------------


@pytest.fixture
def uninitialized_memory_is_nan():
    assert deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def assert_finite(model: nn.Module) -> None:
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert torch.isfinite(tensor).all(), name


@pytest.mark.usefixtures("uninitialized_memory_is_nan")
@pytest.mark.parametrize("fields", ALL_VARIANTS.values(), ids=ALL_VARIANTS)
def test_initialization_leaves_nothing_out(fields, tmp_path):
    config = tiny_config(**fields)
    model = DINOv3ConvNextModel(config)
    assert_finite(model)
    pixels = images(channels=config.num_channels)
    assert torch.isfinite(model(pixels).last_hidden_state).all()

    # A file in which nearly everything is missing, loaded by way of the meta device as all files are.
    model.save_pretrained(tmp_path)
    kept = {"layer_norm.bias": model.layer_norm.bias.detach() + 5}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, loading = DINOv3ConvNextModel.from_pretrained(tmp_path, output_loading_info=True)
    assert len(loading["missing_keys"]) > 10
    assert_finite(loaded)
    assert torch.equal(loaded.layer_norm.bias, kept["layer_norm.bias"])
    assert torch.isfinite(loaded(pixels).last_hidden_state).all()
    if config.layer_scale_init_value is not None:
        assert loaded.stages[0].layers[0].gamma.eq(config.layer_scale_init_value).all()


def test_materialized_from_the_meta_device():
    with torch.device("meta"):
        model = DINOv3ConvNextModel(tiny_config(drop_path_rate=0.3))
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.fill_(torch.nan)
    model.apply(model._init_weights)
    assert_finite(model)
    assert torch.isfinite(model(images()).last_hidden_state).all()


# ---- channels ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_channels", [1, 6])
def test_other_numbers_of_channels(num_channels, tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "rgb")
    converted = DINOv3ConvNextModel.from_pretrained(tmp_path / "rgb", num_channels=num_channels)
    assert converted.config.num_channels == num_channels
    grey = images(channels=1)
    expected = model(grey.expand(-1, 3, -1, -1)).last_hidden_state
    found = converted(grey.expand(-1, num_channels, -1, -1)).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=rf"are not \(images, {num_channels}, height, width\)"):
        converted(images())

    converted.save_pretrained(tmp_path / "converted")
    again = DINOv3ConvNextModel.from_pretrained(tmp_path / "converted")
    assert torch.equal(again.get_input_embeddings().weight, converted.get_input_embeddings().weight)
    assert again.config.num_channels == num_channels
    backbone = DINOv3ConvNextBackbone.from_pretrained(tmp_path / "rgb", num_channels=num_channels, out_indices=[0, 1])
    assert backbone.channels == [num_channels, 8]


def test_the_same_number_of_channels_changes_nothing():
    model = tiny_model().requires_grad_(False)
    weight = model.get_input_embeddings().weight
    model.set_num_channels(3)
    assert model.get_input_embeddings().weight is weight
    model.set_num_channels(1)
    assert not model.get_input_embeddings().weight.requires_grad


def test_the_class_of_a_preset_can_be_saved_and_read(tmp_path):
    config = DINOv3ConvNextConfig.from_preset("convnext_base", drop_path_rate=0.1)
    config.save_pretrained(tmp_path)
    assert DINOv3ConvNextConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
