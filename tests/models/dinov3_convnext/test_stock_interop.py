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

from dinov3_hf.models.dinov3_convnext.modeling_dinov3_convnext import DINOv3ConvNextBackbone, DINOv3ConvNextModel
from dinov3_hf.models.dinov3_vit.image_processing import build_image_processor
from tests.models.dinov3_convnext.tiny import NATIVE_VARIANTS, STOCK_VARIANTS, images, tiny_model
from tests.models.other_process import VERSIONS, run_without_us


@pytest.fixture(scope="module", params=VERSIONS)
def exchange(request, tmp_path_factory):
    """Our models written, read by the other process, its models written: the folder and its report."""
    folder = tmp_path_factory.mktemp("exchange")
    for name, fields in STOCK_VARIANTS.items():
        tiny_model(**fields).save_pretrained(folder / "ours" / name)
        build_image_processor("web", 64).save_pretrained(folder / "ours" / name)
    for name, fields in NATIVE_VARIANTS.items():
        tiny_model(**fields).save_pretrained(folder / "native" / name)
    inputs = {"pixels_3": images(), "pixels_1": images(channels=1)}
    save_file(inputs, folder / "images.safetensors")
    run_without_us(request.param, Path(__file__).with_name("stock_process.py"), folder)
    report = json.loads((folder / "report.json").read_text())
    expected = "5.8." if request.param == "oldest" else transformers.__version__
    assert report["transformers"].startswith(expected)
    return SimpleNamespace(folder=folder, report=report, inputs=inputs)


@torch.no_grad()
def assert_same_outputs(model_folder: Path, expected: dict[str, torch.Tensor], inputs: dict[str, torch.Tensor]):
    """Our classes, opened from `model_folder`, return the very numbers that stock's returned."""
    model, loading = DINOv3ConvNextModel.from_pretrained(model_folder, output_loading_info=True)
    assert not any(loading.values()), loading
    pixels = inputs[f"pixels_{model.config.num_channels}"]
    output = model(pixels, output_hidden_states=True)
    found = {"last_hidden_state": output.last_hidden_state, "pooler_output": output.pooler_output}
    found |= {f"hidden_states/{index}": states for index, states in enumerate(output.hidden_states)}
    backbone = DINOv3ConvNextBackbone.from_pretrained(model_folder, out_indices=[0, 2, 3])
    found |= {f"feature_maps/{index}": each for index, each in enumerate(backbone(pixels).feature_maps)}
    torch.manual_seed(0)
    found["training"] = model.train()(pixels).last_hidden_state
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        tolerance = 1e-5 if name == "training" else 0  # a branch that is kept is scaled in another order
        torch.testing.assert_close(
            found[name], tensor, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("name", STOCK_VARIANTS)
def test_our_files_open_in_stock(exchange, name):
    expected = "transformers.models.dinov3_convnext.modeling_dinov3_convnext.DINOv3ConvNextModel"
    assert exchange.report["classes"][name] == expected
    assert not any(exchange.report["loading"][name].values()), exchange.report["loading"][name]
    outputs = load_file(exchange.folder / f"outputs/ours_{name}.safetensors")
    assert_same_outputs(exchange.folder / "ours" / name, outputs, exchange.inputs)


@pytest.mark.parametrize("written", ["stock", "runtime"])
@pytest.mark.parametrize("name", STOCK_VARIANTS)
def test_stock_files_open_here(exchange, name, written):
    outputs = load_file(exchange.folder / f"outputs/stock_{name}.safetensors")
    assert_same_outputs(exchange.folder / written / name, outputs, exchange.inputs)


@pytest.mark.parametrize("name", STOCK_VARIANTS)
def test_keys_are_those_of_stock(exchange, name):
    ours, stock, runtime = (
        {key: tensor.shape for key, tensor in load_file(exchange.folder / each / name / "model.safetensors").items()}
        for each in ("ours", "stock", "runtime")
    )
    assert ours == stock
    assert ours == {key.removeprefix("model."): shape for key, shape in runtime.items()}
    assert any(key.startswith("model.stages.") for key in runtime)


@pytest.mark.parametrize("name", NATIVE_VARIANTS)
def test_what_stock_cannot_represent_it_refuses(exchange, name):
    outcomes = exchange.report["native"][name]
    assert len(outcomes) == 4
    assert all(outcome != "loaded" for outcome in outcomes.values()), outcomes
    assert "trust_remote_code" in outcomes["AutoModel"]
    assert "layer_scale_init_value" in outcomes["DINOv3ConvNextModel"]


def test_the_image_processor_opens_in_stock(exchange):
    kind, mean, size = exchange.report["processor"]
    assert kind.startswith("DINOv3ViTImageProcessor")
    assert mean == pytest.approx([0.485, 0.456, 0.406])
    assert size == {"height": 64, "width": 64}


def test_a_stock_configuration_builds_our_model():
    stock = transformers.DINOv3ConvNextModel(transformers.DINOv3ConvNextConfig(depths=[1, 1, 2, 1]))
    ours = DINOv3ConvNextModel(stock.config)
    assert ours.config.depths == [1, 1, 2, 1]
    ours.load_state_dict({key.removeprefix("model."): value for key, value in stock.state_dict().items()})
    with pytest.raises(ValueError, match="'vit' configuration does not describe a DINOv3 ConvNeXt"):
        DINOv3ConvNextModel(transformers.ViTConfig())
