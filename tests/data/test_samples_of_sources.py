"""Samples of mixtures and streams, broken files among them, do not depend on workers and ranks."""

import json
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, SkipBatchSampler
from torch.utils.data import BatchSampler, DataLoader

from dinov3_hf.data.collators import collate_views
from dinov3_hf.data.datasets import MAX_REPLACEMENTS, SSLDataset
from dinov3_hf.data.masking import MaskSampler
from dinov3_hf.data.multicrop import MultiCropViews
from dinov3_hf.data.sampler import SampleKey, StreamSampler
from dinov3_hf.data.sources.mixture import Mixture, Part
from dinov3_hf.data.sources.spec import load_images
from tests.data.sources.conftest import own_caches  # noqa: F401
from tests.data.sources.serving import FOR_EVER, serving
from tests.data.sources.writing import write_folder, write_parquet, write_tar
from tests.testing_utils import require_package

pytestmark = [require_package("datasets"), require_package("pyarrow")]

BATCH = 8
NUM_POSITIONS = 64


@pytest.fixture
def images(tmp_path):
    """A folder with two broken files of eight, tar files that stay alone, and a stream."""
    folder = write_folder(tmp_path / "folder", range(8))
    for number in (2, 5):
        next(folder.rglob(f"{number:04}.png")).write_bytes(b"no image")
    write_tar(tmp_path / "0.tar", range(50, 60))
    write_parquet(tmp_path / "x.parquet", range(100, 130))
    return Mixture(
        [
            Part(load_images(folder), 0.5),
            Part(load_images(tmp_path / "0.tar"), 0.25, alone=True),
            Part(load_images(f"stream:{tmp_path}/x.parquet"), 0.25),
        ]
    )


def dataset_of(images) -> SSLDataset:
    return SSLDataset(
        images, MultiCropViews(16, 8, num_local_crops=2), MaskSampler(4, batch_size=BATCH, seed=0), seed=0
    )


