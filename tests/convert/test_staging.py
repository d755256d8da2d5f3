"""What is written appears whole or not at all."""

import os
import subprocess

import pytest
import torch

from dinov3_hf.convert.lazy_tensor import LazyTensor
from dinov3_hf.convert.safetensors_file import write_safetensors
from dinov3_hf.convert.staging import writing
from tests.convert.files import converted, tiny_native


def test_a_folder_appears_when_it_is_complete(tmp_path):
    with writing(tmp_path / "a" / "b" / "new", 10) as staged:
        assert not (tmp_path / "a" / "b" / "new").exists()
        staged.mkdir()
        (staged / "file").write_text("x")
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == [
        "a",
        "a/b",
        "a/b/new",
        "a/b/new/file",
    ]
    assert (tmp_path / "a/b/new").stat().st_mode & 0o777 == 0o777 & ~_umask()


@pytest.mark.parametrize(
    "error", [ValueError("no"), KeyboardInterrupt(), SystemExit(143)], ids=lambda error: type(error).__name__
)
def test_an_error_leaves_nothing(error, tmp_path):
    with pytest.raises(type(error)), writing(tmp_path / "a" / "new", 10) as staged:
        staged.write_text("half")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_stays(tmp_path):
    (tmp_path / "new").write_text("old")
    with (
        pytest.raises(FileExistsError, match="new exists already; remove it or choose another name"),
        writing(tmp_path / "new", 1),
    ):
        raise AssertionError
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError), writing(tmp_path / "link", 1):
        raise AssertionError
    # Another program may have made it meanwhile.
    with pytest.raises(FileExistsError), writing(tmp_path / "other", 1) as staged:
        staged.write_text("mine")
        (tmp_path / "other").write_text("theirs")
    assert (tmp_path / "other").read_text() == "theirs"
    assert {path.name for path in tmp_path.iterdir()} == {"new", "link", "other"}


def test_too_little_room_is_said_before_anything_is_written(tmp_path):
    with (
        pytest.raises(OSError, match=r"new needs 1,000,000,000\.000 GB and .* GB are free in .*; make room"),
        writing(tmp_path / "a" / "new", 10**18),
    ):
        raise AssertionError
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True).returncode != 0:
        pytest.skip("may not mount a disk")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_is_full_before(small_disk, tmp_path):
    torch.save(tiny_native(hidden_size=256), tmp_path / "native.pth")
    with pytest.raises(OSError, match=r"hub needs 0\.00\d GB and 0\.001 GB are free in .*disk; make room"):
        converted(tmp_path / "native.pth", small_disk / "hub", "hf")
    assert list(small_disk.iterdir()) == []


def test_a_disk_that_fills_up_meanwhile(small_disk):
    with (
        pytest.raises(OSError, match=r"hub could not be written \(No space left on device\); nothing is left of it"),
        writing(small_disk / "hub", 1000) as staged,
    ):
        staged.mkdir()
        write_safetensors({"a": LazyTensor.full((1 << 20,), 1, torch.float32)}, staged / "a.safetensors")
    assert list(small_disk.iterdir()) == []


@pytest.mark.parametrize(("to", "name"), [("hf", "hub"), ("native", "back.pth")])
def test_a_disk_that_takes_no_more(forks, to, name, tmp_path):
    torch.save(tiny_native(), tmp_path / "native.pth")
    words = ("convert", tmp_path / "native.pth", tmp_path / name, "--to", to)
    done = forks.run("-m", "dinov3_hf", *words, file_size=20_000)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: {tmp_path}/{name} could not be written (File too large); nothing is left of it.\n"
    assert {path.name for path in tmp_path.iterdir()} == {"native.pth"}


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
