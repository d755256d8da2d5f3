"""Small random networks of timm and their folders, written by timm."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from torch import Tensor, nn

from dinov3_hf.convert.lazy_tensor import LazyTensor


def build_timm(architecture: str, **arguments: Any) -> nn.Module:
    """A network of timm in which no parameter is zero or one."""
    model = timm.create_model(architecture, **arguments).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.1 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            centre = 0.6 if "gamma" in name else 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(centre + spread * torch.randn(parameter.shape, generator=generator))
    return model


def save_timm(model: nn.Module, folder: Path) -> tuple[dict[str, Any], dict[str, LazyTensor]]:
    """Let timm write the folder; its `config.json` and tensors."""
    save_for_hf(model, folder, safe_serialization=True)
    return json.loads((folder / "config.json").read_text()), lazy(load_file(folder / "model.safetensors"))


def open_timm(folder: Path, fields: Mapping[str, Any], tensors: Mapping[str, LazyTensor]) -> nn.Module:
    """Write the folder ourselves, and let timm open it."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields))
    save_file({name: tensor.read().contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def lazy(state: Mapping[str, Tensor]) -> dict[str, LazyTensor]:
    return {name: LazyTensor.of(tensor) for name, tensor in state.items()}


def shapes(tensors: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def assert_same_tensors(found: Mapping[str, LazyTensor], expected: Mapping[str, LazyTensor]) -> None:
    """Names, shapes, dtypes and bits."""
    assert shapes(found) == shapes(expected)
    for name in expected:
        torch.testing.assert_close(found[name].read(), expected[name].read(), rtol=0, atol=0, msg=name)


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest expected value."""
    return ((found - expected).abs().max() / expected.abs().max()).item()
