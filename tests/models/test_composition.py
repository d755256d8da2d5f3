"""Our backbones inside models of transformers, and our files as their checkpoints."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers import AutoBackbone, EomtDinov3Config, EomtDinov3ForUniversalSegmentation

from dinov3_hf import DINOv3ConvNextBackbone, DINOv3ConvNextConfig, DINOv3ViTBackbone, DINOv3ViTConfig, DINOv3ViTModel
from tests.models.compositions import (
    CONVNEXT,
    VIT,
    backbone_of,
    chmv2,
    dpt,
    mask2former,
    pixels,
    prediction_of,
    upernet,
)
from tests.models.dinov3_vit.tiny import randomize
from tests.models.other_process import VERSIONS, run_without_us
from tests.testing_utils import REPOSITORY

NATIVE = {"norm_type": "rmsnorm"}
FOR_DPT = {"reshape_hidden_states": False, "class_token_in_feature_maps": True}
# Name -> model around the backbone, configuration class and fields of the backbone.
COMPOSED = {
    "upernet": (upernet, DINOv3ViTConfig, VIT),
    "upernet_of_native": (upernet, DINOv3ViTConfig, {**VIT, **NATIVE}),
    "upernet_of_convnext": (upernet, DINOv3ConvNextConfig, CONVNEXT),
    "upernet_of_native_convnext": (upernet, DINOv3ConvNextConfig, {**CONVNEXT, "patch_size": 16}),
    "mask2former": (mask2former, DINOv3ViTConfig, VIT),
    "mask2former_of_convnext": (mask2former, DINOv3ConvNextConfig, CONVNEXT),
    "chmv2": (chmv2, DINOv3ViTConfig, {**VIT, "return_class_token": True}),
    "dpt": (dpt, DINOv3ViTConfig, {**VIT, **FOR_DPT}),
}
STOCK_REPRESENTABLE = [name for name, (_, cls, fields) in COMPOSED.items() if cls(**fields).is_stock_representable]
BACKBONES = {DINOv3ViTConfig: DINOv3ViTBackbone, DINOv3ConvNextConfig: DINOv3ConvNextBackbone}


@pytest.fixture(scope="module")
def composed(tmp_path_factory):
    """Every composition, with the weights of a backbone folder of ours, and saved."""
    folder = tmp_path_factory.mktemp("composed")
    models, backbones = {}, {}
    for name, (build, config_class, fields) in COMPOSED.items():
        randomize(BACKBONES[config_class](config_class(**fields))).save_pretrained(folder / "backbones" / name)
        backbone = BACKBONES[config_class].from_pretrained(folder / "backbones" / name)
        model = build(backbone.config).eval()
        backbone_of(model).load_state_dict(backbone.state_dict())
        model.save_pretrained(folder / "models" / name)
        models[name], backbones[name] = model, backbone
    return SimpleNamespace(folder=folder, models=models, backbones=backbones)


@pytest.mark.parametrize("name", COMPOSED)
def test_our_configuration_gives_our_backbone(composed, name):
    inner = backbone_of(composed.models[name])
    assert type(inner) is type(composed.backbones[name])
    with torch.no_grad():
        for found, expected in zip(
            inner(pixels()).feature_maps, composed.backbones[name](pixels()).feature_maps, strict=True
        ):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("name", COMPOSED)
def test_gradients_reach_the_backbone(composed, name):
    model = composed.models[name]  # in eval mode: the statistics of its batch norms stay as they are
    prediction_of(model, pixels()).square().mean().backward()
    gradients = {key: parameter.grad for key, parameter in backbone_of(model).named_parameters()}
    model.zero_grad()
    # The last norm acts on what is returned; mask tokens and norms without a map have no part.
    idle = {key for key, gradient in gradients.items() if gradient is None}
    assert idle <= {"embeddings.mask_token", "layer_norm.weight", "layer_norm.bias"}
    assert all(torch.isfinite(gradient).all() for key, gradient in gradients.items() if key not in idle)


@pytest.mark.parametrize("name", COMPOSED)
def test_composed_models_reload(composed, name):
    model = composed.models[name]
    loaded, loading = type(model).from_pretrained(composed.folder / "models" / name, output_loading_info=True)
    assert not any(loading.values()), loading
    module = "transformers.models" if name in STOCK_REPRESENTABLE else "dinov3_hf.models"
    assert type(backbone_of(loaded)).__module__.startswith(module)
    with torch.no_grad():
        torch.testing.assert_close(
            prediction_of(loaded, pixels()), prediction_of(model, pixels()), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("version", VERSIONS)
def test_composed_models_where_this_package_is_missing(composed, version, tmp_path):
    for name in COMPOSED:
        (tmp_path / name).symlink_to(composed.folder / "models" / name)
    run_without_us(version, REPOSITORY / "tests" / "models" / "composition_process.py", tmp_path)
    found = torch.load(tmp_path / "predictions.pt")
    for name in STOCK_REPRESENTABLE:
        prediction, module = found.pop(name)
        assert module.startswith("transformers.models.dinov3_")
        with torch.no_grad():
            expected = prediction_of(composed.models[name], pixels())
        torch.testing.assert_close(prediction, expected, rtol=1e-4, atol=1e-4)
    assert found.keys() == COMPOSED.keys() - set(STOCK_REPRESENTABLE)
    for name, error in found.items():  # the model type in it leads to this package
        assert "dinov3_convnext_native" in error if "convnext" in name else "dinov3_vit_native" in error, error


@pytest.mark.parametrize("name", STOCK_REPRESENTABLE)
def test_our_files_fill_the_backbone_of_transformers(composed, name):
    """What a user without this package does, with a folder of ours."""
    folder = composed.folder / "backbones" / name
    config = transformers.AutoConfig.from_pretrained(folder)
    model = COMPOSED[name][0](config).eval()
    inner = backbone_of(model)
    assert type(inner).__module__.startswith("transformers.models.")
    inner.load_state_dict(type(inner).from_pretrained(folder).state_dict())
    with torch.no_grad():
        for found, expected in zip(
            inner(pixels()).feature_maps, composed.backbones[name](pixels()).feature_maps, strict=True
        ):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_file_fills_eomt(tmp_path):
    """EoMT-DINOv3 has no backbone inside: its blocks are those of the ViT, under other names."""
    fields = {name: value for name, value in VIT.items() if name != "out_indices"}
    randomize(DINOv3ViTModel(DINOv3ViTConfig(**fields, rope_theta=20.0))).save_pretrained(tmp_path / "vit")
    vit = DINOv3ViTModel.from_pretrained(tmp_path / "vit").eval()
    config = EomtDinov3Config(
        **fields, rope_theta=20.0, layer_norm_eps=1e-5, num_blocks=2, num_queries=3, num_upscale_blocks=1
    )
    eomt = EomtDinov3ForUniversalSegmentation(config).eval()
    embeddings = eomt.embeddings.load_state_dict(vit.embeddings.state_dict(), strict=False)
    assert (embeddings.missing_keys, embeddings.unexpected_keys) == ([], ["mask_token"])
    eomt.layers.load_state_dict(vit.layer.state_dict())
    eomt.layernorm.load_state_dict(vit.norm.state_dict())
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(4))
    entering = []
    eomt.layers[2].register_forward_pre_hook(lambda _, arguments: entering.append(arguments[0]))  # queries join here
    with torch.no_grad():
        eomt(images)
        expected = vit(images, output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(entering[0][:, 3:], expected, rtol=1e-5, atol=1e-6)

    optimizer = torch.optim.SGD(eomt.parameters(), lr=0.01)
    masks = [torch.eye(64).expand(2, 64, 64)] * 2
    eomt.train()(images, mask_labels=masks, class_labels=[torch.tensor([0, 1])] * 2).loss.backward()
    optimizer.step()
    assert not torch.equal(eomt.layers[0].attention.q_proj.weight, vit.layer[0].attention.q_proj.weight)
    eomt.save_pretrained(tmp_path / "eomt")
    again, loading = EomtDinov3ForUniversalSegmentation.from_pretrained(tmp_path / "eomt", output_loading_info=True)
    assert not any(loading.values()), loading
    with torch.no_grad():
        found, trained = again.eval()(images), eomt.eval()(images)
    torch.testing.assert_close(found.masks_queries_logits, trained.masks_queries_logits, rtol=1e-4, atol=1e-4)


def test_auto_backbone_takes_both_configurations():
    ours = AutoBackbone.from_config(DINOv3ViTConfig(**VIT))
    theirs = AutoBackbone.from_config(transformers.DINOv3ViTConfig(**VIT))
    assert type(ours) is DINOv3ViTBackbone and type(theirs) is transformers.DINOv3ViTBackbone
