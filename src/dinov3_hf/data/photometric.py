"""Photometric distortions of crops, batched on the training device with parameters of each crop's own.

Parameters are drawn in the data workers (`Distortions.draw`) and stay numpy arrays on the host: which crops an
operation touches is then known without waiting for the device. Every operation follows torchvision's function for
float images.

Letters: N crops; C channels; H, W pixels; R rows, the crops that one operation touches.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

BLUR_RADIUS = 4  # kernel of 9 pixels
BLUR_SIGMA_RANGE = (0.1, 2.0)
SOLARIZE_THRESHOLD = 128 / 255

# On a CPU a few crops go through all operations while they are in the cache; other devices want few large kernels.
CPU_CHUNK_ELEMENTS = 2**18
DEVICE_CHUNK_ELEMENTS = 2**26


@dataclass(frozen=True)
class Distortions:
    """How often and how strongly crops are distorted; the defaults are the published ones.

    Args:
        jitter: largest change of brightness, contrast and saturation (factor in [1 - m, 1 + m]) and of hue (turns in
            [-m, m]).
        jitter_probability: share of the crops whose colours change.
        greyscale_probability: share of the crops turned grey.
        blur_probabilities: share of blurred crops: first global, second global, local.
        solarize_probability: share of the second global crops that are solarized.
    """

    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    jitter_probability: float = 0.8
    greyscale_probability: float = 0.2
    blur_probabilities: tuple[float, float, float] = (0.0, 0.9, 0.5)
    solarize_probability: float = 0.2

    def draw(self, num_local_crops: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Draw the parameters of the two global crops and `num_local_crops` local ones, N together.

        - `jitter` bool (N,): whether brightness, contrast, saturation and hue change
        - `jitter_order` int64 (N, 4): 0 brightness, 1 contrast, 2 saturation, 3 hue, in the order of their turn
        - `jitter_factor` float32 (N, 4): factors of brightness, contrast, saturation; turns of hue
        - `greyscale` bool (N,)
        - `blur_sigma` float32 (N,): pixels; 0 leaves the crop sharp
        - `solarize` bool (N,)
        """
        n = 2 + num_local_crops
        first, second, local = self.blur_probabilities
        blur = rng.random(n) < np.array([first, second] + [local] * num_local_crops)
        centre, reach = np.array([1.0, 1.0, 1.0, 0.0]), np.array(self.jitter)
        return {
            "jitter": rng.random(n) < self.jitter_probability,
            "jitter_order": rng.permuted(np.tile(np.arange(4), (n, 1)), axis=1),
            "jitter_factor": rng.uniform(centre - reach, centre + reach, (n, 4)).astype(np.float32),
            "greyscale": rng.random(n) < self.greyscale_probability,
            "blur_sigma": np.where(blur, rng.uniform(*BLUR_SIGMA_RANGE, n), 0).astype(np.float32),
            "solarize": (rng.random(n) < self.solarize_probability) & (np.arange(n) == 1),
        }


def greyscale(images: Tensor) -> Tensor:
    """Return the luma (ITU-R 601) of `images` (R, 3, H, W), or the mean over channels of others: (R, 1, H, W)."""
    if images.shape[1] != 3:
        return images.mean(1, keepdim=True)
    luma = images[:, 0:1] * 0.2989
    return luma.add_(images[:, 1:2], alpha=0.587).add_(images[:, 2:3], alpha=0.114)


def remove_colour(images: Tensor) -> Tensor:
    """Give `images` (R, 3, H, W) their luma in all channels."""
    return greyscale(images).repeat(1, 3, 1, 1)


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Scale `images` (R, C, H, W) in [0, 1] by `factor` (R,)."""
    return (images * factor[:, None, None, None]).clamp_(0, 1)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Scale the distance of `images` (R, C, H, W) in [0, 1] from the mean of their luma by `factor` (R,)."""
    return _scale_distance(images, greyscale(images).mean((1, 2, 3), keepdim=True), factor)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Scale the distance of `images` (R, 3, H, W) in [0, 1] from their luma by `factor` (R,)."""
    return _scale_distance(images, greyscale(images), factor)


def _scale_distance(images: Tensor, origin: Tensor, factor: Tensor) -> Tensor:
    factor = factor[:, None, None, None]
    return (images * factor).add_(origin * (1 - factor)).clamp_(0, 1)


def adjust_hue(images: Tensor, turns: Tensor) -> Tensor:
    """Turn the hue of `images` (R, 3, H, W) in [0, 1] by `turns` (R,) of the colour circle, keeping HSV's S and V."""
    red, green, blue = images.unbind(1)  # each (R, H, W)
    low, value = images.amin(1), images.amax(1)
    chroma = value - low
    # Which channel is the largest, as 0.0 or 1.0: on a CPU arithmetic with them is far faster than `torch.where`.
    is_red = torch.eq(red, value, out=torch.empty_like(value))
    is_green = torch.eq(green, value, out=torch.empty_like(value)).mul_(1 - is_red)
    is_blue = (1 - is_red).sub_(is_green)
    # Hue in sixths of a turn: red 0, green 2, blue 4; grey has none, its numerator is 0.
    hue = (green - blue).mul_(is_red).addcmul_(blue - red, is_green).addcmul_(red - green, is_blue)
    hue.div_(chroma.clamp(min=1e-12)).add_(is_green, alpha=2).add_(is_blue, alpha=4)
    hue.div_(6).add_(turns[:, None, None])
    hue.sub_(hue.floor()).mul_(6)  # [0, 6]
    # A channel is a trapezium over the circle: 1 within one sixth of its own hue, falling to 0 at two sixths.
    turned = torch.empty_like(images)
    torch.sub(hue, 3, out=turned[:, 0]).abs_().sub_(1)
    torch.sub(hue, 2, out=turned[:, 1]).abs_().neg_().add_(2)
    torch.sub(hue, 4, out=turned[:, 2]).abs_().neg_().add_(2)
    return turned.clamp_(0, 1).mul_(chroma[:, None]).add_(low[:, None])


