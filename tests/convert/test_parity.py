"""Layer-by-layer comparison of checkpoints, and the program around it."""

import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import DINOv3ConvNextConfig as StockConvNextConfig
from transformers import DINOv3ConvNextModel as StockConvNextModel

from dinov3_hf.cli.errors import run
from dinov3_hf.convert import parity
from dinov3_hf.convert.checkpoint import read_checkpoint
from dinov3_hf.convert.lazy_tensor import read_all
from dinov3_hf.convert.random_weights import random_checkpoint
from dinov3_hf.convert.writing import write_checkpoint
from dinov3_hf.models.dinov3_vit.image_processing import build_image_processor
from tests.convert.files import tiny_native
from tests.testing_utils import REPOSITORY, require_package

SCRIPT = REPOSITORY / "conversion" / "check_parity.py"


@pytest.fixture(scope="module")
def main():
    spec = importlib.util.spec_from_file_location("check_parity", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["check_parity"] = module
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture
def native(tmp_path) -> Path:
    """A file of the original, of a network that transformers and timm have too."""
    torch.manual_seed(0)
    path = tmp_path / "native.pth"
    weights = {
        name: tensor + 0.1 * torch.randn(tensor.shape) for name, tensor in trained_tensors(tiny_native()).items()
    }
    torch.save({**tiny_native(), **weights}, path)
    return path


def trained_tensors(state):
    return {name: tensor for name, tensor in state.items() if not name.endswith(("bias_mask", "periods", "qkv.bias"))}


def call(main, capsys, *arguments) -> tuple[int, str, str]:
    """Exit status, output and error output."""
    status = 0
    try:
        run(main, [str(argument) for argument in arguments])
    except SystemExit as ended:
        status = ended.code
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def read_json(out: str):
    """What was printed, without what a library says when it is imported for the first time."""
    return json.loads(out[out.index("{\n") :])


@require_package("timm")
def test_the_command_of_the_docstring(forks, native):
    (command,) = [line for line in SCRIPT.read_text().splitlines() if line.endswith("dinov3_vits16.pth")]
    program, *arguments = shlex.split(command)
    assert program == "python"
    arguments = [str(native) if argument == "dinov3_vits16.pth" else argument for argument in arguments]
    result = forks.run(REPOSITORY / arguments[0], *arguments[1:])
    assert result.returncode == 0, result.stderr
    verdicts = re.findall(r"^PASS \[\d\] (\w+)", result.stdout, re.MULTILINE)
    assert verdicts == ["transformers", "dinov3_hf", "timm"]
    assert "china.jpg" in result.stdout


@require_package("timm")
def test_alone_it_is_compared_in_every_format(main, capsys, native):
    size = read_checkpoint(native).config.patch_size * 2
    status, out, _ = call(main, capsys, native, "--size", f"{size}x{2 * size}", "--size", size, "--json")
    assert status == 0
    report = read_json(out)
    assert (
        report["passed"]
        and not report["skipped"]
        and list(report["layers"]) == [f"{size}x{2 * size}", f"{size}x{size}"]
    )
    for candidates in report["layers"].values():
        hub, original, timm = candidates.values()
        assert [layer["layer"] for layer in hub] == ["embeddings", *(f"layer.{i}" for i in range(3)), "norm", "pooled"]
        assert all(layer["absolute"] == 0 for layer in original)
        assert any(layer["absolute"] > 0 for layer in hub + timm), "other code rounds differently"


def test_two_files_are_compared_as_they_are(main, capsys, native, tmp_path):
    write_checkpoint(read_checkpoint(native), tmp_path / "hf", "hf")
    assert call(main, capsys, native, tmp_path / "hf")[0] == 0

    weights = load_file(tmp_path / "hf" / "model.safetensors")
    weights["layer.1.mlp.up_proj.weight"][3, 5] += 0.5
    save_file(weights, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    status, out, _ = call(main, capsys, native, tmp_path / "hf", "--json")
    assert status == 1
    (candidates,) = read_json(out)["layers"].values()
    (layers,) = candidates.values()
    wrong = [layer["layer"] for layer in layers if layer["relative"] > 1e-5]
    assert wrong[0] == "layer.1", "the first layer that differs is the one with the wrong weight"
    status, out, _ = call(main, capsys, native, tmp_path / "hf", native, "--tolerance", "10")
    assert status == 0 and out.count("PASS") == 2


def test_nan_is_a_difference(main, capsys, native, tmp_path):
    write_checkpoint(read_checkpoint(native), tmp_path / "hf", "hf")
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    weights["norm.bias"][0] = float("nan")
    save_file(weights, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    status, out, _ = call(main, capsys, native, tmp_path / "hf")
    assert status == 1 and "FAIL [1]" in out and "PASS" not in out


def test_networks_that_only_we_have_are_compared_as_far_as_they_go(main, capsys, tmp_path):
    torch.save(tiny_native(untie_cls_and_patch_norms=True), tmp_path / "native.pth")
    status, out, _ = call(main, capsys, tmp_path / "native.pth")
    assert status == 0
    assert "PASS [1] dinov3_hf" in out and "PASS [2] dinov3_hf" in out and "PASS [3]" not in out
    assert f"not compared: timm: {tmp_path / 'native.pth'}: timm has no DINOv3 ViT with untie_cls_and_patch" in out


@require_package("timm")
def test_convnext_and_float64(main, capsys, tmp_path):
    torch.manual_seed(0)
    config = StockConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1], layer_scale_init_value=0.5)
    StockConvNextModel(config).save_pretrained(tmp_path / "hf")
    status, out, _ = call(main, capsys, tmp_path / "hf", "--size", "70x100", "--dtype", "float64", "--json")
    assert status == 0
    (candidates,) = read_json(out)["layers"].values()
    assert len(candidates) == 3
    for layers in candidates.values():
        assert [layer["layer"] for layer in layers] == [*(f"stages.{i}" for i in range(4)), "layer_norm", "pooled"]
        assert all(layer["relative"] < 1e-13 for layer in layers)


def test_without_timm_and_without_a_photo(main, capsys, native, monkeypatch):
    monkeypatch.setattr(parity, "find_spec", lambda name: None)
    status, out, _ = call(main, capsys, native)
    assert status == 0
    assert "not compared: timm: timm is not installed; pip install timm" in out and "random pixels" in out


def test_a_preset_is_filled_with_random_weights(main, capsys, tmp_path):
    status, out, _ = call(main, capsys, "--preset", "vits16", "--size", "32", "--zero_qkv_bias", "--json")
    assert status == 0
    (candidates,) = read_json(out)["layers"].values()
    assert all(len(layers) == 15 for layers in candidates.values())


def test_random_weights_leave_nothing_without_effect():
    weights = read_all(random_checkpoint("vits16", seed=1).tensors)
    again = read_all(random_checkpoint("vits16", seed=1).tensors)
    other = read_all(random_checkpoint("vits16", seed=2).tensors)
    for name, tensor in weights.items():
        assert tensor.std() > 0.01, name
        assert torch.equal(tensor, again[name]) and not torch.equal(tensor, other[name]), name
    zero = random_checkpoint("vits16", zero_qkv_bias=True).tensors
    assert not zero["layer.0.attention.v_proj.bias"].read().any() and zero["layer.0.norm1.bias"].read().any()


def test_pixels_are_those_of_the_image_processor():
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))
    expected = build_image_processor(do_resize=False)(photo, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(parity.read_pixels(photo, (48, 64)), expected, rtol=0, atol=1e-6)
    assert parity.read_pixels(photo, (32, 16), num_channels=2).shape == (1, 2, 32, 16)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, "give either SRC or --preset"),
        (["{native}", "--size", "12x"], 2, "--size 12x is no size"),
        (["{native}", "--size", "30x64"], 1, "are no multiples of 4; use 32x64"),
        (["{native}", "--nonsense"], 2, "--nonsense"),
        (["{native}", "--image", "nowhere.jpg"], 1, "nowhere.jpg"),
        (["nowhere.pth"], 1, "nowhere.pth does not exist"),
        (["{native}", "{other}"], 1, "is of another architecture: embeddings has the outputs"),
        (["--preset", "vits17"], 2, "'vits17' is not known"),
    ],
)
def test_errors_are_one_line(main, capsys, native, tmp_path, arguments, status, message):
    torch.save(tiny_native(num_register_tokens=3), tmp_path / "other.pth")
    names = {"native": native, "other": tmp_path / "other.pth"}
    found, _, error = call(main, capsys, *(argument.format(**names) for argument in arguments))
    assert found == status
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
