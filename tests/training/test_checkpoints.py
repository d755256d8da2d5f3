"""Checkpoints that are whole or not there: a process is killed before each of its file operations in turn."""

import json
import os
import resource
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dinov3_hf.distributed.pieces import Piece
from dinov3_hf.distributed.reductions import rank
from dinov3_hf.training.checkpoint_writer import CheckpointWriter
from dinov3_hf.training.checkpoints import (
    MANIFEST,
    checkpoints,
    clean_up,
    problem,
    remove_old_checkpoints,
    replacing_folder,
    step_of,
    write_manifest,
)
from tests.reference.processes import run_in_processes
from tests.testing_utils import saved_state

STATE = "state/rank-00000-of-00001.safetensors"  # of a run of one process
FILE_OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")


def save(output_dir: Path, step: int, text: str = "weights", afterwards: Callable[[], None] = lambda: None) -> None:
    writer = CheckpointWriter(output_dir)
    folder = writer.begin(step)
    assert folder.name == f"checkpoint-{step}"
    (folder / "rng_state.pth").write_text(text)
    writer.finish(step, pieces(text), lambda checkpoint: write_teacher(checkpoint, text), afterwards)
    writer.wait()


def pieces(text: str) -> list[Piece]:
    return [Piece("param/text", (len(text),), 0, torch.tensor(list(text.encode()), dtype=torch.uint8))]


def write_teacher(checkpoint: Path, text: str) -> None:
    assert text_of_state(checkpoint) == text  # of all ranks, before the teacher is put together
    (checkpoint / "teacher").mkdir()
    (checkpoint / "teacher" / "config.json").write_text(text)


def text_of_state(checkpoint: Path) -> str:
    return bytes(saved_state(checkpoint)["param/text"].tolist()).decode()


def fail(*arguments: object) -> None:
    raise RuntimeError("no room")


def steps(output_dir: Path, complete: bool = True) -> list[int]:
    return [step_of(folder) for folder in checkpoints(output_dir) if not complete or problem(folder) is None]


def hidden(output_dir: Path) -> list[str]:
    return [path.name for path in output_dir.iterdir() if path.name.startswith(".")]


def run_and_kill(work: Callable[[], None], operation: int) -> bool:
    """Whether a child process was killed before its file operation number `operation`, not done by then."""
    child = os.fork()
    if child == 0:
        count = 0

        def kill(event: str, arguments: object) -> None:
            nonlocal count
            if event in FILE_OPERATIONS:
                if count == operation:
                    os.kill(os.getpid(), signal.SIGKILL)
                count += 1

        sys.addaudithook(kill)
        try:
            work()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def test_manifest_lists_every_file(tmp_path):
    save(tmp_path, 2)
    manifest = json.loads((tmp_path / "checkpoint-2" / MANIFEST).read_text())
    assert manifest["step"] == 2
    assert sorted(manifest["files"]) == ["rng_state.pth", STATE, "teacher/config.json"]
    assert manifest["files"]["teacher/config.json"]["bytes"] == len("weights")
    assert manifest["files"][STATE]["bytes"] == (tmp_path / "checkpoint-2" / STATE).stat().st_size
    assert problem(tmp_path / "checkpoint-2", checksums=True) is None
    assert hidden(tmp_path) == []


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (
            lambda folder: (folder / "teacher" / "config.json").write_text("weig"),
            "has 4 bytes instead of 7",
        ),
        (lambda folder: flip_a_bit(folder / STATE), f"{STATE} has other contents"),
        (lambda folder: os.truncate(folder / STATE, 100), f"{STATE} has 100 bytes instead of"),
        (lambda folder: (folder / STATE).unlink(), f"{STATE} is missing"),
        (lambda folder: (folder / "teacher" / "config.json").unlink(), "teacher/config.json is missing"),
        (lambda folder: (folder / MANIFEST).unlink(), "manifest.json is missing"),
        (lambda folder: (folder / MANIFEST).write_text('{"files": {'), "manifest.json is damaged"),
        (lambda folder: (folder / MANIFEST).write_text('{"files": []}'), "manifest.json is damaged"),
        (lambda folder: (folder / MANIFEST).write_bytes(bytes(100)), "manifest.json is damaged"),
    ],
)
def test_damage_is_found(tmp_path, damage, says):
    save(tmp_path, 2)
    damage(tmp_path / "checkpoint-2")
    assert says in problem(tmp_path / "checkpoint-2", checksums=True)


def test_killed_before_any_file_operation_of_a_save(tmp_path):
    save(tmp_path / "start", 2)
    save(tmp_path / "start", 4)
    operation = 0
    seen = set()
    killed = True
    while killed:
        run = shutil.copytree(tmp_path / "start", tmp_path / str(operation))

        def save_and_rotate(run=run) -> None:
            save(run, 6, afterwards=lambda: remove_old_checkpoints(run, 6, keep_last=2, keep_every=None))

        killed = run_and_kill(save_and_rotate, operation)
        left = steps(run)
        assert left in ([2, 4], [2, 4, 6], [4, 6]), f"operation {operation}"
        assert left == steps(run, complete=False), f"operation {operation}"  # no half one under its final name
        seen.add(tuple(left))
        clean_up(run)
        assert hidden(run) == []
        assert steps(run) == left
        operation += 1
    assert operation > 15
    assert seen == {(2, 4), (2, 4, 6), (4, 6)}


