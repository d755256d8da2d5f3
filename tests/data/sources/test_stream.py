"""Streams: every image once a pass, each shard on one rank, the same order for any ranks and from any position on."""

import io
import tarfile
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinov3_hf.data.sampler import SampleKey, StreamSampler
from dinov3_hf.data.sources.lanes import ROWS_OF_A_SHARD
from dinov3_hf.data.sources.mixture import Mixture, Part
from dinov3_hf.data.sources.spec import load_images
from dinov3_hf.data.sources.stream import NUM_KEPT, ImageStream
from tests.data.sources.writing import number_of, write_folder, write_parquet, write_tar
from tests.testing_utils import TEST_DATA, require_package, require_test_data

pytestmark = [require_package("datasets"), require_package("pyarrow")]

BATCH = 32  # four lanes, where there are as many shards
LENGTHS = (30, 7, 21, 30, 2, 10)  # of shards
TOTAL = sum(LENGTHS)


def write_shards(folder: Path, kind: str, lengths=LENGTHS) -> str:
    """Shards of images of consecutive numbers; returns a pattern for them."""
    start = 0
    for shard, length in enumerate(lengths):
        numbers = range(start, start + length)
        if kind == "tar":
            write_tar(folder / f"{shard}.tar", numbers)
        else:
            write_parquet(folder / f"{shard}.parquet", numbers, batch_size=7)
        start += length
    return f"{folder}/{{0..{len(lengths) - 1}}}.{kind}"


@pytest.fixture(params=["tar", "parquet"])
def shards(request, tmp_path) -> str:
    return write_shards(tmp_path / "shards", request.param)


def open_stream(shards: str, shuffle_buffer: int = 16) -> ImageStream:
    stream = load_images(f"stream:{shards}", "train")
    stream.shuffle_buffer = shuffle_buffer
    return stream


def sampler_of(images, num_positions: int, batch_size: int = BATCH, seed: int = 0, **options) -> StreamSampler:
    return StreamSampler(images, num_positions, batch_size, seed, **options)


def decoded(key: SampleKey) -> int:
    return number_of(np.asarray(Image.open(io.BytesIO(key.content))))


def place_of(key: SampleKey) -> tuple[int, int]:
    """Shard and row."""
    shard, row = divmod(key.index, ROWS_OF_A_SHARD)
    return shard - 1, row


@pytest.mark.parametrize("batch_size", [8, 16, 32, 48])
def test_a_pass_is_every_image_once(shards, batch_size):
    stream = open_stream(shards)
    assert stream.num_lanes(batch_size) == {8: 1, 16: 2, 32: 4, 48: 6}[batch_size]
    keys = list(sampler_of(stream, 20 * batch_size + 4 * TOTAL, batch_size))
    starts = np.cumsum((0, *LENGTHS))
    passes = Counter((key.epoch, key.index) for key in keys)
    assert set(passes.values()) == {1}
    for epoch in (0, 1):
        images = [key for key in keys if key.epoch == epoch]
        assert sorted(map(place_of, images)) == [(i, row) for i, n in enumerate(LENGTHS) for row in range(n)]
        assert [decoded(key) for key in images] == [starts[shard] + row for shard, row in map(place_of, images)]
    orders = [[key.index for key in keys if key.epoch == epoch] for epoch in (0, 1)]
    assert orders[0] != orders[1]
    assert [key.index for key in sampler_of(stream, 100, batch_size, seed=1)] != [key.index for key in keys[:100]]