def gaussian_blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Blur `images` (R, C, H, W), sides above 4, with a 9 x 9 Gaussian of standard deviation `sigma` (R,) pixels."""
    offsets = torch.arange(-BLUR_RADIUS, BLUR_RADIUS + 1, device=images.device)
    weights = torch.exp(-0.5 * (offsets / sigma[:, None]) ** 2)  # (R, 9)
    weights = weights / weights.sum(1, keepdim=True)
    padded = F.pad(images, (BLUR_RADIUS,) * 4, mode="reflect")
    return _blur_axis(_blur_axis(padded, weights, 3), weights, 2)


def _blur_axis(padded: Tensor, weights: Tensor, dim: int) -> Tensor:
    # A sum of shifted copies: several times faster than a convolution with one group for each crop and channel.
    length = padded.shape[dim] - 2 * BLUR_RADIUS
    weights = weights[:, :, None, None, None]  # (R, 9, 1, 1, 1)
    blurred = padded.narrow(dim, 0, length) * weights[:, 0]
    for k in range(1, 2 * BLUR_RADIUS + 1):
        blurred.addcmul_(padded.narrow(dim, k, length), weights[:, k])
    return blurred


def solarize(images: Tensor) -> Tensor:
    """Invert the values of `images` (R, C, H, W) in [0, 1] that are at least 128 / 255."""
    inverted = torch.ge(images, SOLARIZE_THRESHOLD, out=torch.empty_like(images))  # 0.0 or 1.0
    return (images - inverted).abs_()


class Photometric(nn.Module):
    """Distort and normalise a batch of crops: jitter, greyscale, blur, solarization, then `(x - mean) / std`.

    Saturation, hue and greyscale are left out unless the crops have three channels.

    Args:
        mean: of each channel, for values in [0, 1].
        std: of each channel.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)  # (C, 1, 1)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)  # (C, 1, 1)

    @torch.no_grad()
    def forward(self, crops: Tensor, parameters: dict[str, np.ndarray] | None = None) -> Tensor:
        """Return uint8 `crops` (N, C, H, W), distorted by `parameters` (see `Distortions.draw`), as float32.

        Without `parameters`, as for the Gram teacher's crops, they are normalised only.
        """
        normalized = torch.empty(crops.shape, dtype=torch.float32, device=crops.device)
        limit = CPU_CHUNK_ELEMENTS if crops.device.type == "cpu" else DEVICE_CHUNK_ELEMENTS
        chunk_size = max(1, limit // max(1, math.prod(crops.shape[1:])))
        for start in range(0, len(crops), chunk_size):
            rows = slice(start, start + chunk_size)
            images = crops[rows].to(torch.float32).div_(255)
            if parameters is not None:
                images = self._distort(images, {name: values[rows] for name, values in parameters.items()})
            torch.sub(images, self.mean, out=normalized[rows]).div_(self.std)
        return normalized

    def _distort(self, images: Tensor, parameters: dict[str, np.ndarray]) -> Tensor:
        colour = images.shape[1] == 3
        adjustments = [adjust_brightness, adjust_contrast, *([adjust_saturation, adjust_hue] if colour else [])]
        for turn in range(4):
            operation = np.where(parameters["jitter"], parameters["jitter_order"][:, turn], -1)
            for i, adjust in enumerate(adjustments):
                images = _apply(adjust, images, operation == i, parameters["jitter_factor"][:, i])
        if colour:
            images = _apply(remove_colour, images, parameters["greyscale"])
        images = _apply(gaussian_blur, images, parameters["blur_sigma"] > 0, parameters["blur_sigma"])
        return _apply(solarize, images, parameters["solarize"])


def _apply(function: Callable[..., Tensor], images: Tensor, selected: np.ndarray, *arguments: np.ndarray) -> Tensor:
    """Replace the `selected` rows of `images` by `function(rows, *rows of arguments)`."""
    rows = np.flatnonzero(selected)
    if len(rows) == 0:
        return images
    values = [_to_device(argument[rows], images.device) for argument in arguments]
    if len(rows) == len(images):
        return function(images, *values)
    index = _to_device(rows, images.device)
    return images.index_copy_(0, index, function(images.index_select(0, index), *values))


def _to_device(array: np.ndarray, device: torch.device) -> Tensor:
    # CUDA stages such a copy at once, so the host goes on; elsewhere the source must outlive the copy.
    return torch.from_numpy(array).to(device, non_blocking=device.type == "cuda")