def test_killed_while_a_checkpoint_is_replaced(tmp_path):
    save(tmp_path / "start", 2, "old")
    operation = 0
    texts = set()
    killed = True
    while killed:
        run = shutil.copytree(tmp_path / "start", tmp_path / str(operation))
        killed = run_and_kill(lambda run=run: save(run, 2, "new"), operation)
        clean_up(run)
        assert steps(run) == [2], f"operation {operation}"
        assert hidden(run) == []
        checkpoint = run / "checkpoint-2"
        found = {(checkpoint / name).read_text() for name in ("rng_state.pth", "teacher/config.json")}
        found.add(text_of_state(checkpoint))
        assert len(found) == 1, f"operation {operation}"
        texts |= found
        operation += 1
    assert texts == {"old", "new"}


def test_killed_while_a_folder_is_replaced(tmp_path):
    def write(folder: Path, text: str) -> None:
        with replacing_folder(folder) as staged:
            assert staged.name == folder.name
            (staged / "config.json").write_text(text)
            (staged / "model.safetensors").write_text(text)

    write(tmp_path / "start" / "teacher", "old")
    operation = 0
    texts = set()
    killed = True
    while killed:
        run = shutil.copytree(tmp_path / "start", tmp_path / str(operation))
        killed = run_and_kill(lambda run=run: write(run / "teacher", "new"), operation)
        clean_up(run)
        assert hidden(run) == []
        found = {(run / "teacher" / name).read_text() for name in ("config.json", "model.safetensors")}
        assert len(found) == 1, f"operation {operation}"
        texts |= found
        operation += 1
    assert texts == {"old", "new"}


def test_old_checkpoints_go_and_chosen_ones_stay(tmp_path):
    for step in range(2, 14, 2):
        save(tmp_path, step)
        remove_old_checkpoints(tmp_path, step, keep_last=2, keep_every=6)
    assert steps(tmp_path) == [6, 10, 12]
    assert hidden(tmp_path) == []


def test_the_best_checkpoint_stays_however_old(tmp_path):
    for step in range(2, 14, 2):
        save(tmp_path, step)
        remove_old_checkpoints(tmp_path, step, keep_last=2, keep_every=None, keep_step=4)
    assert steps(tmp_path) == [4, 10, 12]


@pytest.mark.parametrize("keep_last", [None, 0, -1])
def test_all_are_kept_without_a_limit(tmp_path, keep_last):
    for step in (2, 4, 6):
        save(tmp_path, step)
        remove_old_checkpoints(tmp_path, step, keep_last=keep_last, keep_every=4)
    assert steps(tmp_path) == [2, 4, 6]


def test_an_incomplete_checkpoint_is_not_counted(tmp_path):
    for step in (2, 4, 6):
        save(tmp_path, step)
    (tmp_path / "checkpoint-4" / STATE).unlink()
    remove_old_checkpoints(tmp_path, 6, keep_last=2, keep_every=None)
    assert steps(tmp_path) == [2, 6]


def test_later_checkpoints_of_a_run_that_was_taken_back_are_not_counted(tmp_path):
    for step in (2, 4, 6, 8):
        save(tmp_path, step)
    remove_old_checkpoints(tmp_path, 4, keep_last=1, keep_every=None)
    assert steps(tmp_path) == [4, 6, 8]


def fail_to_save(output_dir: Path, step: int, when: str) -> CheckpointWriter:
    writer = CheckpointWriter(output_dir)
    (writer.begin(step) / "rng_state.pth").write_text("state")
    error = RuntimeError("no room") if when == "before" else None
    writer.finish(step, pieces("weights"), fail if when == "teacher" else lambda folder: None, fail, error)
    return writer


@pytest.mark.parametrize("when", ["before", "teacher"])
def test_a_failed_save_leaves_the_others_and_says_so(tmp_path, when):
    writer = fail_to_save(tmp_path, 2, when)
    with pytest.raises(OSError, match=r"checkpoint-2 could not be written to .*\(no room.*there is no complete"):
        writer.wait()
    writer.wait()  # says it once
    save(tmp_path, 2)
    writer = fail_to_save(tmp_path, 4, when)
    with pytest.raises(OSError, match=r"GB are free there\); the newest complete checkpoint is checkpoint-2, from"):
        writer.begin(6)  # the next save hears of it
    assert steps(tmp_path, complete=False) == [2]
    assert hidden(tmp_path) == []


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path):
    go_on = threading.Event()
    writer = CheckpointWriter(tmp_path)
    (writer.begin(2) / "rng_state.pth").write_text("state")
    writer.finish(2, pieces("weights"), lambda folder: assert_true(go_on.wait(60)), lambda: None)
    assert steps(tmp_path, complete=False) == []
    go_on.set()
    writer.begin(4)  # waits
    assert steps(tmp_path) == [2]


