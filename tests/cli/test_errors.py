"""Every end of a program: its status and its one line."""

import pytest
from torch.utils.data import DataLoader, Dataset

from dinov3_hf.cli.errors import one_line, run
from dinov3_hf.errors import ArgumentError, did_you_mean


def failing(error: BaseException):
    def main(arguments):
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ArgumentError("no such field"), 2, "error: no such field"),
        (ValueError("a\n  long\nstory"), 1, "error: a long story"),
        (FileNotFoundError("there is no folder x"), 1, "error: there is no folder x"),
        (OSError(28, "No space left on device", "/data/a.png"), 1, "error: /data/a.png: No space left on device"),
        (KeyError("layer"), 1, "error: KeyError: 'layer' (--debug shows where)"),
        (ValueError(), 1, "error: ValueError (--debug shows where)"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_status_and_line(error, status, line, capsys):
    with pytest.raises(SystemExit) as ended:
        run(failing(error), [])
    assert ended.value.code == status
    assert capsys.readouterr().err == f"{line}\n"


def test_a_preempted_run_keeps_its_status():
    with pytest.raises(SystemExit) as ended:
        run(failing(SystemExit(75)), [])
    assert ended.value.code == 75


@pytest.mark.parametrize("arguments", [["--debug", "a", "b"], ["a", "--debug", "b"], ["a", "b", "--debug"]])
def test_debug_lets_the_error_through(arguments):
    seen = []

    def main(rest):
        seen.extend(rest)
        raise ValueError("where")

    with pytest.raises(ValueError, match="where"):
        run(main, arguments)
    assert seen == ["a", "b"]


def test_arguments_come_from_the_command_line(monkeypatch):
    monkeypatch.setattr("sys.argv", ["program", "a", "b"])
    seen = []
    run(seen.extend)
    assert seen == ["a", "b"]


def test_a_plain_system_error_keeps_its_text():
    assert one_line(OSError("We could not connect")) == "We could not connect"


class Unreadable(Dataset):
    """Every item fails as a corrupt image does: with a cause, which a worker's message repeats."""

    def __len__(self):
        return 1

    def __getitem__(self, index):
        try:
            raise OSError("truncated")
        except OSError as error:
            raise ValueError("cannot read image a.jpg: repair or remove it.") from error


def test_an_error_in_a_data_worker_is_told_without_its_traceback():
    with pytest.raises(ValueError) as raised:
        next(iter(DataLoader(Unreadable(), num_workers=1)))
    assert "Traceback" in str(raised.value)
    assert one_line(raised.value) == "cannot read image a.jpg: repair or remove it."


def test_did_you_mean():
    assert did_you_mean("trian", ["train", "test"]) == "did you mean train?"
    assert did_you_mean("zebra", ["train", "test"]) == "use one of test, train."
    assert did_you_mean("zebra", ["train", "test"], otherwise="use a folder.") == "use a folder."
