"""Small checkpoints of every kind, as files."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from dinov3_hf.convert.checkpoint import Checkpoint, read_checkpoint
from dinov3_hf.convert.dinov3_vit import state_dict_to_native
from dinov3_hf.convert.lazy_tensor import same_bits
from dinov3_hf.convert.writing import Written, write_checkpoint
from tests.models.dinov3_vit.tiny import tiny_model
from tests.reference.io import find_cases
from tests.testing_utils import FIXTURES

# Recorded networks of every option of the original, with key biases that their mask cancels.
VIT_CASES = [case for case in find_cases(FIXTURES / "a_vit") if (case / "weights.safetensors").exists()]
CONVNEXT_CASES = [case for case in find_cases(FIXTURES / "b_convnext") if (case / "weights.safetensors").exists()]


def native_weights(case: Path) -> dict[str, Tensor]:
    return load_file(case / "weights.safetensors")


def tiny_native(**fields: Any) -> dict[str, Tensor]:
    """A native state dict of a tiny random ViT."""
    model = tiny_model(**{"layer_norm_eps": 1e-5, **fields})
    return {name: tensor.detach() for name, tensor in state_dict_to_native(model.state_dict(), model.config).items()}


def heads(width: int = 32) -> dict[str, Tensor]:
    """DINO and iBOT heads for features of this width; the second has two layers without biases."""
    return {
        "dino_head.mlp.0.weight": torch.randn(24, width),
        "dino_head.mlp.0.bias": torch.randn(24),
        "dino_head.mlp.2.weight": torch.randn(24, 24),
        "dino_head.mlp.2.bias": torch.randn(24),
        "dino_head.mlp.4.weight": torch.randn(8, 24),
        "dino_head.mlp.4.bias": torch.randn(8),
        "dino_head.last_layer.weight": torch.randn(40, 8),
        "ibot_head.mlp.0.weight": torch.randn(20, width),
        "ibot_head.mlp.2.weight": torch.randn(6, 20),
        "ibot_head.last_layer.weight": torch.randn(30, 6),
    }


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def converted(source: Path, target: Path, to: str, **options: Any) -> tuple[Checkpoint, Written]:
    """Read `source`, write `target`."""
    checkpoint = read_checkpoint(source)
    return checkpoint, write_checkpoint(checkpoint, target, to, **options)


def assert_same_bits(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert not different(found, expected, expected)


def different(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], names: Iterable[str]) -> list[str]:
    return [name for name in names if not same_bits(found[name], expected[name])]


def read_native(path: Path) -> Any:
    return torch.load(path, weights_only=True)
