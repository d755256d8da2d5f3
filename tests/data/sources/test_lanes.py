"""Shards that fail, on a real web server and on disk: tried again, left out, reported; and reading ahead."""

import gc
import threading
import time
from collections import Counter

import numpy as np
import pytest
from pyarrow import parquet

from dinov3_hf.data.sources.lanes import ReadAhead
from dinov3_hf.data.sources.spec import load_images
from tests.data.sources.serving import FOR_EVER, serving
from tests.data.sources.test_stream import BATCH, LENGTHS, TOTAL, decoded, place_of, sampler_of, write_shards
from tests.data.sources.writing import write_tar
from tests.testing_utils import require_package

pytestmark = [require_package("datasets"), require_package("pyarrow"), require_package("aiohttp")]

BROKEN = 3  # shard
FIRST = sum(LENGTHS[:BROKEN])  # its first image
IMAGES_OF_BROKEN = set(range(FIRST, FIRST + LENGTHS[BROKEN]))


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr("dinov3_hf.data.sources.lanes.RETRY_WAITS", (0.01, 0.02))


@pytest.fixture(params=["tar", "parquet"])
def kind(request) -> str:
    return request.param


@pytest.fixture
def server(tmp_path, kind):
    write_shards(tmp_path, kind)
    with serving(tmp_path) as server:
        yield server


def open_remote(server, kind: str):
    stream = load_images(f"stream:{server.address}/{{0..5}}.{kind}", "train")
    stream.shuffle_buffer = 16
    return stream


def pass_of(keys, epoch: int) -> Counter:
    return Counter(decoded(key) for key in keys if key.epoch == epoch)


def failures_of(keys) -> list[tuple[str, str]]:
    return [failure for key in keys for failure in key.failures]


def test_a_web_server_gives_what_the_disk_gives(server, kind, tmp_path):
    keys = list(sampler_of(open_remote(server, kind), 200))
    assert keys == list(sampler_of(load_here(tmp_path, kind), 200))


def load_here(folder, kind):
    stream = load_images(f"stream:{folder}/{{0..5}}.{kind}", "train")
    stream.shuffle_buffer = 16
    return stream


