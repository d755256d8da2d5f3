"""Mixtures: exact shares, homogeneous batches, and the same order from any position on."""

import time
from collections import Counter
from itertools import islice

import numpy as np
import pytest
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler

from dinov3_hf.data.sampler import StreamSampler
from dinov3_hf.data.sources.mixture import Draws, Mixture, Part, Turns
from dinov3_hf.data.sources.spec import load_images
from tests.data.sources.writing import number_of, write_folder


@pytest.fixture
def sources(tmp_path):
    return [
        load_images(write_folder(tmp_path / str(i), range(start, start + length)))
        for i, (start, length) in enumerate(((0, 7), (100, 5), (200, 3)))
    ]


@pytest.mark.invariant
@pytest.mark.parametrize("weights", [[1], [1, 1], [0.5, 0.3, 0.2], [1e-3, 5, 2, 2], [0.1] * 10, [3, 1 / 3, 2**0.5]])
def test_turns_are_exact_and_start_anywhere(weights):
    turns = Turns(weights)
    order = list(islice(turns.start_at(0), 3000))
    shares = np.array(weights) / sum(weights)
    counts = np.zeros(len(weights), dtype=int)
    for position, entry in enumerate(order):
        if position % 97 == 0:
            assert turns.counts(position) == counts.tolist()
            assert list(islice(turns.start_at(position), 20)) == order[position : position + 20] or position > 2980
        assert np.abs(counts - position * shares).max() <= max(1, len(weights) / 2)
        counts[entry] += 1


def parts(sources, weights, alone):
    return [Part(*entry) for entry in zip(sources, weights, alone, strict=True)]


@pytest.mark.invariant
def test_sources_that_stay_alone_fill_whole_global_batches(sources):
    draws = Draws(parts(sources, (0.1, 0.6, 0.3), (True, False, False)), batch_size=8)
    steps = np.array(list(islice(draws.start_at(0), 8 * 100))).reshape(100, 8)
    alone = (steps == 0).all(1)
    assert alone.sum() == 10
    assert not (steps[~alone] == 0).any()
    assert Counter(steps[~alone].ravel().tolist()) == {1: 480, 2: 240}
    assert np.diff(np.flatnonzero(alone)).tolist() == [10] * 9  # spread over the run


@pytest.mark.invariant
@pytest.mark.parametrize(
    "alone", [(True, False, False), (False, False, False), (True, True, True), (True, True, False)]
)
def test_draws_start_anywhere(sources, alone):
    draws = Draws(parts(sources, (0.2, 0.5, 0.3), alone), batch_size=4)
    order = list(islice(draws.start_at(0), 300))
    for position in (0, 1, 3, 4, 5, 118, 119, 120, 200):
        counts = Counter(order[:position])
        assert draws.counts(position) == [counts[i] for i in range(3)]
        assert list(islice(draws.start_at(position), 100)) == order[position : position + 100]


@pytest.mark.invariant
@pytest.mark.parametrize("alone", [(True, False, False), (False, False, False), (True, True, True)])
def test_draws_at_some_places_of_the_batches(sources, alone, monkeypatch):
    monkeypatch.setattr("dinov3_hf.data.sources.mixture.STEPS_AT_ONCE", 7)
    draws = Draws(parts(sources, (0.2, 0.5, 0.3), alone), batch_size=8)
    order = list(islice(draws.start_at(0), 300))
    for position in (0, 1, 8, 12, 119, 120, 297):
        for low, high in ((0, 4), (4, 8), (2, 3), (0, 8)):
            counts = Counter(part for i, part in enumerate(order[:position]) if low <= i % 8 < high)
            assert draws.counts(position, low, high) == [counts[i] for i in range(3)]


def test_a_million_steps_are_no_work(sources):
    draws = Draws(parts(sources, (0.1, 0.6, 0.3), (True, False, False)), batch_size=4096)
    start = time.process_time()
    counts = draws.counts(1_000_000 * 4096 + 7)
    next(draws.start_at(1_000_000 * 4096 + 7))
    assert time.process_time() - start < 0.5
    assert sum(counts) == 1_000_000 * 4096 + 7
    np.testing.assert_allclose(np.array(counts) / sum(counts), (0.1, 0.6, 0.3), atol=1e-6)


def test_each_source_goes_through_its_own_permutations(sources):
    mixture = Mixture(parts(sources, (0.5, 0.3, 0.2), (False, True, False)))
    keys = list(StreamSampler(mixture, 400, 8, seed=0))
    assert [key.position for key in keys] == list(range(400))
    for number, source in enumerate(sources):
        mine = [key for key in keys if key.source == number]
        assert [key.epoch for key in mine] == [i // len(source) for i in range(len(mine))]
        epochs = [[key.index for key in mine if key.epoch == epoch] for epoch in range(mine[-1].epoch)]
        assert all(sorted(epoch) == list(range(len(source))) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) > 1
    assert [key.index for key in StreamSampler(mixture, 400, 8, seed=1)] != [key.index for key in keys]


@pytest.mark.invariant
@pytest.mark.parametrize("num_seen", [1, 8, 100, 333])
def test_resumes_at_any_position(sources, num_seen):
    mixture = Mixture(parts(sources, (0.5, 0.3, 0.2), (False, True, False)))
    sampler = StreamSampler(mixture, 400, 8, seed=0)
    whole = list(sampler)
    sampler.num_seen = num_seen
    assert list(sampler)[num_seen:] == whole[num_seen:]


@pytest.mark.invariant
@pytest.mark.parametrize(("num_ranks", "accumulation"), [(2, 1), (2, 2), (4, 1)])
def test_ranks_and_accumulation_keep_batches_homogeneous(sources, num_ranks, accumulation):
    mixture = Mixture(parts(sources, (0.5, 0.25, 0.25), (False, True, True)))
    whole = list(BatchSampler(StreamSampler(mixture, 160, 8, seed=0), 8, drop_last=True))
    micro_batch = 8 // num_ranks // accumulation
    shards = [
        list(
            BatchSamplerShard(
                BatchSampler(StreamSampler(mixture, 160, 8, seed=0), micro_batch, drop_last=True),
                num_processes=num_ranks,
                process_index=rank,
            )
        )
        for rank in range(num_ranks)
    ]
    for step, expected in enumerate(whole):
        micro_steps = range(step * accumulation, (step + 1) * accumulation)
        assert [key for i in micro_steps for shard in shards for key in shard[i]] == expected
    assert Counter(tuple({key.source for key in batch}) for batch in whole) == {(0,): 10, (1,): 5, (2,): 5}


def test_rows_are_those_of_the_parts_in_turn(sources, tmp_path):
    mixture = Mixture(parts(sources, (1, 1, 1), (False,) * 3))
    assert [number_of(mixture.image(i)) for i in range(len(mixture))] == [
        number_of(source.image(i)) for source in sources for i in range(len(source))
    ]
    assert mixture.name(7) == sources[1].name(0)
    assert mixture.num_images == 15
    assert mixture.fingerprint() != Mixture(parts(sources, (1, 1, 2), (False,) * 3)).fingerprint()


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf")])
def test_weights_are_positive(sources, weight):
    with pytest.raises(ValueError, match=r"is not positive; leave a source out rather than weigh it 0"):
        Mixture(parts(sources, (1, weight, 1), (False,) * 3))
