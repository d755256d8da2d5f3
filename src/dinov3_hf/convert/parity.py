"""Whether checkpoints, and the libraries that open them, compute the same: the outputs of every layer side by side.

Legend: B images, C channels, H x W pixels.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dinov3_hf.convert.checkpoint import Checkpoint, read_checkpoint
from dinov3_hf.convert.formats import FORMATS
from dinov3_hf.convert.layer_outputs import Network, Outputs, open_ours, open_timm, open_transformers
from dinov3_hf.convert.writing import HUB, write_checkpoint
from dinov3_hf.models.dinov3_convnext.configuration_dinov3_convnext import DINOv3ConvNextConfig
from dinov3_hf.models.dinov3_vit.image_processing import IMAGE_STATISTICS


@dataclass(frozen=True)
class Candidate:
    """
    A checkpoint with the library that opens it.

    Args:
        name: Library, its version, and what it opens.
        open: Loads the network, in the given dtype and eval mode.
    """

    name: str
    open: Callable[[torch.dtype], Network]


@dataclass(frozen=True)
class Skipped:
    """A comparison that cannot be made, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Difference:
    """
    How far the outputs of a layer are apart.

    Args:
        layer: Its name.
        largest: The largest magnitude of the reference's outputs.
        absolute: The largest difference.
        relative: `absolute / largest`.
    """

    layer: str
    largest: float
    absolute: float
    relative: float


@dataclass(frozen=True)
class Report:
    """
    What was compared.

    Args:
        reference: Name of what the others are compared with.
        layers: Input -> candidate -> the differences of all layers.
        skipped: What could not be compared.
    """

    reference: str
    layers: dict[str, dict[str, list[Difference]]]
    skipped: list[Skipped]

    def exceeding(self, tolerance: float) -> list[Difference]:
        """The differences that are larger than `tolerance`, relative to the largest output of their layer."""
        everything = [layer for each in self.layers.values() for layers in each.values() for layer in layers]
        return [layer for layer in everything if not layer.relative <= tolerance]  # NaN exceeds too


def check_parity(
    checkpoint: Checkpoint,
    candidates: Iterable[Candidate | Skipped],
    images: Mapping[str, Tensor],
    dtype: torch.dtype = torch.float32,
) -> Report:
    """
    Compare candidates with our network, one after the other, so that one of them is in memory at a time.

    Args:
        checkpoint: Gives the values of the reference.
        candidates: As of `candidate_of` and `converted_candidates`.
        images: Name -> (1, C, H, W).
        dtype: in which all of them compute.

    Raises:
        ValueError: A candidate has other layers, or there is nothing to compare.
    """
    reference = Candidate(
        f"dinov3_hf {version('dinov3-hf')}: {checkpoint.source}", lambda dtype: open_ours(checkpoint, dtype)
    )
    expected = _run(reference, images, dtype)
    report = Report(reference.name, {name: {} for name in images}, [])
    for candidate in candidates:
        if isinstance(candidate, Skipped):
            report.skipped.append(candidate)
            continue
        found = _run(candidate, images, dtype)
        for name in images:
            report.layers[name][candidate.name] = _differences(expected[name], found[name], candidate.name)
    if not any(report.layers.values()):
        reasons = "; ".join(f"{skipped.name}: {skipped.reason}" for skipped in report.skipped)
        raise ValueError(f"{checkpoint.source} has nothing to be compared with ({reasons}).")
    return report


def candidate_of(path: Path, name: str | None = None) -> Candidate:
    """
    A checkpoint as it lies there, with the library that it is meant for: a folder of the Hub with transformers, a
    folder of timm with timm, anything else (or where that library cannot open it) with ours.

    Args:
        path: A file or folder.
        name: What to call it, instead of `path`.

    Raises:
        ValueError, OSError: As `read_checkpoint`.
    """
    checkpoint = read_checkpoint(path)
    label = name or str(path)
    if checkpoint.format == HUB and checkpoint.config.is_stock_representable:
        return Candidate(
            f"transformers {version('transformers')}: {label}", lambda dtype: open_transformers(checkpoint, dtype)
        )
    if checkpoint.format == "timm" and path.is_dir() and find_spec("timm") is not None:
        return Candidate(f"timm {version('timm')}: {label}", lambda dtype: open_timm(path, dtype))
    return Candidate(f"dinov3_hf {version('dinov3-hf')}: {label}", lambda dtype: open_ours(checkpoint, dtype))


