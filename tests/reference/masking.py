"""Kind collate, and JSON files with statistics of block masks."""

import math
from collections import Counter
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from dinov3_hf.data import masking
from dinov3_hf.data.collators import collate_views, subset_batch

from .compare import Comparison
from .io import Case

# Crops of the recorded batch are filled with 100 * (first number + index of the crop) + index of the image.
FIRST_CROP_NUMBER = {"global_crops": 0, "local_crops": 10, "gram_teacher_crops": 50}
# Differences of sampled statistics are compared with this many standard errors; over some hundred comparisons the
# chance of one false alarm is about 1e-4 (and the seed is fixed).
STANDARD_ERRORS = 5.0


def check_collate(case: Case, compare: Comparison) -> None:
    """Our collation of the recorded masks and crops is exact; of our own masks, the counts are."""
    config = case.config
    grid = _sides(config["grid"])
    batch_size, num_patches = config["batch_size"], math.prod(grid)
    num_crops = {"global_crops": 2, "local_crops": config["n_local"], "gram_teacher_crops": 2 if config["gram"] else 0}
    masks = case.outputs["collated_masks"].unflatten(0, (2, batch_size))  # (2, B, P)
    samples = [
        {
            **{
                name: _numbered(FIRST_CROP_NUMBER[name], count, image, case.outputs[f"collated_{name}"].shape[1:])
                for name, count in num_crops.items()
                if count
            },
            "mask": masks[:, image],
            "image": image,
        }
        for image in range(batch_size)
    ]
    probability, ratio_range = config["mask_probability"], tuple(config["mask_ratio_min_max"])
    counts = masking.mask_counts(2 * batch_size, num_patches, probability, ratio_range)
    batch = collate_views(samples)
    for name, value in _native(batch, int(counts.sum())).items():
        compare.check(name, value)
    compare.check("masked_count_per_sample", batch["mask"].sum(dim=1))
    if "subset_divide_by" in config:
        subset = subset_batch(batch, config["subset_divide_by"])
        for name, value in _native(subset, int(counts.sum())).items():
            compare.check(f"subset/{name}", value)

    sampler = masking.MaskSampler(
        grid,
        probability=probability,
        ratio_range=ratio_range,
        circular_shift=config["random_circular_shift"],
        batch_size=batch_size,
        seed=config["seed"],
    )
    drawn = torch.stack([sampler(position) for position in range(batch_size)])  # (B, 2, P)
    compare.check("sorted_masked_counts", drawn.sum(dim=-1).flatten().sort().values)


def _sides(grid: int | list[int]) -> tuple[int, int]:
    return (grid, grid) if isinstance(grid, int) else tuple(grid)


def _numbered(first: int, count: int, image: int, shape: torch.Size) -> Tensor:
    numbers = 100.0 * (first + torch.arange(count)) + image  # (crops,)
    return numbers[:, None, None, None].expand(-1, *shape)


def _native(batch: dict[str, Tensor], upperbound: int) -> dict[str, Tensor]:
    """Native names of a batch's entries."""
    crops = {f"collated_{name}": batch[name] for name in FIRST_CROP_NUMBER if name in batch}
    return crops | {
        "collated_masks": batch["mask"],
        "mask_indices_list": batch["mask_indices"],
        "masks_weight": batch["mask_weight"],
        "n_masked_patches": torch.tensor([len(batch["mask_indices"])]),
        "upperbound": torch.tensor(upperbound),
    }


def is_mask_statistics(content: Any) -> bool:
    """Whether a JSON file holds statistics of masks for several grids and numbers of masked patches."""
    return isinstance(content, dict) and all("per_count" in case for case in content.get("cases", [{}]))


def check_mask_statistics(content: dict[str, Any], compare: Comparison) -> None:
    """As many masks as were recorded; every statistic within the sampling error."""
    for case in content["cases"]:
        grid = _sides(case["grid"])
        label = f"grid_{grid[0]}x{grid[1]}"
        log_aspect = math.log(masking.MIN_BLOCK_ASPECT) * np.array([1, -1])
        compare.check_pair(f"{label}/log_aspect_ratio", log_aspect, torch.tensor(case["log_aspect_ratio"]), rtol=1e-6)
        compare.check_pair(f"{label}/min_num_patches", masking.MIN_BLOCK_AREA, case["min_num_patches"])
        compare.check_pair(f"{label}/max_num_patches", math.prod(grid) / 2, case["max_num_patches"])
        for index, recorded in enumerate(case["per_count"]):
            rng = np.random.default_rng((*grid, index))
            masks = _Masks(grid, recorded["requested"], case["draws_per_count"], rng)
            masks.compare(compare, f"{label}/requested_{recorded['requested']}", recorded)


