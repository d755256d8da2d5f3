"""Multi-crop views of an image: the geometric half of the augmentation, run in the data workers on uint8.

Letters: C channels; H, W height and width of the image; n local crops.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

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


def random_crop_box(
    height: int, width: int, scale: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Draw (top, left, height, width) of a window whose fraction of the image's area is uniform in `scale`.

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
            return top, left, crop_height, crop_width
    crop_height = min(height, round(width / ASPECT_RANGE[0]))
    crop_width = min(width, round(height * ASPECT_RANGE[1]))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def image_tensor(image: Image.Image | np.ndarray) -> Tensor:
    """Return a picture, PIL or uint8 (H, W[, C]), as a uint8 (C, H, W) tensor whose memory stays channels-last."""
    pixels = np.array(image) if isinstance(image, Image.Image) else np.ascontiguousarray(image)
    if pixels.dtype != np.uint8:
        raise ValueError(f"an image must have uint8 pixels, not {pixels.dtype}; convert it to RGB or L first.")
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    return torch.from_numpy(pixels).permute(2, 0, 1)


@dataclass(frozen=True)
class MultiCropViews:
    """Cut two global and `num_local_crops` local crops and draw the parameters of their photometric distortions.

    Args:
        global_crop_size: pixels of a side.
        local_crop_size: pixels of a side.
        num_local_crops: n; 0 is allowed.
        global_crop_scale: smallest and largest fraction of the image's area in a global crop.
        local_crop_scale: the same for a local crop.
        horizontal_flip: flip each crop with probability 0.5.
        distortions: how colours, sharpness and tones are changed later, on the device.
    """

    global_crop_size: int
    local_crop_size: int
    num_local_crops: int = 8
    global_crop_scale: tuple[float, float] = (0.32, 1.0)
    local_crop_scale: tuple[float, float] = (0.05, 0.32)
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
        scales = {"global_crop_scale": self.global_crop_scale, "local_crop_scale": self.local_crop_scale}
        for name, (low, high) in scales.items():
            if not 0 < low <= high <= 1:
                raise ValueError(f"{name} ({low}, {high}) must be two increasing fractions in (0, 1].")

    def __call__(self, image: Image.Image | np.ndarray, rng: np.random.Generator) -> dict[str, Any]:
        """Return the views of `image` (PIL, or uint8 (H, W[, C])).

        - `global_crops`: uint8 (2, C, global_crop_size, global_crop_size)
        - `local_crops`: uint8 (n, C, local_crop_size, local_crop_size)
        - `global_photometric`, `local_photometric`: arrays with one row a crop (see `Distortions.draw`)
        """
        pixels = image_tensor(image)  # (C, H, W)
        n = self.num_local_crops
        photometric = self.distortions.draw(n, rng)
        return {
            "global_crops": self._crops(pixels, 2, self.global_crop_size, self.global_crop_scale, rng),
            "global_photometric": {name: values[:2] for name, values in photometric.items()},
            "local_crops": self._crops(pixels, n, self.local_crop_size, self.local_crop_scale, rng),
            "local_photometric": {name: values[2:] for name, values in photometric.items()},
        }

    def _crops(
        self, pixels: Tensor, num_crops: int, size: int, scale: tuple[float, float], rng: np.random.Generator
    ) -> Tensor:
        channels, height, width = pixels.shape
        crops = np.empty((num_crops, channels, size, size), dtype=np.uint8)
        flipped = rng.random(num_crops) < FLIP_PROBABILITY if self.horizontal_flip else np.zeros(num_crops, dtype=bool)
        for i in range(num_crops):
            top, left, crop_height, crop_width = random_crop_box(height, width, scale, rng)
            window = pixels[None, :, top : top + crop_height, left : left + crop_width]
            crop = F.interpolate(window, (size, size), mode="bicubic", align_corners=False, antialias=True)[0].numpy()
            crops[i] = crop[:, :, ::-1] if flipped[i] else crop
        return torch.from_numpy(crops)