def load(images, num_workers=0, batch_size=BATCH, num_ranks=1, rank=0, num_seen=0):
    sampler = StreamSampler(images, NUM_POSITIONS, BATCH, seed=0)
    sampler.num_seen = num_seen
    batches = BatchSampler(sampler, batch_size, drop_last=True)
    if num_ranks > 1:
        batches = BatchSamplerShard(batches, num_processes=num_ranks, process_index=rank)
    batches = SkipBatchSampler(batches, num_seen // batch_size // num_ranks)
    dataset = dataset_of(images)
    return list(DataLoader(dataset, batch_sampler=batches, collate_fn=collate_views, num_workers=num_workers))


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name, value in a.items():
        if isinstance(value, dict):
            assert_equal(value, b[name])
        elif isinstance(value, torch.Tensor | np.ndarray):
            assert np.array_equal(value, b[name]), name
        else:
            assert value == b[name], name


@pytest.mark.invariant
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("num_workers", [1, 4])
def test_workers_change_nothing(images, num_workers):
    expected = load(images)
    assert len(expected) == NUM_POSITIONS // BATCH
    for batch, reference in zip(load(images, num_workers=num_workers), expected, strict=True):
        assert_equal(batch, reference)


def test_a_worker_of_any_start_method_can_receive_the_data_set(images):
    received = pickle.loads(pickle.dumps(dataset_of(images)))
    key = next(key for key in StreamSampler(images, NUM_POSITIONS, BATCH, seed=0) if key.source == 2)
    assert_equal(received[key], dataset_of(images)[key])


@pytest.mark.invariant
def test_ranks_change_nothing(images):
    expected = load(images)
    ranks = [load(images, batch_size=BATCH // 2, num_ranks=2, rank=rank) for rank in range(2)]
    for first, second, whole in zip(*ranks, expected, strict=True):
        merged = torch.cat([part["global_crops"].unflatten(0, (2, -1)) for part in (first, second)], 1).flatten(0, 1)
        assert torch.equal(merged, whole["global_crops"])
        assert first["unreadable"] + second["unreadable"] == whole["unreadable"]


@pytest.mark.invariant
def test_a_resumed_run_sees_what_it_would_have_seen(images):
    for batch, reference in zip(load(images, num_seen=24), load(images)[3:], strict=True):
        assert_equal(batch, reference)


def test_unreadable_images_are_replaced_from_their_source_and_named(images):
    batches = load(images)
    report = Counter(entry for batch in batches for entry in batch["unreadable"])
    assert {name[-8:] for name, _ in report} == {"0002.png", "0005.png"}
    assert len({reason for _, reason in report}) == 1
    drawn = [pixel for batch in batches for pixel in batch["global_crops"][:BATCH, 0, 0, 0].tolist()]
    folder_samples = [pixel for pixel in drawn if pixel < 50]
    assert len(folder_samples) == NUM_POSITIONS // 2
    assert set(folder_samples) <= {0, 1, 3, 4, 6, 7}


def test_broken_images_of_a_stream_are_replaced(tmp_path):
    import datasets

    table = datasets.load_dataset("parquet", data_files=str(write_parquet(tmp_path / "x.parquet", range(20))))["train"]
    broken = table.cast_column("image", datasets.Image(decode=False)).map(
        lambda row, i: {"image": {"bytes": row["image"]["bytes"][: 20 if i % 5 == 0 else None], "path": None}},
        with_indices=True,
    )
    broken.to_parquet(tmp_path / "broken.parquet")
    images = load_images(f"stream:{tmp_path}/broken.parquet")
    report = [entry for batch in load(images) for entry in batch["unreadable"]]
    assert len(report) >= NUM_POSITIONS // 10
    assert {name for name, _ in report} <= {f"{tmp_path}/broken.parquet row {row}" for row in (0, 5, 10, 15)}


STREAMED_BATCH = 32


@pytest.fixture(params=["tar", "parquet"])
def server(request, tmp_path, monkeypatch):
    """Seven shards of streamed images, one of them gone."""
    monkeypatch.setattr("dinov3_hf.data.sources.lanes.RETRY_WAITS", (0.01,))
    for shard in range(7):
        write = write_tar if request.param == "tar" else write_parquet
        write(tmp_path / f"{shard}.{request.param}", range(12 * shard, 12 * shard + 12))
    with serving(tmp_path) as server:
        server.missing[f"4.{request.param}"] = FOR_EVER
        server.pattern = f"stream:{server.address}/{{0..6}}.{request.param}"
        yield server


def streamed(server, num_workers=0, num_ranks=1, rank=0, num_seen=0, progress=()):
    """What a rank sees of a stream of seven shards, as the Trainer has it, and what it has read."""
    images = load_images(server.pattern)
    images.shuffle_buffer = 12
    micro_batch = STREAMED_BATCH // num_ranks
    sampler = StreamSampler(images, 4 * STREAMED_BATCH, STREAMED_BATCH, 0, micro_batch, rank, num_ranks)
    sampler.num_seen = num_seen
    sampler.restore(progress)
    batches = BatchSamplerShard(BatchSampler(sampler, micro_batch, drop_last=True), num_ranks, rank)
    batches = SkipBatchSampler(batches, num_seen // STREAMED_BATCH)
    masks = MaskSampler(4, batch_size=STREAMED_BATCH, seed=0)
    dataset = SSLDataset(images, MultiCropViews(16, 8, num_local_crops=2), masks, seed=0)
    loader = DataLoader(dataset, batch_sampler=batches, collate_fn=collate_views, num_workers=num_workers)
    return list(loader), sampler.progress()


@pytest.mark.invariant
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_a_streamed_run_is_the_same_on_any_ranks_and_workers_and_after_a_restart(server):
    whole, _ = streamed(server)
    failed = [name for batch in whole for name, _ in batch["unreadable"]]
    assert set(failed) == {server.pattern.removeprefix("stream:").replace("{0..6}", "4")}
    # (ranks, workers, ranks of the run that is resumed)
    for num_ranks, num_workers, ranks_before in ((1, 2, 2), (2, 2, 4), (4, 0, 1)):
        before = [streamed(server, 0, ranks_before, rank) for rank in range(ranks_before)]
        progress = json.loads(json.dumps([entry for _, entries in before for entry in entries]))
        for num_seen in (0, 2 * STREAMED_BATCH):
            ranks = [
                streamed(server, num_workers, num_ranks, rank, num_seen, progress if num_seen else ())[0]
                for rank in range(num_ranks)
            ]
            for *parts, expected in zip(*ranks, whole[num_seen // STREAMED_BATCH :], strict=True):
                crops = [part["global_crops"].unflatten(0, (2, -1)) for part in parts]
                assert torch.equal(torch.cat(crops, 1).flatten(0, 1), expected["global_crops"])
                assert [entry for part in parts for entry in part["unreadable"]] == expected["unreadable"]


def test_nothing_but_broken_images(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.jpg").touch()
    dataset = dataset_of(load_images(tmp_path))
    message = rf"0\.jpg cannot be read \(the file is empty\), nor can {MAX_REPLACEMENTS} images drawn in its place"
    with pytest.raises(ValueError, match=message):
        dataset[SampleKey(0, 0, 0, 0)]