class _Masks:
    """Masks drawn one by one, with what each block added."""

    def __init__(self, grid: tuple[int, int], requested: int, num_draws: int, rng: np.random.Generator) -> None:
        self.masks = np.zeros((num_draws, *grid), dtype=bool)
        self.num_calls = np.zeros(num_draws)
        self.num_random = np.zeros(num_draws)
        self.new_patches: list[int] = []  # of every block that added some
        self.boxes: Counter[tuple[int, int]] = Counter()  # height, width of the bounding boxes of new patches
        add_block = masking._add_block
        for draw in range(num_draws):

            def watched(mask: np.ndarray, *arguments: Any, draw: int = draw) -> int:
                before = mask.copy()
                added = add_block(mask, *arguments)
                self._count_block(draw, mask & ~before)
                return added

            with mock.patch.object(masking, "_add_block", watched):
                self.num_random[draw] = requested
                self.masks[draw] = masking.block_mask(*grid, requested, rng)

    def _count_block(self, draw: int, new: np.ndarray) -> None:
        self.num_calls[draw] += 1
        rows, columns = new.nonzero()
        if len(rows) > 0:
            self.num_random[draw] -= len(rows)
            self.new_patches.append(len(rows))
            self.boxes[int(np.ptp(rows)) + 1, int(np.ptp(columns)) + 1] += 1

    def compare(self, compare: Comparison, label: str, recorded: dict[str, Any]) -> None:
        counts = self.masks.sum(axis=(1, 2))
        compare.check_pair(f"{label}/min_count", counts.min(), recorded["min_count"])
        compare.check_pair(f"{label}/max_count", counts.max(), recorded["max_count"])

        vertical = self.masks[:, 1:] == self.masks[:, :-1]
        horizontal = self.masks[:, :, 1:] == self.masks[:, :, :-1]
        agreement = (vertical.mean(axis=(1, 2)) + horizontal.mean(axis=(1, 2))) / 2
        row, column = (side // 2 for side in self.masks.shape[1:])
        centre = self.masks[:, row - 1 : row + 2, column - 1 : column + 2].mean(axis=(1, 2))
        corners = self.masks[:, [0, 0, -1, -1], [0, -1, 0, -1]].mean(axis=1)
        recorded_centre, recorded_corner = recorded["mask_probability_centre_3x3_vs_corner"]
        for name, values, expected in (
            ("mean_block_calls", self.num_calls, recorded["mean_block_calls"]),
            ("mean_randomly_added", self.num_random, recorded["mean_randomly_added"]),
            ("mean_neighbour_agreement", agreement, recorded["mean_neighbour_agreement"]),
            ("mean_new_patches_per_block", np.array(self.new_patches), recorded["mean_new_patches_per_block"]),
            ("mask_probability_centre_3x3", centre, recorded_centre),
            ("mask_probability_corner", corners, recorded_corner),
        ):
            _compare_mean(compare, f"{label}/{name}", values, expected)
        for box in recorded["block_bounding_box_top"]:
            hits = np.zeros(len(self.new_patches))
            hits[: self.boxes[box["h"], box["w"]]] = 1
            _compare_mean(compare, f"{label}/block_{box['h']}x{box['w']}", hits, box["frac"])
        # The share of values below a quantile has a standard error too.
        half_width = STANDARD_ERRORS * np.sqrt(2 * 0.95 * 0.05 / len(self.masks))
        low, high = np.quantile(self.num_random, [0.95 - half_width, min(0.95 + half_width, 1)])
        expected = recorded["p95_randomly_added"]
        compare.check_pair(f"{label}/p95_randomly_added", np.clip(expected, low, high), expected)


def _compare_mean(compare: Comparison, name: str, values: np.ndarray, expected: float) -> None:
    """The mean of our draws and one recorded from as many draws."""
    if len(values) == 0:
        compare.check_pair(name, 0.0, expected)
        return
    standard_error = values.std() * np.sqrt(2 / len(values))
    compare.check_pair(name, float(values.mean()), float(expected), atol=STANDARD_ERRORS * float(standard_error))
