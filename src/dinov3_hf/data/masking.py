"""Masks of the iBOT objective: how many patches each crop of a global batch loses, and which ones.

Letters: B images in the global batch; P = grid height x grid width patches in a crop; e in [0, 2B) an entry of the
crop-major list (first crops of all images, then second crops).
"""

import math

import numpy as np
import torch
from torch import Tensor

from dinov3_hf.data.seeding import Stream, random_generator

# Blocks as in BEiT (https://arxiv.org/abs/2106.08254, algorithm 1), whose smallest block is 16 patches of 14 x 14.
MIN_BLOCK_AREA = 4
MIN_BLOCK_ASPECT = 0.3
BLOCK_ATTEMPTS = 10


def mask_counts(num_crops: int, num_patches: int, probability: float, ratio_range: tuple[float, float]) -> np.ndarray:
    """Return the numbers of masked patches of `num_crops` crops, ascending: int64 (num_crops,).

    `int(num_crops * probability)` crops are masked. Their ratios are spread evenly over `ratio_range`: of as many
    equal bins, each crop takes the upper edge of one. The set is the same in every step; which crop has which count
    is not.
    """
    num_masked_crops = int(num_crops * probability)
    counts = np.zeros(num_crops, dtype=np.int64)
    # float32 edges and a float32 product, truncated: in float64 some counts would come out one larger or smaller.
    edges = torch.linspace(*ratio_range, num_masked_crops + 1, dtype=torch.float32)
    counts[num_crops - num_masked_crops :] = (num_patches * edges[1:]).long().numpy()
    return counts


def block_mask(grid_height: int, grid_width: int, num_masked: int, rng: np.random.Generator) -> np.ndarray:
    """Return a mask bool (grid_height, grid_width) with exactly `num_masked` True entries, most of them in blocks.

    Rectangular blocks are placed until one fails to add a patch; single patches at random make up the rest.
    """
    num_patches = grid_height * grid_width
    if not 0 <= num_masked <= num_patches:
        raise ValueError(f"cannot mask {num_masked} patches of a {grid_height} x {grid_width} grid.")
    mask = np.zeros((grid_height, grid_width), dtype=bool)
    remaining = num_masked
    while remaining > 0:
        num_added = _add_block(mask, min(remaining, num_patches / 2), rng)
        if num_added == 0:
            break
        remaining -= num_added
    if remaining > 0:
        free = np.flatnonzero(~mask)
        mask.flat[rng.choice(free, remaining, replace=False)] = True
    return mask


def _add_block(mask: np.ndarray, max_area: float, rng: np.random.Generator) -> int:
    """Mask one random rectangle that adds 1 to `max_area` patches; return how many it added, 0 if none was found."""
    grid_height, grid_width = mask.shape
    draws = rng.random((BLOCK_ATTEMPTS, 4)).tolist()
    for area_draw, aspect_draw, top_draw, left_draw in draws:
        # With less than MIN_BLOCK_AREA left to mask, the interval is [max_area, MIN_BLOCK_AREA].
        area = MIN_BLOCK_AREA + (max_area - MIN_BLOCK_AREA) * area_draw
        aspect = MIN_BLOCK_ASPECT ** (1 - 2 * aspect_draw)  # log-uniform in [0.3, 1 / 0.3]
        height = round(math.sqrt(area * aspect))
        width = round(math.sqrt(area / aspect))
        if height >= grid_height or width >= grid_width:
            continue
        top = int(top_draw * (grid_height - height + 1))
        left = int(left_draw * (grid_width - width + 1))
        window = mask[top : top + height, left : left + width]
        num_new = height * width - int(np.count_nonzero(window))
        if 0 < num_new <= max_area:
            window[:] = True
            return num_new
    return 0


class MaskSampler:
    """The two masks of every sample of a run.

    Args:
        grid: patches along height and width of a global crop; one number for a square.
        probability: fraction of the 2B global crops that are masked.
        ratio_range: smallest and largest fraction of masked patches (see `mask_counts`).
        circular_shift: roll each mask by a uniform offset along both axes, so that the centre is not favoured.
        batch_size: images in the global batch (B), over all ranks and accumulation steps.
        seed: of the run.
    """

    def __init__(
        self,
        grid: int | tuple[int, int],
        *,
        probability: float = 0.5,
        ratio_range: tuple[float, float] = (0.1, 0.5),
        circular_shift: bool = False,
        batch_size: int,
        seed: int,
    ):
        if not 0 <= probability <= 1:
            raise ValueError(f"mask probability {probability} must be in [0, 1].")
        if not 0 <= ratio_range[0] <= ratio_range[1] <= 1:
            raise ValueError(f"mask ratio range {ratio_range} must be two increasing fractions in [0, 1].")
        self.grid_height, self.grid_width = (grid, grid) if isinstance(grid, int) else grid
        self.circular_shift = circular_shift
        self.batch_size = batch_size
        self.seed = seed
        num_patches = self.grid_height * self.grid_width
        self.counts = mask_counts(2 * batch_size, num_patches, probability, ratio_range)  # (2B,)
        self._step = -1
        self._step_counts = self.counts

    def __call__(self, position: int) -> Tensor:
        """Return the masks of both global crops of the sample at `position` of the run: bool (2, P)."""
        step, image = divmod(position, self.batch_size)
        masks = [self._mask(step, crop * self.batch_size + image) for crop in range(2)]
        return torch.from_numpy(np.stack(masks)).flatten(1)

    def _mask(self, step: int, entry: int) -> np.ndarray:
        if step != self._step:  # consecutive samples share their step
            self._step = step
            self._step_counts = random_generator(self.seed, Stream.MASK_COUNTS, step).permutation(self.counts)
        rng = random_generator(self.seed, Stream.MASKS, step, entry)
        mask = block_mask(self.grid_height, self.grid_width, int(self._step_counts[entry]), rng)
        if self.circular_shift:
            mask = np.roll(mask, (rng.integers(self.grid_height), rng.integers(self.grid_width)), axis=(0, 1))
        return mask
