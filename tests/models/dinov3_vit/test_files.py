"""Model folders: round trips, tensors that act in training only, other numbers of channels, fresh weights."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils import deterministic
from transformers import AutoConfig, AutoModel

import dinov3_hf.auto  # noqa: F401  (registers when it is imported)
from dinov3_hf.models.backbone_parts import convert_patch_embedding_channels
from dinov3_hf.models.dinov3_vit.configuration_dinov3_vit import DINOv3ViTConfig, DINOv3ViTNativeConfig
from dinov3_hf.models.dinov3_vit.modeling_dinov3_vit import (
    EXTRAS_NAME,
    DINOv3ViTBackbone,
    DINOv3ViTModel,
    DINOv3ViTNativeModel,
)
from tests.models.dinov3_vit.tiny import ALL_VARIANTS, NATIVE_VARIANTS, images, tiny_config, tiny_model


@pytest.mark.parametrize("fields", ALL_VARIANTS.values(), ids=ALL_VARIANTS)
def test_round_trip(fields, tmp_path):
    model = tiny_model(**fields)
    model.save_pretrained(tmp_path)
    loaded, loading = DINOv3ViTModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values()), loading
    assert not loaded.training
    expected = model.state_dict()
    found = loaded.state_dict()
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
    assert written["model_type"] == ("dinov3_vit_native" if native else "dinov3_vit")
    opened = AutoModel.from_pretrained(tmp_path)
    if native:
        assert type(AutoConfig.from_pretrained(tmp_path)) is DINOv3ViTNativeConfig
        assert type(opened) is DINOv3ViTNativeModel
    else:
        assert type(opened) is transformers.DINOv3ViTModel
    pixels = images(channels=model.config.num_channels)
    torch.testing.assert_close(opened(pixels).last_hidden_state, model(pixels).last_hidden_state)


def test_a_native_folder_saved_again_stays_native(tmp_path):
    model = tiny_model(norm_type="rmsnorm", rope_theta=30.0)
    model.save_pretrained(tmp_path / "once")
    AutoModel.from_pretrained(tmp_path / "once").save_pretrained(tmp_path / "twice")
    once, twice = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("once", "twice"))
    assert once.pop("architectures") == ["DINOv3ViTModel"] and twice.pop("architectures") == ["DINOv3ViTNativeModel"]
    assert once == twice
    loaded = DINOv3ViTModel.from_pretrained(tmp_path / "twice")
    assert torch.equal(loaded(images()).pooler_output, model(images()).pooler_output)


def test_backbone_and_model_share_files(tmp_path):
    model = tiny_model(untie_cls_and_patch_norms=True)
    model.save_pretrained(tmp_path / "model")
    backbone = DINOv3ViTBackbone.from_pretrained(tmp_path / "model", out_features=["stage3"])
    expected = model.get_intermediate_layers(images(), reshape=True)[0]
    torch.testing.assert_close(backbone(images()).feature_maps[0], expected)
    backbone.save_pretrained(tmp_path / "backbone")
    again = DINOv3ViTModel.from_pretrained(tmp_path / "backbone")
    torch.testing.assert_close(again(images()).pooler_output, model(images()).pooler_output)


def test_shards_and_dtype(tmp_path):
    model = tiny_model(untie_global_and_local_cls_norm=True)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    loaded = DINOv3ViTModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    expected = model.bfloat16().state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


def test_given_tensors_are_saved_instead_of_the_models(tmp_path):
    model = tiny_model(untie_global_and_local_cls_norm=True)
    model.save_pretrained(tmp_path, state_dict={name: 2 * tensor for name, tensor in model.state_dict().items()})
    loaded = DINOv3ViTModel.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], 2 * tensor), name


def test_a_folder_of_another_architecture(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit", "hidden_size": 32}))
    with pytest.raises(ValueError, match="holds a 'vit' model, not a DINOv3 ViT; use a checkpoint of model_type"):
        DINOv3ViTModel.from_pretrained(tmp_path)


# ---- tensors that act in training only ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["local_cls_norm", "both_norms"])
def test_the_local_norm_stands_in_a_file_of_its_own(name, tmp_path):
    model = tiny_model(**ALL_VARIANTS[name])
    model.save_pretrained(tmp_path)
    extras = load_file(tmp_path / EXTRAS_NAME)
    assert set(extras) == {"local_cls_norm.weight", "local_cls_norm.bias"}
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in extras.items())
    assert not set(extras) & set(load_file(tmp_path / "model.safetensors"))


def test_no_file_of_extras_without_them(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    assert not (tmp_path / EXTRAS_NAME).exists()


def test_a_lost_file_of_extras_is_said_and_replaced_by_fresh_weights(tmp_path, monkeypatch):
    from dinov3_hf.models.dinov3_vit import modeling_dinov3_vit

    tiny_model(untie_global_and_local_cls_norm=True).save_pretrained(tmp_path)
    (tmp_path / EXTRAS_NAME).unlink()
    warnings = []
    monkeypatch.setattr(modeling_dinov3_vit.logger, "warning", warnings.append)
    loaded, loading = DINOv3ViTModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values())
    assert "has no extras.safetensors: local_cls_norm is newly initialised" in warnings[0]
    assert loaded.local_cls_norm.weight.eq(1).all() and loaded.local_cls_norm.bias.eq(0).all()


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
    model = DINOv3ViTModel(config)
    assert_finite(model)
    pixels = images(channels=config.num_channels)
    assert torch.isfinite(model(pixels).last_hidden_state).all()

    # A file in which nearly everything is missing, loaded by way of the meta device as all files are.
    model.save_pretrained(tmp_path)
    kept = {"embeddings.cls_token": model.embeddings.cls_token.detach() + 5}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / EXTRAS_NAME).unlink(missing_ok=True)
    loaded, loading = DINOv3ViTModel.from_pretrained(tmp_path, output_loading_info=True)
    assert len(loading["missing_keys"]) > 10
    assert_finite(loaded)
    assert torch.equal(loaded.embeddings.cls_token, kept["embeddings.cls_token"])
    assert torch.isfinite(loaded(pixels).last_hidden_state).all()
    if config.layerscale_value is not None:
        assert loaded.layer[0].layer_scale1.lambda1.eq(config.layerscale_value).all()


def test_materialized_from_the_meta_device():
    with torch.device("meta"):
        model = DINOv3ViTModel(tiny_config())
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
    converted = DINOv3ViTModel.from_pretrained(tmp_path / "rgb", num_channels=num_channels)
    assert converted.config.num_channels == num_channels
    grey = images(channels=1)
    expected = model(grey.expand(-1, 3, -1, -1)).last_hidden_state
    found = converted(grey.expand(-1, num_channels, -1, -1)).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=rf"are not \(images, {num_channels}, height, width\)"):
        converted(images())

    converted.save_pretrained(tmp_path / "converted")
    again = DINOv3ViTModel.from_pretrained(tmp_path / "converted")
    assert torch.equal(again.embeddings.patch_embeddings.weight, converted.embeddings.patch_embeddings.weight)
    assert again.config.num_channels == num_channels


def test_the_same_number_of_channels_changes_nothing():
    model = tiny_model()
    weight = model.embeddings.patch_embeddings.weight
    model.set_num_channels(3)
    assert model.embeddings.patch_embeddings.weight is weight


def test_conversion_keeps_dtype_and_what_is_trained():
    weight = torch.randn(6, 3, 4, 4)
    assert convert_patch_embedding_channels(weight.bfloat16(), 2).dtype == torch.bfloat16
    torch.testing.assert_close(convert_patch_embedding_channels(weight, 6).sum(1), weight.sum(1))
    with pytest.raises(ValueError, match="num_channels 0 is not a number of image channels"):
        convert_patch_embedding_channels(weight, 0)
    model = tiny_model().requires_grad_(False)
    model.set_num_channels(1)
    assert not model.embeddings.patch_embeddings.weight.requires_grad


def test_channels_are_converted_only_on_request(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    shutil.copytree(tmp_path, tmp_path / "edited")
    (tmp_path / "edited/config.json").write_text(json.dumps({**fields, "num_channels": 1}))
    with pytest.raises(RuntimeError, match="mismatch"):
        DINOv3ViTModel.from_pretrained(tmp_path / "edited")


def test_fields_of_a_configuration_can_be_overridden(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    loaded = DINOv3ViTModel.from_pretrained(tmp_path, drop_path_rate=0.2, pos_embed_rescale=None)
    assert (loaded.config.drop_path_rate, loaded.config.pos_embed_rescale) == (0.2, None)
    config = DINOv3ViTConfig.from_pretrained(tmp_path, layer_norm_eps=1e-6)
    assert config.layer_norm_eps == 1e-6
