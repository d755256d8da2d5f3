"""Streams: every image once an epoch, shuffled in windows, and the same order from any position on."""

import io
import tarfile
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice

import numpy as np
import pytest
from PIL import Image

from dinov3_hf.data.sampler import StreamSampler
from dinov3_hf.data.sources.mixture import Mixture, Part
from dinov3_hf.data.sources.spec import load_images
from dinov3_hf.data.sources.stream import NUM_KEPT, ROWS_OF_A_SHARD, read_ahead
from tests.data.sources.writing import number_of, write_folder, write_parquet, write_tar
from tests.testing_utils import TEST_DATA, require_package, require_test_data

pytestmark = [require_package("datasets"), require_package("pyarrow")]


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, format, *args):
        pass


def decoded(content: bytes) -> int:
    return number_of(np.asarray(Image.open(io.BytesIO(content))))


def samples(stream, num_samples: int, start: int = 0, seed: int = 0) -> list[tuple[int, int, int]]:
    """Epoch, index and number of the image."""
    read = islice(stream.samples(seed, 0, start), num_samples)
    return [(epoch, index, decoded(content)) for epoch, index, content in read]


@pytest.fixture
def shards(tmp_path) -> str:
    """90 images in 3 parquet files."""
    for shard in range(3):
        write_parquet(tmp_path / f"shard-{shard}.parquet", range(30 * shard, 30 * shard + 30), batch_size=7)
    return f"{tmp_path}/shard-{{0..2}}.parquet"


def open_stream(shards: str, shuffle_buffer: int = 16):
    stream = load_images(f"stream:{shards}", "train")
    stream.shuffle_buffer = shuffle_buffer
    return stream


def test_an_epoch_is_every_image_once(shards):
    drawn = samples(open_stream(shards), 270)
    epochs = [drawn[start : start + 90] for start in (0, 90, 180)]
    for number, epoch in enumerate(epochs):
        assert {entry[0] for entry in epoch} == {number}
        assert sorted(divmod(entry[1], ROWS_OF_A_SHARD) for entry in epoch) == [
            (shard, row) for shard in range(3) for row in range(30)
        ]
        assert sorted(entry[2] for entry in epoch) == list(range(90))
    orders = [[entry[2] for entry in epoch] for epoch in epochs]
    assert orders[0] != orders[1] != orders[2]
    first_shards = {orders[epoch][0] // 30 for epoch in range(3)} | {
        samples(open_stream(shards), 1, seed=s)[0][2] // 30 for s in range(5)
    }
    assert len(first_shards) > 1  # the files take turns, too
    assert [entry[2] for entry in samples(open_stream(shards), 90, seed=1)] != orders[0]


def test_images_move_within_their_window_only(shards):
    read = [divmod(index, ROWS_OF_A_SHARD) for _, index, _ in samples(open_stream(shards), 90)]
    in_turn = list(dict.fromkeys(shard for shard, _ in read))
    for place, (shard, row) in enumerate(read):
        assert (30 * in_turn.index(shard) + row) // 16 == place // 16


@pytest.mark.invariant
@pytest.mark.parametrize("start", [1, 15, 16, 17, 89, 90, 91, 180, 203])
def test_resumes_at_any_position(shards, start):
    whole = samples(open_stream(shards), 240)
    assert samples(open_stream(shards), 30, start) == whole[start : start + 30]
    known = open_stream(shards)
    samples(known, 100)  # one that knows its length by now
    assert samples(known, 30, start) == whole[start : start + 30]


def test_tar_files_and_remote_addresses(tmp_path):
    for shard in range(2):
        write_tar(tmp_path / f"{shard}.tar", range(20 * shard, 20 * shard + 20))
    stream = load_images(f"stream:{tmp_path}/{{0..1}}.tar")
    assert sorted(entry[2] for entry in samples(stream, 40)) == list(range(40))
    remote = load_images(f"stream:file://{tmp_path}/{{0..1}}.tar")
    assert samples(remote, 50) == samples(stream, 50)


def test_shards_on_a_web_server(tmp_path):
    pytest.importorskip("aiohttp")
    write_tar(tmp_path / "0.tar", range(20))
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        stream = load_images(f"stream:http://127.0.0.1:{server.server_port}/0.tar")
        assert sorted(entry[2] for entry in samples(stream, 20)) == list(range(20))
    finally:
        server.shutdown()
        server.server_close()


def test_first_images_are_rows(shards):
    stream = open_stream(shards)
    assert len(stream) == NUM_KEPT
    assert [number_of(stream.image(i)) for i in range(NUM_KEPT)] == list(range(NUM_KEPT))
    assert stream.name(5).endswith(".parquet shard 0 row 5")


def test_an_image_has_one_name_in_all_epochs(shards):
    stream = open_stream(shards)
    names: dict[bytes, set[str]] = {}
    for _, index, content in islice(stream.samples(0, 0, 0), 360):
        names.setdefault(content, set()).add(stream.name(index))
    assert all(len(found) == 1 for found in names.values())
    assert len(set.union(*names.values())) == len(names)
    assert stream.num_images is None
    assert stream.fingerprint() == {"stream": "shard-{0..2}.parquet", "shards": 3, "shuffle_buffer": 16}


def test_in_a_mixture_with_rows(shards, tmp_path):
    folder = load_images(write_folder(tmp_path / "folder", range(200, 205)))
    mixture = Mixture([Part(open_stream(shards), 0.75), Part(folder, 0.25)])
    sampler = StreamSampler(mixture, 200, 8, seed=0)
    whole = list(sampler)
    assert [key.source for key in whole].count(0) == 150
    assert all((key.content is None) == (key.source == 1) for key in whole)
    sampler.num_seen = 131
    assert list(sampler)[131:] == whole[131:]
    assert mixture.num_images is None


def test_what_cannot_be_streamed(shards, tmp_path):
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
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "shard-0.parquet").read_bytes()[:-9])
    refused(f"stream:{tmp_path}/cut.parquet", r"cannot be streamed \(")
    with tarfile.open(tmp_path / "texts.tar", "w") as tar:
        tar.add(__file__, "a.txt")
    refused(f"stream:{tmp_path}/texts.tar", r"no image column; its columns are .*txt")


def test_reading_ahead():
    read = []

    def items():
        for i in range(100):
            read.append(i)
            yield i

    assert list(read_ahead(items(), 5)) == list(range(100))
    read.clear()
    ahead = read_ahead(items(), 5)
    assert next(ahead) == 0
    time.sleep(0.3)
    assert 5 <= len(read) <= 8  # neither idle nor without bounds
    ahead.close()
    time.sleep(0.3)
    assert not [thread for thread in threading.enumerate() if thread.name == "read_ahead"]

    def broken():
        yield 1
        raise OSError("gone")

    ahead = read_ahead(broken(), 5)
    assert next(ahead) == 1
    with pytest.raises(OSError, match="gone"):
        next(ahead)


@require_test_data
def test_real_stream():
    stream = load_images(f"stream:{TEST_DATA}/tiny_imagenet_*.parquet", "train")
    epochs = [(epoch, content) for epoch, _, content in islice(stream.samples(0, 0, 0), 20_000)]
    assert [epoch for epoch, _ in epochs] == [0] * 19_999 + [1]
    assert len({content for _, content in epochs}) == 19_999
