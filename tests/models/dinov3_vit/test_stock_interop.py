"""Our files in stock transformers, where this package cannot be imported, and stock files here.

Each test runs with the installed transformers and, where `make build/floor/installed` was run, with the oldest
supported one in the other process (slow; `make test-floor` runs all of this on the oldest).
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from dinov3_hf.models.dinov3_vit.image_processing import build_image_processor
from dinov3_hf.models.dinov3_vit.modeling_dinov3_vit import (
    EXTRAS_NAME,
    DINOv3ViTBackbone,
    DINOv3ViTModel,
)
from tests.models.dinov3_vit.tiny import (
    NATIVE_VARIANTS,
    STOCK_VARIANTS,
    images,
    random_mask,
    randomize,
    tiny_model,
)
from tests.models.other_process import VERSIONS, run_without_us


@pytest.fixture(scope="module", params=VERSIONS)
def exchange(request, tmp_path_factory):
    """Our models written, read by the other process, its models written: the folder and its report."""
    folder = tmp_path_factory.mktemp("exchange")
    for name, fields in STOCK_VARIANTS.items():
        tiny_model(**fields).save_pretrained(folder / "ours" / name)
        build_image_processor("satellite", 16).save_pretrained(folder / "ours" / name)
    for name, fields in NATIVE_VARIANTS.items():
        tiny_model(**fields).save_pretrained(folder / "native" / name)
    inputs = {"pixels_3": images(), "pixels_1": images(channels=1), "mask": random_mask()}
    save_file(inputs, folder / "images.safetensors")
    run_without_us(request.param, Path(__file__).with_name("stock_process.py"), folder)
    report = json.loads((folder / "report.json").read_text())
    expected = "5.8." if request.param == "oldest" else transformers.__version__
    assert report["transformers"].startswith(expected)
    return SimpleNamespace(folder=folder, report=report, inputs=inputs)


def assert_same_outputs(model_folder: Path, expected: dict[str, torch.Tensor], inputs: dict[str, torch.Tensor]):
    """Our classes, opened from `model_folder`, return what stock's returned, to 1e-6 of the largest value."""
    model = DINOv3ViTModel.from_pretrained(model_folder).eval()
    pixels = inputs[f"pixels_{model.config.num_channels}"]
    with torch.no_grad():
        output = model(pixels, output_hidden_states=True, output_attentions=True)
        found = {"last_hidden_state": output.last_hidden_state, "pooler_output": output.pooler_output}
        found |= {f"hidden_states/{index}": states for index, states in enumerate(output.hidden_states)}
        found |= {f"attentions/{index}": attention for index, attention in enumerate(output.attentions)}
        found["masked"] = model(pixels, inputs["mask"]).last_hidden_state
        backbone = DINOv3ViTBackbone.from_pretrained(model_folder, out_indices=[0, 2, 3]).eval()
        found |= {f"feature_maps/{index}": each for index, each in enumerate(backbone(pixels).feature_maps)}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        atol = 1e-6 * max(1.0, tensor.abs().max().item())
        torch.testing.assert_close(
            found[name], tensor, rtol=1e-6, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("name", STOCK_VARIANTS)
def test_our_files_open_in_stock(exchange, name):
    assert exchange.report["classes"][name] == "transformers.models.dinov3_vit.modeling_dinov3_vit.DINOv3ViTModel"
    assert not any(exchange.report["loading"][name].values()), exchange.report["loading"][name]
    expected = load_file(exchange.folder / f"outputs/ours_{name}.safetensors")
    assert_same_outputs(exchange.folder / "ours" / name, expected, exchange.inputs)


@pytest.mark.parametrize("name", STOCK_VARIANTS)
def test_stock_files_open_here(exchange, name):
    source = exchange.folder / "stock" / name
    _, loading = DINOv3ViTModel.from_pretrained(source, output_loading_info=True)
    assert not any(loading.values()), loading
    expected = load_file(exchange.folder / f"outputs/stock_{name}.safetensors")
    assert_same_outputs(source, expected, exchange.inputs)


@pytest.mark.parametrize("name", STOCK_VARIANTS)
def test_keys_are_those_of_stock(exchange, name):
    ours = load_file(exchange.folder / "ours" / name / "model.safetensors")
    stock = load_file(exchange.folder / "stock" / name / "model.safetensors")
    # Some versions write the blocks as `model.layer.N`; both read both.
    renamed = {key.removeprefix("model."): tensor.shape for key, tensor in stock.items()}
    assert {key: tensor.shape for key, tensor in ours.items()} == renamed


@pytest.mark.parametrize("name", NATIVE_VARIANTS)
def test_what_stock_cannot_represent_it_refuses(exchange, name):
    outcomes = exchange.report["native"][name]
    assert len(outcomes) == 4
    assert all(outcome != "loaded" for outcome in outcomes.values()), outcomes
    assert "trust_remote_code=True" in outcomes["AutoModel"]  # our code lies in the folder
    assert "rope_theta" in outcomes["DINOv3ViTModel"]


def test_the_image_processor_opens_in_stock(exchange):
    kind, mean, size = exchange.report["processor"]
    assert kind.startswith("DINOv3ViTImageProcessor")
    assert mean == pytest.approx([0.430, 0.411, 0.296])
    assert size == {"height": 16, "width": 16}


def test_training_tensors_stand_beside_the_model(exchange):
    folder = exchange.folder / "ours" / "local_cls_norm"
    assert set(load_file(folder / EXTRAS_NAME)) == {"local_cls_norm.weight", "local_cls_norm.bias"}
    assert not any("local" in key for key in load_file(folder / "model.safetensors"))


def test_a_stock_configuration_builds_our_model():
    stock = transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(num_hidden_layers=2, hidden_size=48))
    ours = DINOv3ViTModel(stock.config)
    assert ours.config.hidden_size == 48
    missing = ours.load_state_dict({key.removeprefix("model."): value for key, value in stock.state_dict().items()})
    assert not missing.missing_keys and not missing.unexpected_keys
    randomize(ours)
    with pytest.raises(ValueError, match="'vit' configuration does not describe a DINOv3 ViT"):
        DINOv3ViTModel(transformers.ViTConfig())