def test_each_rank_downloads_its_share_only(server, kind):
    streams = [open_remote(server, kind) for _ in range(4)]
    server.bytes_sent.clear()
    sizes = {name: (server.folder / name).stat().st_size for name in [f"{i}.{kind}" for i in range(6)]}
    for rank, stream in enumerate(streams):
        stream.shuffle_buffer = 4  # so that little is read ahead
        list(sampler_of(stream, 2 * BATCH, micro_batch=BATCH // 4, rank=rank, num_ranks=4))
    # Four lanes have each read one to three of the six shards; on each rank all lanes would be four times as much.
    assert sum(server.bytes_sent.values()) < 2 * sum(sizes.values())


def test_a_shard_that_recovers_loses_nothing(server, kind):
    stream = open_remote(server, kind)
    expected = list(sampler_of(open_remote(server, kind), 300))
    size = (server.folder / f"{BROKEN}.{kind}").stat().st_size
    server.missing[f"1.{kind}"] = 2
    server.breaks[f"{BROKEN}.{kind}"] = (size // 2, 2)
    assert list(sampler_of(stream, 300)) == expected
    assert server.missing[f"1.{kind}"] == 0
    assert server.breaks[f"{BROKEN}.{kind}"][1] == 0


@pytest.mark.parametrize("num_seen", [0, 3 * BATCH, 100])
def test_a_shard_that_is_gone_is_left_out_for_this_pass_and_reported_once(server, kind, num_seen):
    name = f"{BROKEN}.{kind}"
    stream = open_remote(server, kind)
    server.missing[name] = FOR_EVER
    sampler = sampler_of(stream, 400)
    keys = list(sampler)
    assert set(pass_of(keys, 0)) == set(range(TOTAL)) - IMAGES_OF_BROKEN
    assert set(pass_of(keys, 0).values()) == {1}
    failures = failures_of(keys)
    assert {failure[0] for failure in failures} == {f"{server.address}/{name}"}
    assert "404" in failures[0][1]
    assert "\n" not in failures[0][1]
    assert len(failures) >= 4  # once a pass
    server.missing.clear()
    resumed = sampler_of(open_remote(server, kind), 400)
    resumed.restore(sampler.progress())  # by which it goes on as if nothing had recovered
    resumed.num_seen = num_seen
    assert list(resumed)[num_seen:] == keys[num_seen:]
    healthy = list(sampler_of(open_remote(server, kind), 400))
    assert set(pass_of(healthy, 0)) == set(range(TOTAL))


@pytest.mark.parametrize("num_seen", [99, 4 * BATCH])
def test_the_rest_of_a_shard_that_breaks_off_is_left_out(server, kind, num_seen, tmp_path):
    path = tmp_path / f"{BROKEN}.{kind}"
    content = bytearray(path.read_bytes())
    if kind == "tar":
        del content[len(content) // 2 - 100 :]
    else:
        start = parquet.read_metadata(path).row_group(2).column(1).data_page_offset
        content[start : start + 100] = bytes(100)
    path.write_bytes(content)
    stream = open_remote(server, kind)
    sampler = sampler_of(stream, 500)
    keys = list(sampler)
    lost = set(range(TOTAL)) - set(pass_of(keys, 0))
    assert lost
    assert lost < IMAGES_OF_BROKEN
    assert lost == set(range(min(lost), FIRST + LENGTHS[BROKEN]))  # all up to the break were given
    assert len([key for key in keys if place_of(key)[0] == BROKEN and key.epoch == 0]) == min(lost) - FIRST
    assert failures_of(keys)[0][0] == f"{server.address}/{path.name}"
    assert [key.index for key in sampler_of(load_here(tmp_path, kind), 500)] == [key.index for key in keys]
    resumed = sampler_of(stream, 500)
    resumed.restore(sampler.progress())
    resumed.num_seen = num_seen
    assert list(resumed)[num_seen:] == keys[num_seen:]


def test_the_first_shard_may_be_missing(server, kind):
    server.missing[f"0.{kind}"] = FOR_EVER
    stream = open_remote(server, kind)
    assert stream.name(0).endswith(f"1.{kind} row 0")
    keys = list(sampler_of(stream, 200))
    assert set(pass_of(keys, 0)) == set(range(LENGTHS[0], TOTAL))
    names = {stream.name(key.index) for key in keys}
    server.missing.clear()
    recovered = {stream.name(key.index) for key in sampler_of(stream, 200)}
    assert len(recovered - names) == LENGTHS[0]


def test_when_every_shard_fails_the_run_ends_with_a_line(server, kind):
    stream = open_remote(server, kind)
    keys = iter(sampler_of(stream, 10_000))
    next(keys)
    server.missing.update({f"{i}.{kind}": FOR_EVER for i in range(6)})
    message = rf"cannot be read any more: 6 shards failed one after the other, the last http.*{kind} \(404"
    with pytest.raises(ValueError, match=message) as caught:
        list(keys)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"cannot be streamed \(404.*\); check the address and the files"):
        open_remote(server, kind)


def test_a_single_shard_that_breaks_off(tmp_path):
    path = write_tar(tmp_path / "0.tar", range(20))
    path.write_bytes(path.read_bytes()[:20_000])
    stream = load_images(f"stream:{path}")
    stream.shuffle_buffer = 1
    num_left = len(stream)
    assert 0 < num_left < 20
    sampler = sampler_of(stream, 3 * num_left, batch_size=4)
    keys = list(sampler)
    assert [decoded(key) for key in keys] == [*range(num_left)] * 3
    assert [key.position for key in keys if key.failures] == [num_left, 2 * num_left]
    for num_seen in range(3 * num_left):
        resumed = sampler_of(stream, 3 * num_left, batch_size=4)
        resumed.num_seen = num_seen
        # In the first pass also where a run was stopped before it had given the shard up.
        resumed.restore(sampler.progress() if num_seen > num_left else [])
        assert list(resumed)[num_seen:] == keys[num_seen:]
    path.unlink()
    with pytest.raises(ValueError, match=r"any more: 1 shard failed one after the other, the last .*tar \(.*No such"):
        list(sampler_of(stream, 100, batch_size=4))


def test_what_is_no_shard_at_all(tmp_path, kind):
    write_shards(tmp_path, kind)
    (tmp_path / f"1.{kind}").write_bytes(b"")
    (tmp_path / f"2.{kind}").write_bytes(b"<html>no such page</html>" * 100)
    stream = load_here(tmp_path, kind)
    (tmp_path / f"4.{kind}").unlink()
    keys = list(sampler_of(stream, 400))
    lost = {i for i in range(TOTAL) if i not in pass_of(keys, 0)}
    starts = np.cumsum((0, *LENGTHS))
    assert lost == {i for shard in (1, 2, 4) for i in range(starts[shard], starts[shard + 1])}
    assert len({name for name, _ in failures_of(keys)}) == 3


def test_reading_ahead():
    read = []

    def items():
        for i in range(100):
            read.append(i)
            yield i

    assert list(ReadAhead(items(), 5)) == list(range(100))
    read.clear()
    ahead = ReadAhead(items(), 5)
    time.sleep(0.3)
    assert 5 <= len(read) <= 7  # before anything was asked for; neither idle nor without bounds
    assert next(ahead) == 0
    del ahead
    gc.collect()
    time.sleep(0.3)
    assert not [thread for thread in threading.enumerate() if thread.name == "read_ahead"]

    def broken():
        yield 1
        raise OSError("gone")

    ahead = ReadAhead(broken(), 5)
    assert next(ahead) == 1
    with pytest.raises(OSError, match="gone"):
        next(ahead)
