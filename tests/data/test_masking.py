"""Counts are exact and independent of the seed; blocks have the recorded statistics."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dinov3_hf.data import masking
from dinov3_hf.data.masking import MaskSampler, block_mask, mask_counts
from tests.testing_utils import FIXTURES

MASKING = FIXTURES / "h_masking"
STANDARD_ERRORS = 4


@pytest.mark.parity
@pytest.mark.parametrize("case", ["collate", "collate_shift"])
@pytest.mark.parametrize("seed", [0, 7])
def test_counts_of_a_global_batch_equal_the_recorded_ones(case, seed):
    config = json.loads((MASKING / case / "case.json").read_text())["config"]
    recorded = load_file(MASKING / case / "outputs.safetensors")["sorted_masked_counts"]
    masks = MaskSampler(
        config["grid"],
        probability=config["mask_probability"],
        ratio_range=config["mask_ratio_min_max"],
        circular_shift=config["random_circular_shift"],
        batch_size=config["batch_size"],
        seed=seed,
    )
    for step in range(3):
        positions = range(step * config["batch_size"], (step + 1) * config["batch_size"])
        counts = torch.stack([masks(position) for position in positions]).sum(2).flatten()
        torch.testing.assert_close(counts.sort().values, recorded, rtol=0, atol=0)


def test_counts_are_truncated_float32_products():
    # 0.3 is 0.300000012 in float32 and 0.299999999999999989 in float64: 300 patches, not 299.
    assert mask_counts(4, 1000, 0.25, (0.1, 0.3)).tolist() == [0, 0, 0, 300]
    assert mask_counts(4, 1000, 0.0, (0.1, 0.3)).tolist() == [0, 0, 0, 0]
    assert mask_counts(3, 16, 1.0, (0.1, 0.5)).tolist() == [3, 5, 8]


def mean_is(values, expected):
    """The mean of our draws and one recorded from as many draws differ by their standard errors."""
    standard_error = np.std(values) * np.sqrt(2 / len(values))
    return abs(np.mean(values) - expected) <= STANDARD_ERRORS * standard_error


RECORDED_STATISTICS = [
    pytest.param(case["grid"], recorded, id=f"grid{case['grid']}-{recorded['requested']}")
    for case in json.loads((MASKING / "statistics.json").read_text())["cases"]
    for recorded in case["per_count"]
]


@pytest.mark.parity
@pytest.mark.parametrize(("grid", "recorded"), RECORDED_STATISTICS)
def test_block_statistics(grid, recorded, monkeypatch):
    rng = np.random.default_rng(0)
    calls, added = [], []
    add_block = masking._add_block

    def watched(*arguments):
        calls.append(1)
        added.append(add_block(*arguments))
        return added[-1]

    monkeypatch.setattr(masking, "_add_block", watched)
    num_calls, num_random, agreement, centre, corner, new_patches = [], [], [], [], [], []
    for _ in range(1500):
        calls.clear(), added.clear()
        mask = block_mask(grid, grid, recorded["requested"], rng)
        assert mask.sum() == recorded["requested"]
        num_calls.append(len(calls))
        num_random.append(recorded["requested"] - sum(added))
        new_patches += [number for number in added if number]
        vertical, horizontal = (mask[1:] == mask[:-1]).mean(), (mask[:, 1:] == mask[:, :-1]).mean()
        agreement.append((vertical + horizontal) / 2)
        middle = slice(grid // 2 - 1, grid // 2 + 2)
        centre.append(mask[middle, middle].mean())
        corner.append(mask[[0, 0, -1, -1], [0, -1, 0, -1]].mean())

    assert mean_is(num_calls, recorded["mean_block_calls"])
    assert mean_is(num_random, recorded["mean_randomly_added"])
    assert mean_is(agreement, recorded["mean_neighbour_agreement"])
    assert mean_is(new_patches or [0], recorded["mean_new_patches_per_block"])
    assert mean_is(centre, recorded["mask_probability_centre_3x3_vs_corner"][0])
    assert mean_is(corner, recorded["mask_probability_centre_3x3_vs_corner"][1])


@pytest.mark.invariant
@pytest.mark.parametrize("grid", [(1, 1), (1, 5), (2, 2), (4, 4), (3, 9), (16, 12)])
def test_every_count_is_hit_exactly(grid):
    rng = np.random.default_rng(0)
    for num_masked in range(grid[0] * grid[1] + 1):
        mask = block_mask(*grid, num_masked, rng)
        assert mask.shape == grid
        assert mask.sum() == num_masked


def test_more_patches_than_there_are():
    with pytest.raises(ValueError, match="cannot mask 17 patches of a 4 x 4 grid"):
        block_mask(4, 4, 17, np.random.default_rng(0))


@pytest.mark.invariant
def test_masks_depend_on_position_and_seed_only():
    def sampler(seed=3):
        return MaskSampler(6, batch_size=4, seed=seed)

    forward = [sampler()(position) for position in range(12)]
    shared = sampler()
    backward = [shared(position) for position in reversed(range(12))]
    assert all(torch.equal(a, b) for a, b in zip(forward, reversed(backward), strict=True))
    other = [sampler(seed=4)(position) for position in range(12)]
    assert not all(torch.equal(a, b) for a, b in zip(forward, other, strict=True))
    counts = torch.stack(forward).sum(2).view(3, 8)  # one row a step
    assert not torch.equal(counts[0], counts[1])


def test_non_square_grid_and_layout():
    masks = MaskSampler((2, 8), probability=1.0, batch_size=2, seed=0)
    assert masks(0).shape == (2, 16)
    assert masks(0).dtype == torch.bool


def test_circular_shift_takes_the_preference_for_the_centre_away():
    def frequency(circular_shift):
        masks = MaskSampler(8, probability=1.0, circular_shift=circular_shift, batch_size=100, seed=0)
        return torch.stack([masks(position) for position in range(600)]).float().mean((0, 1)).view(8, 8)

    plain, shifted = frequency(False), frequency(True)
    assert plain[3:5, 3:5].mean() > 2 * plain[0, 0]
    # 1200 masks: the standard error of a frequency near 0.3 is 0.013.
    torch.testing.assert_close(shifted, shifted.mean().expand_as(shifted), rtol=0, atol=0.06)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"probability": 1.2}, "mask probability 1.2"),
        ({"ratio_range": (0.5, 0.1)}, r"mask ratio range \(0.5, 0.1\)"),
    ],
)
def test_impossible_options(options, message):
    with pytest.raises(ValueError, match=message):
        MaskSampler(4, batch_size=2, seed=0, **options)
