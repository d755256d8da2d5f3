"""Axial rotary position embedding: periods, coordinates, tables.

Legend: h x w patch grid, P = h * w patches, d head width, M tables (one a block, or one for all blocks).
The angle of a patch at coordinate c on one axis is 2 pi c / period; a table row is all d/4 angles of the row axis,
then all d/4 of the column axis, and this d/2 vector twice, because the first half of a head is paired with the second.
Nothing here is a buffer: a table is computed from numbers when it is needed, so neither loading nor `model.to(dtype)`
can spoil it.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from dinov3_hf.models.dinov3_vit.configuration_dinov3_vit import DINOv3ViTConfig

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class RopeParameters(NamedTuple):
    """What a table depends on, beside the grid; hashable."""

    head_dim: int
    theta: float | None
    min_period: float | None
    max_period: float | None
    normalize_coords: str
    dtype: torch.dtype
    periods_dtype: torch.dtype = torch.float32

    @classmethod
    def from_config(cls, config: DINOv3ViTConfig) -> "RopeParameters":
        return cls(
            config.head_dim,
            config.rope_theta,
            config.rope_min_period,
            config.rope_max_period,
            config.rope_normalize_coords,
            _DTYPES[config.rope_dtype],
            _DTYPES[config.rope_periods_dtype],
        )


class RopeDraws(NamedTuple):
    """Uniform draws that augment the coordinates of one crop group; `None` where the augmentation is off."""

    shift: Tensor | None = None  # (M, 2) float32 in [-s, s]: rows, columns
    jitter: Tensor | None = None  # (M, 2) float32, logarithm of the factors of rows and columns
    rescale: Tensor | None = None  # (M, 1) float32, logarithm of the factor of both axes


def draw_bounds(config: DINOv3ViTConfig) -> dict[str, tuple[float, int]]:
    """For each field of `RopeDraws` that the configuration asks for: b of its interval [-b, b], numbers a table."""
    shift, jitter, rescale = config.pos_embed_shift, config.pos_embed_jitter, config.pos_embed_rescale
    bounds = {
        "shift": None if shift is None else (shift, 2),
        "jitter": None if jitter is None else (math.log(jitter), 2),
        "rescale": None if rescale is None else (math.log(rescale), 1),
    }
    return {name: bound for name, bound in bounds.items() if bound is not None}


def num_drawn_tables(config: DINOv3ViTConfig) -> int:
    """M, the tables of a crop group under augmentation."""
    return config.num_hidden_layers if config.rope_augmentation_per_block else 1


def rope_periods(parameters: RopeParameters, device: torch.device | None = None) -> Tensor:
    """Periods in the RoPE dtype, (d/4,): `theta^(2k / (d/2))`, or geometric from the minimal to the maximal period.

    They are computed in the coarser of the RoPE dtype and the dtype of the periods.
    """
    count = parameters.head_dim // 4
    dtype = torch.bfloat16 if torch.bfloat16 in (parameters.dtype, parameters.periods_dtype) else torch.float32
    if parameters.theta is not None:
        exponents = 2 * torch.arange(count, dtype=dtype, device=device) / (2 * count)  # (d/4,)
        return (parameters.theta**exponents).to(parameters.dtype)
    assert parameters.min_period is not None and parameters.max_period is not None  # checked by the configuration
    exponents = torch.linspace(0, 1, count, dtype=dtype, device=device)  # (d/4,)
    periods = parameters.min_period * (parameters.max_period / parameters.min_period) ** exponents
    return periods.to(parameters.dtype)


def patch_coordinates(
    grid: tuple[int, int], normalize_coords: str, dtype: torch.dtype, device: torch.device | None = None
) -> Tensor:
    """Centres of the patches in [-1, 1] as (row, column), (P, 2), patches row-major.

    `separate` divides each axis by its own length, `max` and `min` both by the longer or shorter side.
    """
    height, width = grid
    divisor_h, divisor_w = {
        "separate": (height, width),
        "max": (max(grid), max(grid)),
        "min": (min(grid), min(grid)),
    }[normalize_coords]
    rows = torch.arange(0.5, height, dtype=dtype, device=device) / divisor_h  # (h,)
    columns = torch.arange(0.5, width, dtype=dtype, device=device) / divisor_w  # (w,)
    coordinates = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1)  # (h, w, 2)
    return 2.0 * coordinates.flatten(0, 1) - 1.0  # (P, 2)


def rope_tables(
    parameters: RopeParameters,
    grid: tuple[int, int],
    draws: RopeDraws | None = None,
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    """
    Cosine and sine of every patch's angles.

    Args:
        parameters: What the model's configuration says of RoPE.
        grid: Rows and columns of patches.
        draws: Augmentation, applied in the order shift, jitter, rescale; `None` is no augmentation and M = 1.
        device: Where to compute.

    Returns:
        Two tensors (M, P, d) in the RoPE dtype, whatever autocast does.
    """
    dtype = parameters.dtype
    with _without_autocast(device):
        coordinates = patch_coordinates(grid, parameters.normalize_coords, dtype, device)[None]  # (1, P, 2)
        if draws is not None:
            if draws.shift is not None:
                coordinates = coordinates + draws.shift.to(dtype)[:, None]  # (M, P, 2)
            if draws.jitter is not None:
                coordinates = coordinates * draws.jitter.to(dtype).exp()[:, None]  # (M, P, 2)
            if draws.rescale is not None:
                coordinates = coordinates * draws.rescale.to(dtype).exp()[:, None]  # (M, P, 2)
        angles = 2 * math.pi * coordinates[..., None] / rope_periods(parameters, device)  # (M, P, 2, d/4)
        angles = angles.flatten(2).tile(2)  # (M, P, d)
        return angles.cos(), angles.sin()


def rotation_tables(
    parameters: RopeParameters,
    grid: tuple[int, int],
    num_prefix_tokens: int,
    draws: RopeDraws | None,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """
    The tables as `rotate` takes them, (M, N, 1, 1, d): prefix tokens have cosine 1 and sine 0, so that one expression
    turns all tokens, and the sine of the first half of a head carries the minus of "rotate half".
    """
    if draws is None and not torch.compiler.is_compiling():
        return _cached_rotation_tables(parameters, grid, num_prefix_tokens, device)
    return _rotation_tables(parameters, grid, num_prefix_tokens, draws, device)


def rotate(tokens: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """
    Turn queries and keys.

    Args:
        tokens: (B, N, 2, A, d) queries and keys, in any dtype; they are rotated in the tables' dtype and cast back.
        cos, sin: (N, 1, 1, d) one table of `rotation_tables`.
    """
    # The cast stands before the split, so that gradients too add up in the tables' dtype, as in the original. Not
    # addcmul, for the same reason: each product is rounded to that dtype, which a bfloat16 table shows.
    working = tokens.to(cos.dtype)
    first, second = working.chunk(2, dim=-1)  # 2 x (B, N, 2, A, d/2)
    swapped = torch.cat((second, first), dim=-1)  # (B, N, 2, A, d)
    return (working * cos).add_(swapped.mul_(sin)).to(tokens.dtype)


def _rotation_tables(
    parameters: RopeParameters,
    grid: tuple[int, int],
    num_prefix_tokens: int,
    draws: RopeDraws | None,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    cos, sin = rope_tables(parameters, grid, draws, device)  # (M, P, d)
    first, second = sin.chunk(2, dim=-1)  # 2 x (M, P, d/2)
    sin = torch.cat((-first, second), dim=-1)  # (M, P, d)
    prefix = (cos.shape[0], num_prefix_tokens, parameters.head_dim)
    cos = torch.cat((cos.new_ones(prefix), cos), dim=1)  # (M, N, d)
    sin = torch.cat((sin.new_zeros(prefix), sin), dim=1)  # (M, N, d)
    return cos[:, :, None, None], sin[:, :, None, None]


@lru_cache(maxsize=64)
def _cached_rotation_tables(
    parameters: RopeParameters, grid: tuple[int, int], num_prefix_tokens: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    # A tensor born in inference mode could not serve a later forward that needs gradients.
    with torch.inference_mode(False):
        return _rotation_tables(parameters, grid, num_prefix_tokens, None, device)


def _without_autocast(device: torch.device | None) -> AbstractContextManager[object]:
    device_type = "cpu" if device is None else device.type
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