def assert_true(value: bool) -> None:
    assert value


def test_a_file_that_does_not_fit_gives_one_line(tmp_path):
    """The system refuses to let a file grow, as a full disk does."""
    save(tmp_path / "run", 2)
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        said = "nothing"
        try:
            save(tmp_path / "run", 4, "w" * 4090)  # with its header it is larger than the limit
        except OSError as error:
            said = str(error)
        finally:
            (tmp_path / "said").write_text(said)
            os._exit(0)
    os.waitpid(child, 0)
    said = (tmp_path / "said").read_text()
    assert said.startswith("checkpoint-4 could not be written to ") and "\n" not in said
    assert "File too large" in said and "GB are free there" in said
    assert said.endswith(
        "newest complete checkpoint is checkpoint-2, from which --resume_from_checkpoint last goes on."
    )
    assert steps(tmp_path / "run", complete=False) == [2]
    assert hidden(tmp_path / "run") == []


def saves_of_two_ranks(folder: str) -> dict[str, torch.Tensor]:
    """Saves of which one goes well, with what each rank hears of it."""
    run = Path(folder) / "run"
    writer = CheckpointWriter(run)
    for step, failing in enumerate(FAILURES, start=1):
        checkpoint = writer.begin(step)
        if (failing, rank()) != ("random state", 1):
            (checkpoint / f"rng_state_{rank()}.pth").write_text("state")
        error = RuntimeError("no room") if (failing, rank()) == ("rank 1", 1) else None
        mine = Piece("param/all", (4,), 2 * rank(), torch.full((2,), float(rank())))
        if (failing, rank()) == ("disk of rank 1", 1):
            checkpoint.joinpath("state").mkdir(exist_ok=True)
            checkpoint.joinpath("state", "rank-00001-of-00002.safetensors").mkdir()
        complete = fail if failing == "teacher" else (lambda folder: None)
        writer.finish(step, [mine], complete, lambda: None, error)
        said = ""
        try:
            writer.wait()
        except OSError as error:
            said = str(error)
        (Path(folder) / f"said-{step}-{rank()}").write_text(said)
    return {}


# None comes first: what is saved must outlive what follows.
FAILURES = {
    "": "",
    "rank 1": "rank 1: no room",
    "disk of rank 1": "rank 1: ",
    "teacher": "rank 0: no room",
    "random state": "rank 0: rng_state_1.pth is missing; output_dir must be on a disk that all ranks share",
}


def begin_without_a_folder(folder: str) -> dict[str, torch.Tensor]:
    said = ""
    try:
        CheckpointWriter(Path(folder) / "run").begin(2)
    except OSError as error:
        said = str(error)
    (Path(folder) / f"said-{rank()}").write_text(said)
    return {}


def test_all_are_told_that_the_folder_cannot_be_made(tmp_path):
    (tmp_path / "run").write_text("a file")
    run_in_processes(begin_without_a_folder, 2, str(tmp_path))
    for index in range(2):
        said = (tmp_path / f"said-{index}").read_text()
        assert said.startswith(f"checkpoint-2 could not be written to {tmp_path / 'run'} (") and "\n" not in said


def test_what_one_rank_fails_with_all_are_told(tmp_path):
    run_in_processes(saves_of_two_ranks, 2, str(tmp_path))
    for step, (failing, reason) in enumerate(FAILURES.items(), start=1):
        for index in range(2):
            said = (tmp_path / f"said-{step}-{index}").read_text()
            if not failing:
                assert said == ""
                continue
            expected = reason.removeprefix(f"rank {index}: ")  # of its own it needs no number
            assert said.startswith(f"checkpoint-{step} could not be written to {tmp_path / 'run'} ({expected}"), said
            assert "the newest complete checkpoint is checkpoint-1, from" in said and "\n" not in said
    assert steps(tmp_path / "run", complete=False) == steps(tmp_path / "run") == [1]
    assert hidden(tmp_path / "run") == []
    assert saved_state(tmp_path / "run" / "checkpoint-1")["param/all"].tolist() == [0, 0, 1, 1]


def test_a_checkpoint_of_an_earlier_version_gets_its_manifest(tmp_path):
    save(tmp_path, 2)
    (tmp_path / "checkpoint-2" / MANIFEST).unlink()
    write_manifest(tmp_path / "checkpoint-2", step=2)
    assert steps(tmp_path) == [2]


def test_clean_up_leaves_what_is_not_its_own(tmp_path):
    clean_up(tmp_path / "nowhere")
    for name in (".git", ".cache.old", "runs", "checkpoint-best"):
        (tmp_path / name).mkdir()
    clean_up(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".cache.old", ".git", "checkpoint-best", "runs"]
    assert checkpoints(tmp_path) == []


def test_what_is_hidden_beside_a_run_stays(tmp_path):
    (tmp_path / ".venv.old" / "bin").mkdir(parents=True)
    (tmp_path / ".profile.saving").write_text("a file")
    (tmp_path / ".vits16.saving").mkdir()
    clean_up(tmp_path, names=("vits16",))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".profile.saving", ".venv.old"]
