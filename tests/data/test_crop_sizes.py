"""The sizes of a step are drawn with the given shares, from the seed and the step alone."""

from collections import Counter

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler, DataLoader

from dinov3_hf.data.collators import collate_views
from dinov3_hf.data.crop_sizes import CropSizeMix, CropSizes, MixedSizes, parse_crop_sizes
from dinov3_hf.data.datasets import SSLDataset
from dinov3_hf.data.masking import MaskSampler
from dinov3_hf.data.multicrop import MultiCropViews
from dinov3_hf.data.sampler import StreamSampler
from dinov3_hf.data.sources.base import as_source
from tests.data.test_datasets import RandomPictures, assert_equal_batches, merge

BATCH, STEPS, SEED = 8, 12, 0
PUBLISHED = [
    {"global": 512, "local": 112, "gram": 768, "probability": 0.3},
    {"global": 768, "local": 112, "gram": 1152, "probability": 0.3},
    {"global": 768, "local": 168, "gram": 1152, "probability": 0.3},
    {"global": 768, "local": 224, "gram": 1152, "probability": 0.05},
    {"global": 768, "local": 336, "gram": 1152, "probability": 0.05},
]
SMALL = CropSizeMix(
    (CropSizes(16, 8, 24, 0.4), CropSizes(24, 8, 32, 0.3), CropSizes(24, 12, 32, 0.3)),
    seed=SEED,
)