def test_lanes_feed_their_own_places_from_their_own_shards(shards):
    keys = list(sampler_of(open_stream(shards), 30 * BATCH))
    lanes = {}
    for key in keys:
        lanes.setdefault((key.epoch, place_of(key)[0]), set()).add(key.position % BATCH // (BATCH // 4))
    assert all(len(found) == 1 for found in lanes.values())
    assert {lane for found in lanes.values() for lane in found} == {0, 1, 2, 3}
    assert len({next(iter(lanes[epoch, 0])) for epoch in range(6)}) > 1  # the shards are dealt anew


def test_number_of_lanes(tmp_path):
    stream = open_stream(write_shards(tmp_path, "tar", [1] * 13))
    numbers = {batch: stream.num_lanes(batch) for batch in (1, 7, 8, 16, 64, 96, 104, 2048)}
    assert numbers == {1: 1, 7: 1, 8: 1, 16: 2, 64: 8, 96: 12, 104: 13, 2048: 8}


def test_images_move_within_their_window_only(shards):
    keys = list(sampler_of(open_stream(shards), 96, batch_size=8))  # one lane
    in_turn = list(dict.fromkeys(place_of(key)[0] for key in sampler_of(open_stream(shards, 1), TOTAL, batch_size=8)))
    starts = dict(zip(in_turn, np.cumsum([0] + [LENGTHS[shard] for shard in in_turn]), strict=False))
    in_order = [starts[shard] + row for shard, row in map(place_of, keys)]
    assert [number // 16 for number in in_order] == [place // 16 for place in range(96)]
    assert in_order != sorted(in_order)


@pytest.mark.invariant
@pytest.mark.parametrize(("num_ranks", "accumulation"), [(2, 1), (4, 1), (2, 2), (8, 1), (1, 4)])
def test_ranks_share_the_stream(shards, num_ranks, accumulation):
    whole = list(sampler_of(open_stream(shards), 8 * BATCH))
    micro_batch = BATCH // num_ranks // accumulation
    ranks = []
    for rank in range(num_ranks):
        sampler = sampler_of(open_stream(shards), 8 * BATCH, micro_batch=micro_batch, rank=rank, num_ranks=num_ranks)
        ranks.append(list(sampler))
        assert len(sampler.progress()) == max(1, 4 // num_ranks)  # lanes that it reads
    for position, keys in enumerate(zip(*ranks, strict=True)):
        owner = position % BATCH // micro_batch % num_ranks
        assert [key is None for key in keys] == [rank != owner for rank in range(num_ranks)]
        assert keys[owner] == whole[position]


@pytest.mark.invariant
@pytest.mark.parametrize("with_progress", [True, False])
@pytest.mark.parametrize("num_seen", [1, 16, 31, 32, 64, 100, 256, 419])
def test_resumes_at_any_position(shards, num_seen, with_progress):
    sampler = sampler_of(open_stream(shards), 500)
    whole = list(sampler)
    resumed = sampler_of(open_stream(shards), 500)
    resumed.num_seen = num_seen
    if with_progress:
        resumed.restore(sampler.progress())
    assert list(resumed) == [None] * num_seen + whole[num_seen:]


@pytest.mark.invariant
def test_resumes_on_another_number_of_ranks(shards):
    whole = list(sampler_of(open_stream(shards), 16 * BATCH))
    progress = []
    for rank in range(4):
        sampler = sampler_of(open_stream(shards), 16 * BATCH, micro_batch=BATCH // 4, rank=rank, num_ranks=4)
        list(islice(sampler, 9 * BATCH))
        progress += sampler.progress()
    resumed = [
        sampler_of(open_stream(shards), 16 * BATCH, micro_batch=BATCH // 2, rank=rank, num_ranks=2)
        for rank in range(2)
    ]
    for sampler in resumed:
        sampler.num_seen = 8 * BATCH
        sampler.restore(progress)
    merged = [first or second for first, second in zip(*resumed, strict=True)]
    assert merged[8 * BATCH :] == whole[8 * BATCH :]


class CountedShard:
    """A shard that counts the rows that are read of it."""

    def __init__(self, shard):
        self.shard = shard
        self.name = shard.name
        self.num_read = 0

    def read(self, start):
        for content in self.shard.read(start):
            self.num_read += 1
            yield content


def test_what_was_seen_is_not_read_again(shards):
    sampler = sampler_of(open_stream(shards), 30 * BATCH)
    list(islice(sampler, 20 * BATCH))
    resumed = sampler_of(open_stream(shards), 20 * BATCH + 8)
    resumed.num_seen = 20 * BATCH
    resumed.restore(sampler.progress())
    stream = resumed.parts[0].source
    stream.shards = [CountedShard(shard) for shard in stream.shards]
    expected = list(islice(sampler, 20 * BATCH, 20 * BATCH + 8))
    assert list(resumed)[20 * BATCH :] == expected
    # Of each of the 4 lanes the window (4 images) that was under way and 2 ahead, and of the first one 8 images more.
    assert sum(shard.num_read for shard in stream.shards) <= 4 * 3 * 4 + 8


def test_first_images_are_rows(shards):
    stream = open_stream(shards)
    assert len(stream) == NUM_KEPT
    assert [number_of(stream.image(i)) for i in range(NUM_KEPT)] == list(range(NUM_KEPT))
    assert stream.name(35).endswith(("/shards/1.tar row 5", "/shards/1.parquet row 5"))


def test_an_image_has_one_name_in_all_epochs(shards):
    stream = open_stream(shards)
    names: dict[bytes, set[str]] = {}
    for key in sampler_of(stream, 4 * TOTAL):
        names.setdefault(key.content, set()).add(stream.name(key.index))
    assert all(len(found) == 1 for found in names.values())
    assert len(set.union(*names.values())) == len(names) == TOTAL
    assert stream.num_images is None
    assert stream.fingerprint() == {"stream": Path(shards).name, "shards": 6, "shuffle_buffer": 16}


def test_remote_addresses(shards):
    remote = open_stream("file://" + shards)
    assert list(sampler_of(remote, 200)) == list(sampler_of(open_stream(shards), 200))


@pytest.mark.invariant
@pytest.mark.parametrize("num_seen", [64, 131])
def test_in_a_mixture_with_rows(tmp_path, num_seen):
    streams = [
        open_stream(write_shards(tmp_path / kind, kind, lengths))
        for kind, lengths in (("tar", (9, 5)), ("parquet", LENGTHS))
    ]
    folder = load_images(write_folder(tmp_path / "folder", range(200, 205)))

    def mixture():
        return Mixture([Part(streams[0], 0.5), Part(folder, 0.2), Part(streams[1], 0.3)])

    whole = list(sampler_of(mixture(), 10 * BATCH))
    assert Counter(key.source for key in whole) == {0: 160, 1: 64, 2: 96}
    assert all((key.content is None) == (key.source == 1) for key in whole)
    assert mixture().num_images is None
    for with_progress in (True, False):
        ranks = [sampler_of(mixture(), 10 * BATCH, micro_batch=16, rank=rank, num_ranks=2) for rank in range(2)]
        progress = [entry for sampler in ranks for entry in (list(sampler), sampler.progress())[1]]
        for sampler in ranks:
            sampler.num_seen = num_seen
            sampler.restore(progress if with_progress else [])
        merged = [first or second for first, second in zip(*ranks, strict=True)]
        assert merged[num_seen:] == whole[num_seen:]


def test_arrays_and_several_kinds_of_images_in_tar_files(tmp_path):
    for name, suffixes in {"arrays": ("npy", "txt"), "images": ("png", "npy")}.items():
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            for i in range(3):
                for suffix in suffixes:
                    info = tarfile.TarInfo(f"{i}.{suffix}")
                    content = io.BytesIO()
                    if suffix == "npy":
                        np.save(content, np.full((4, 4, 3), i, dtype=np.uint8))
                    elif suffix == "png":
                        Image.new("RGB", (4, 4), (10 + i,) * 3).save(content, "png")
                    info.size = len(content.getvalue())
                    tar.addfile(info, io.BytesIO(content.getvalue()))
    for name, first in {"arrays": 0, "images": 10}.items():
        stream = load_images(f"stream:{tmp_path}/{name}.tar")
        assert [number_of(stream.image(i)) for i in range(len(stream))] == [first, first + 1, first + 2]


def test_a_data_set_of_the_hub_in_shards(shards, monkeypatch):
    import datasets

    kind = shards.rpartition(".")[2]
    files = [shards.replace("{0..5}", str(i)) for i in range(6)]
    rows = datasets.load_dataset(
        {"tar": "webdataset", "parquet": "parquet"}[kind], data_files=files, split="train", streaming=True
    )
    monkeypatch.setattr("dinov3_hf.data.sources.spec.hub_rows", lambda *args, **options: rows)
    stream = load_images("stream:owner/pets", "train")
    stream.shuffle_buffer = 16
    assert stream.name(0) == "owner/pets shard 0 row 0"
    assert list(sampler_of(stream, 300)) == list(sampler_of(open_stream(shards), 300))


def test_what_cannot_be_streamed(tmp_path):
    shards = write_shards(tmp_path, "parquet", [5])

    def refused(data, message, error=ValueError, **options):
        with pytest.raises(error, match=message) as caught:
            load_images(data, **options)
        assert "\n" not in str(caught.value)

    refused(f"stream:{shards}", "is a stream, which cannot be evaluated on; leave out stream:", labelled=True)
    refused(f"stream:{write_folder(tmp_path / 'photos', range(2))}", "is a folder of images, .*; leave out stream:")
    refused("stream:digits", "digits are in memory; leave out stream:")
    refused("https://example.org/{0..9}.tar", r"is not on this machine; write stream:https://example\.org/")
    refused("stream:https://example.org/photos.zip", r"cannot be streamed; its files must end in \.parquet or \.tar")
    refused(f"stream:{tmp_path}/missing/*.tar", "no file matches", FileNotFoundError)
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "0.parquet").read_bytes()[:-9])
    refused(f"stream:{tmp_path}/cut.parquet", r"cut\.parquet cannot be streamed \(.*\); check the address")
    with tarfile.open(tmp_path / "texts.tar", "w") as tar:
        tar.add(__file__, "a.txt")
    refused(f"stream:{tmp_path}/texts.tar", r"texts\.tar holds no images; their names must end in")
    write_tar(tmp_path / "no.tar", [])
    refused(f"stream:{tmp_path}/no.tar", r"no\.tar holds no images")
    write_parquet(tmp_path / "no.parquet", [])
    refused(f"stream:{tmp_path}/no.parquet", r"no\.parquet is empty; name another data set")


@require_test_data
def test_real_stream():
    stream = load_images(f"stream:{TEST_DATA}/tiny_imagenet_*.parquet", "train")
    keys = list(sampler_of(stream, 20_000))
    numbers = Counter(key.epoch for key in keys)
    assert numbers[0] > 19_900
    assert len({key.content for key in keys if key.epoch == 0}) == numbers[0]
