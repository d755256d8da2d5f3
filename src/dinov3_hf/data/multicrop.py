"""Multi-crop views of an image: the geometric half of the augmentation, run in the data workers on uint8.

Letters: C channels; H, W height and width of the image; n local crops.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from dinov3_hf.data.decoding import OpenedImage, opened_pixels
from dinov3_hf.data.photometric import BLUR_RADIUS, Distortions

ASPECT_RANGE = (3 / 4, 4 / 3)
CROP_ATTEMPTS = 10
FLIP_PROBABILITY = 0.5


def check_crop_size(name: str, crop_size: int, patch_size: int) -> None:
    """Raise ValueError, naming the nearest sizes that work, unless `crop_size` is a multiple of `patch_size`."""
    if crop_size > 0 and crop_size % patch_size == 0:
        return
    below = crop_size // patch_size * patch_size
    above = max(below, 0) + patch_size
    nearest = f"{below} or {above}" if below > 0 else f"{above}"
    raise ValueError(f"{name} {crop_size} is not a multiple of patch_size {patch_size}; use {nearest}.")


class Window(NamedTuple):
    """A part of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int

    def reduced(self, reduction: int) -> "Window":
        """Return the window in the image that is `reduction` times smaller, its edges on the nearest pixels."""
        top, left, bottom, right = (
            (edge + reduction // 2) // reduction
            for edge in (self.top, self.left, self.top + self.height, self.left + self.width)
        )
        return Window(top, left, bottom - top, right - left)


def random_window(height: int, width: int, scale: tuple[float, float], rng: np.random.Generator) -> Window:
    """Draw a window of an image whose fraction of the image's area is uniform in `scale`.

    The rule of torchvision's `RandomResizedCrop`: log-uniform aspect ratio in [3/4, 4/3], ten attempts, then the
    largest centred window with an aspect ratio in that range.
    """
    log_low, log_high = math.log(ASPECT_RANGE[0]), math.log(ASPECT_RANGE[1])
    for _ in range(CROP_ATTEMPTS):
        area_draw, aspect_draw, top_draw, left_draw = rng.random(4).tolist()
        area = height * width * (scale[0] + (scale[1] - scale[0]) * area_draw)
        aspect = math.exp(log_low + (log_high - log_low) * aspect_draw)
        crop_height = round(math.sqrt(area / aspect))
        crop_width = round(math.sqrt(area * aspect))
        if 0 < crop_height <= height and 0 < crop_width <= width:
            top = int(top_draw * (height - crop_height + 1))
            left = int(left_draw * (width - crop_width + 1))
            return Window(top, left, crop_height, crop_width)
    crop_height = min(height, round(width / ASPECT_RANGE[0]))
    crop_width = min(width, round(height * ASPECT_RANGE[1]))
    return Window((height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width)


def sufficient_reduction(reductions: Sequence[int], windows: Sequence[Window], sizes: Sequence[int]) -> int:
    """Return the largest of `reductions` that leaves each window at least as large as its crop, or else 1."""
    for reduction in sorted(reductions, reverse=True):
        reduced = [window.reduced(reduction) for window in windows]
        if all(min(window.height, window.width) >= size for window, size in zip(reduced, sizes, strict=True)):
            return reduction
    return 1


def resize(images: Tensor, size: int) -> Tensor:
    """Resize uint8 `images` (N, C, H, W) to squares with bicubic interpolation and antialiasing."""
    return F.interpolate(images, (size, size), mode="bicubic", align_corners=False, antialias=True)


@dataclass(frozen=True)
class MultiCropViews:
    """Cut two global and `num_local_crops` local crops and draw the parameters of their photometric distortions.

    Args:
        global_crop_size: pixels of a side.
        local_crop_size: pixels of a side.
        num_local_crops: n; 0 is allowed.
        global_crop_scale: smallest and largest fraction of the image's area in a global crop.
        local_crop_scale: the same for a local crop.
        gram_crop_size: pixels of a side of the Gram teacher's crops; None for no such crops.
        horizontal_flip: flip each crop with probability 0.5.
        distortions: how colours, sharpness and tones are changed later, on the device.
    """

    global_crop_size: int
    local_crop_size: int
    num_local_crops: int = 8
    global_crop_scale: tuple[float, float] = (0.32, 1.0)
    local_crop_scale: tuple[float, float] = (0.05, 0.32)
    gram_crop_size: int | None = None
    horizontal_flip: bool = True
    distortions: Distortions = field(default_factory=Distortions)

    def __post_init__(self) -> None:
        if self.num_local_crops < 0:
            raise ValueError(f"num_local_crops {self.num_local_crops} is negative; use 0 for none.")
        sizes = {"global_crop_size": self.global_crop_size}
        if self.num_local_crops:
            sizes["local_crop_size"] = self.local_crop_size
        for name, size in sizes.items():
            if size <= BLUR_RADIUS:  # reflection at the border needs that many pixels
                raise ValueError(f"{name} {size} is too small to blur; use at least {BLUR_RADIUS + 1} pixels.")
        if self.gram_crop_size is not None and self.gram_crop_size < 1:
            raise ValueError(f"gram_crop_size {self.gram_crop_size} must be positive; use None for no Gram crops.")
        scales = {"global_crop_scale": self.global_crop_scale, "local_crop_scale": self.local_crop_scale}
        for name, (low, high) in scales.items():
            if not 0 < low <= high <= 1:
                raise ValueError(f"{name} ({low}, {high}) must be two increasing fractions in (0, 1].")

    def __call__(self, image: OpenedImage | Image.Image | np.ndarray, rng: np.random.Generator) -> dict[str, Any]:
        """Return the views of `image` (opened, PIL in mode RGB or L, or uint8 (H, W[, C])).

        - `global_crops`: uint8 (2, C, global_crop_size, global_crop_size)
        - `local_crops`: uint8 (n, C, local_crop_size, local_crop_size)
        - `global_photometric`, `local_photometric`: arrays with one row a crop (see `Distortions.draw`)
        - `gram_crops`: uint8 (2, C, gram_crop_size, gram_crop_size), if there are such crops: the windows and flips of
          the global crops, which the Gram teacher sees without distortions

        Everything is drawn before the image is decoded, at the smallest sufficient size.

        Raises:
            UnreadableImage: the image is corrupt or truncated.
        """
        opened = image if isinstance(image, OpenedImage) else opened_pixels(np.array(image))
        n = self.num_local_crops
        photometric = self.distortions.draw(n, rng)
        global_flips = self._draw_flips(2, rng)
        global_windows = [random_window(opened.height, opened.width, self.global_crop_scale, rng) for _ in range(2)]
        local_flips = self._draw_flips(n, rng)
        local_windows = [random_window(opened.height, opened.width, self.local_crop_scale, rng) for _ in range(n)]

        global_sizes = {"global_crops": self.global_crop_size}
        if self.gram_crop_size is not None:
            global_sizes["gram_crops"] = self.gram_crop_size
        sizes = [max(global_sizes.values())] * 2 + [self.local_crop_size] * n
        reduction = sufficient_reduction(opened.reductions, global_windows + local_windows, sizes)
        pixels = torch.from_numpy(opened.decode(reduction)).permute(2, 0, 1)  # (C, H, W), in memory channels-last
        return {
            **_cut(pixels, [window.reduced(reduction) for window in global_windows], global_flips, global_sizes),
            "global_photometric": {name: values[:2] for name, values in photometric.items()},
            **_cut(
                pixels,
                [window.reduced(reduction) for window in local_windows],
                local_flips,
                {"local_crops": self.local_crop_size},
            ),
            "local_photometric": {name: values[2:] for name, values in photometric.items()},
        }

    def _draw_flips(self, num_crops: int, rng: np.random.Generator) -> np.ndarray:
        return rng.random(num_crops) < FLIP_PROBABILITY if self.horizontal_flip else np.zeros(num_crops, dtype=bool)


def _cut(pixels: Tensor, windows: Sequence[Window], flips: np.ndarray, sizes: dict[str, int]) -> dict[str, Tensor]:
    """Cut `windows` from `pixels` (C, H, W): by each name in `sizes` crops uint8 (len(windows), C, size, size).

    A window is resized to the largest size, and what comes out of that to the others.
    """
    largest = max(sizes.values())
    crops = {
        name: torch.empty(len(windows), len(pixels), size, size, dtype=torch.uint8) for name, size in sizes.items()
    }
    for i, (top, left, height, width) in enumerate(windows):
        window = pixels[None, :, top : top + height, left : left + width]
        # A channels-last copy: the vector code for 8-bit pixels is half as fast on a part of a larger image.
        crop = resize(window.contiguous(memory_format=torch.channels_last), largest)  # (1, C, largest, largest)
        for name, size in sizes.items():
            resized = crop if size == largest else resize(crop, size)
            crops[name][i] = resized[0].flip(-1) if flips[i] else resized[0]
    return crops