def dataset_of(sizes: CropSizes) -> SSLDataset:
    views = MultiCropViews(
        sizes.global_crop_size, sizes.local_crop_size, num_local_crops=3, gram_crop_size=sizes.gram_crop_size
    )
    masks = MaskSampler(sizes.global_crop_size // 4, batch_size=BATCH, seed=SEED)
    return SSLDataset(as_source(RandomPictures(), 3), views, masks, seed=SEED)


def mixed() -> MixedSizes:
    return MixedSizes([dataset_of(sizes) for sizes in SMALL.sizes], SMALL, BATCH)


def load(dataset=None, num_workers=0, size=BATCH, num_ranks=1, rank=0, num_seen=0):
    sampler = StreamSampler(as_source(RandomPictures(), 3), STEPS * BATCH, BATCH, seed=SEED)
    batches = BatchSampler(range(STEPS * BATCH), size, drop_last=True)
    keys = list(sampler)
    batches = [[keys[position] for position in batch] for batch in batches][num_seen // size :]
    if num_ranks > 1:
        batches = list(BatchSamplerShard(batches, num_processes=num_ranks, process_index=rank))
    dataset = mixed() if dataset is None else dataset
    return list(DataLoader(dataset, batch_sampler=batches, collate_fn=collate_views, num_workers=num_workers))


def test_shares_of_the_published_sizes():
    mix = CropSizeMix(parse_crop_sizes("crop_sizes", PUBLISHED), seed=42)
    num_steps = 10_000
    drawn = Counter(mix.index_at(step) for step in range(num_steps))
    # Chi square with 4 degrees of freedom: 18.5 is the 0.1 % point.
    expected = [sizes.probability * num_steps for sizes in mix.sizes]
    assert sum((drawn[i] - count) ** 2 / count for i, count in enumerate(expected)) < 18.5
    # Neighbouring steps are independent: the first entry follows itself as often as it comes at all.
    first = np.array([mix.index_at(step) == 0 for step in range(num_steps)])
    assert abs(first[1:][first[:-1]].mean() - 0.3) < 4 * np.sqrt(0.3 * 0.7 / first.sum())


@pytest.mark.invariant
def test_the_draw_is_a_function_of_seed_and_step():
    steps = range(50)
    expected = [SMALL.index_at(step) for step in steps]
    assert [SMALL.index_at(step) for step in reversed(steps)] == expected[::-1]
    assert [SMALL.at(step) for step in steps] == [SMALL.sizes[i] for i in expected]
    other = CropSizeMix(SMALL.sizes, seed=SEED + 1)
    assert [other.index_at(step) for step in steps] != expected
    assert CropSizeMix(SMALL.sizes[:1], SEED).index_at(7) == 0


@pytest.mark.invariant
def test_all_samples_of_a_step_have_its_sizes():
    batches = load()
    assert len({SMALL.index_at(step) for step in range(STEPS)}) == 3
    for step, batch in enumerate(batches):
        sizes = SMALL.at(step)
        assert batch["global_crops"].shape == (2 * BATCH, 3, *[sizes.global_crop_size] * 2)
        assert batch["local_crops"].shape == (3 * BATCH, 3, *[sizes.local_crop_size] * 2)
        assert batch["gram_crops"].shape == (2 * BATCH, 3, *[sizes.gram_crop_size] * 2)
        assert batch["mask"].shape == (2 * BATCH, (sizes.global_crop_size // 4) ** 2)
        assert batch["mask"].any(1).sum() == BATCH


@pytest.mark.invariant
def test_one_size_is_the_plain_data_set():
    sizes = SMALL.sizes[0]
    alone = MixedSizes([dataset_of(sizes)], CropSizeMix((sizes,), SEED), BATCH)
    for batch, expected in zip(load(alone), load(dataset_of(sizes)), strict=True):
        assert_equal_batches(batch, expected)


@pytest.mark.invariant
@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
def test_workers_and_a_restart_change_nothing():
    expected = load()
    for batch, reference in zip(load(num_workers=4), expected, strict=True):
        assert_equal_batches(batch, reference)
    for batch, reference in zip(load(num_seen=5 * BATCH), expected[5:], strict=True):
        assert_equal_batches(batch, reference)


@pytest.mark.invariant
@pytest.mark.parametrize(("num_ranks", "accumulation"), [(2, 1), (1, 2), (2, 2)])
def test_ranks_and_accumulation_change_nothing(num_ranks, accumulation):
    size = BATCH // num_ranks // accumulation
    shards = [load(size=size, num_ranks=num_ranks, rank=rank) for rank in range(num_ranks)]
    for step, batch in enumerate(load()):
        parts = [shard[step * accumulation + i] for i in range(accumulation) for shard in shards]
        merged = merge(parts)
        assert_equal_batches(merged, {name: batch[name] for name in merged})
        assert torch.equal(merged["gram_crops"], batch["gram_crops"])


def test_an_entry_is_read_as_it_stands():
    entry = {"global": 512, "local": 112, "gram": 768, "probability": 1, "per_device_train_batch_size": 4}
    assert parse_crop_sizes("crop_sizes", [entry]) == (CropSizes(512, 112, 768, 1, 4),)
    assert parse_crop_sizes("crop_sizes", [PUBLISHED[0], PUBLISHED[1] | {"probability": 0.7, "gram": None}]) == (
        CropSizes(512, 112, 768, 0.3),
        CropSizes(768, 112, None, 0.7),
    )


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "crop_sizes is an empty list; give at least one entry, or null for one size"),
        ([512], r"crop_sizes\.0 is 512; expected a mapping such as"),
        ([PUBLISHED[0], {"globl": 8}], r"crop_sizes\.1 has no entry 'globl'; did you mean .*global"),
        ([{"global": 512, "probability": 1.0}], r"crop_sizes\.0 has no local; an entry needs global, local, prob"),
        ([{"global": "x", "local": 8, "probability": 1.0}], r"crop_sizes\.0\.global is 'x'; expected an integer"),
        ([PUBLISHED[0] | {"probability": 0}], r"crop_sizes\.0\.probability 0 is no share of the steps; use a number"),
        ([PUBLISHED[0] | {"probability": 1.5}], r"crop_sizes\.0\.probability 1.5 is no share of the steps"),
        (PUBLISHED[:3], "the probabilities of crop_sizes sum to 0.9; they must sum to 1"),
    ],
)
def test_entries_that_make_no_sense(entries, message):
    with pytest.raises(ValueError, match=message):
        parse_crop_sizes("crop_sizes", entries)
