"""Weights that go through files before they are checked: native -> a folder of the Hub -> native."""

import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from dinov3_hf.convert.checkpoint import read_checkpoint
from dinov3_hf.convert.writing import write_checkpoint

# The kinds whose weights are those of one backbone.
BACKBONE_KINDS = ("vit", "vit_rope_augmentation", "vit_drop_path", "convnext")


def through_files(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same native state dict, as it comes back from a folder of the Hub."""
    with tempfile.TemporaryDirectory() as name:
        native, hub, back = (Path(name, part) for part in ("native.pth", "hub", "back.pth"))
        torch.save(dict(weights), native)
        write_checkpoint(read_checkpoint(native), hub, "hf")
        write_checkpoint(read_checkpoint(hub), back, "native")
        return torch.load(back, weights_only=True)
