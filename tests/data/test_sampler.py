"""The order of a run: permutations, exact continuation, and the same global batches for any ranks and accumulation."""

import numpy as np
import pytest
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler

from dinov3_hf.data.sampler import StreamSampler
from dinov3_hf.data.sources.base import as_source


class Numbers:
    """As many images as one likes, all of one pixel."""

    def __init__(self, length: int):
        self.length = length

    def __len__(self) -> int:
        return self.length

    def image(self, i: int) -> np.ndarray:
        return np.zeros((1, 1, 3), dtype=np.uint8)


def numbers(length: int):
    return as_source(Numbers(length), 3)


def test_every_epoch_is_another_permutation():
    keys = list(StreamSampler(numbers(10), 30, 8, seed=0))
    assert [key.position for key in keys] == list(range(30))
    epochs = [[key.index for key in keys[start : start + 10]] for start in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [key.index for key in StreamSampler(numbers(10), 10, 8, seed=1)] != epochs[0]


@pytest.mark.invariant
@pytest.mark.parametrize("num_seen", [0, 1, 9, 10, 17, 29, 30])
def test_continues_as_if_it_had_never_stopped(num_seen):
    sampler = StreamSampler(numbers(10), 30, 8, seed=0)
    whole = list(sampler)
    sampler.num_seen = num_seen
    assert list(sampler) == [None] * num_seen + whole[num_seen:]
    assert len(sampler) == 30


def test_wraps_where_a_batch_is_larger_than_the_data_set():
    indices = [key.index for key in StreamSampler(numbers(3), 8, 8, seed=0)]
    assert sorted(indices[:3]) == sorted(indices[3:6]) == [0, 1, 2]


@pytest.mark.invariant
@pytest.mark.parametrize(("num_ranks", "accumulation"), [(1, 2), (2, 1), (2, 2), (4, 1)])
def test_global_batches_do_not_depend_on_ranks_and_accumulation(num_ranks, accumulation):
    whole = list(BatchSampler(StreamSampler(numbers(11), 40, 8, seed=0), 8, drop_last=True))
    micro_batch = 8 // num_ranks // accumulation
    shards = [
        list(
            BatchSamplerShard(
                BatchSampler(StreamSampler(numbers(11), 40, 8, seed=0), micro_batch, drop_last=True),
                num_processes=num_ranks,
                process_index=rank,
            )
        )
        for rank in range(num_ranks)
    ]
    for step, expected in enumerate(whole):
        micro_steps = range(step * accumulation, (step + 1) * accumulation)
        assert [key for i in micro_steps for shard in shards for key in shard[i]] == expected


def test_impossible_runs():
    with pytest.raises(ValueError, match="the data set is empty"):
        StreamSampler(numbers(0), 8, 8, seed=0)