def converted_candidates(checkpoint: Checkpoint, folder: Path) -> Iterator[Candidate | Skipped]:
    """
    The checkpoint, converted to each format in turn and opened by the library of that format.

    Args:
        checkpoint: What to convert.
        folder: Where to write; a file or folder is removed when the next one is asked for.
    """
    for name in (HUB, *dict.fromkeys(each.name for each in FORMATS)):
        if name == "timm" and find_spec("timm") is None:
            yield Skipped("timm", "timm is not installed; pip install timm")
            continue
        target = folder / ("native.pth" if name == "native" else name)
        try:
            write_checkpoint(checkpoint, target, name)
        except ValueError as error:
            yield Skipped(name, str(error))
            continue
        yield candidate_of(target, f"converted to {name}")
        _remove(target)


def read_pixels(image: Image.Image, size: tuple[int, int], num_channels: int = 3) -> Tensor:
    """
    A photo as a network takes it, (1, C, H, W): resized to exactly `size` = (H, W), with ImageNet's statistics; for
    other channels than three, the mean of red, green and blue in each.
    """
    resized = image.convert("RGB").resize(size[::-1], Image.Resampling.BICUBIC)
    mean, std = (torch.tensor(values) for values in IMAGE_STATISTICS["web"])
    pixels = (torch.from_numpy(np.asarray(resized, dtype=np.float32)) / 255 - mean) / std  # (H, W, 3)
    pixels = pixels.permute(2, 0, 1)[None]  # (1, 3, H, W)
    return pixels if num_channels == 3 else pixels.mean(dim=1, keepdim=True).repeat(1, num_channels, 1, 1)


def default_image() -> tuple[Image.Image, str]:
    """The photo of scikit-learn where that is installed, else random pixels; and what it is."""
    if find_spec("sklearn") is not None:
        from sklearn.datasets import load_sample_image

        return Image.fromarray(load_sample_image("china.jpg")), "scikit-learn's photo china.jpg"
    pixels = torch.randint(256, (512, 512, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy()), "random pixels (scikit-learn, which has a photo, is not installed)"


def check_size(checkpoint: Checkpoint, size: tuple[int, int]) -> None:
    """
    Raises:
        ValueError: timm refuses images of this size, or they are too small for the network.
    """
    is_convnext = isinstance(checkpoint.config, DINOv3ConvNextConfig)
    unit = checkpoint.config.stride if is_convnext else checkpoint.config.patch_size
    if any(side < unit or (side % unit != 0 and not is_convnext) for side in size):
        nearest = "x".join(str(max(round(side / unit), 1) * unit) for side in size)
        raise ValueError(f"{size[0]}x{size[1]} pixels are no multiples of {unit}; use {nearest}.")


def _run(candidate: Candidate, images: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Outputs]:
    """Outputs for each of several inputs; the memory of the network is free again afterwards."""
    network = candidate.open(dtype)
    with torch.inference_mode():
        return {name: network(pixels.to(dtype)) for name, pixels in images.items()}


def _differences(reference: Outputs, found: Outputs, candidate: str) -> list[Difference]:
    shapes, others = ({name: tuple(output.shape) for name, output in each.items()} for each in (reference, found))
    if shapes != others:
        layer = next(name for name in shapes | others if shapes.get(name) != others.get(name))
        raise ValueError(
            f"{candidate} is of another architecture: {layer} has the outputs {others.get(layer, 'none')} instead of "
            f"{shapes.get(layer, 'none')}; compare checkpoints of one network."
        )
    return [_difference(name, output, found[name]) for name, output in reference.items()]


def _difference(layer: str, reference: Tensor, found: Tensor) -> Difference:
    largest = reference.abs().max().item()
    absolute = (found.double() - reference.double()).abs().max().item()
    relative = absolute / largest if largest > 0 else (0.0 if absolute == 0 else math.inf)
    return Difference(layer, largest, absolute, relative)


def _remove(path: Path) -> None:
    if path.is_dir():
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    else:
        path.unlink()
