"""What is written appears whole or not at all."""

import pytest
import torch

from dinov3_hf.convert.staging import writing
from tests.convert.files import tiny_native
from tests.testing_utils import run_python


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


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
from dinov3_hf.cli.main import main
sys.argv[0] = "dinov3-hf"
main()
"""


@pytest.mark.parametrize(("to", "name"), [("hf", "hub"), ("native", "back.pth")])
def test_a_disk_that_takes_no_more(to, name, tmp_path):
    torch.save(tiny_native(), tmp_path / "native.pth")
    done = run_python("-c", LIMITED, "convert", tmp_path / "native.pth", tmp_path / name, "--to", to)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: {tmp_path}/{name} could not be written (File too large); nothing is left of it.\n"
    assert {path.name for path in tmp_path.iterdir()} == {"native.pth"}


def _umask() -> int:
    import os

    mask = os.umask(0)
    os.umask(mask)
    return mask
