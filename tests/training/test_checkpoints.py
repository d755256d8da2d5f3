"""Checkpoints that are whole or not there: a process is killed before each of its file operations in turn."""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dinov3_hf.training.checkpoints import (
    MANIFEST,
    checkpoints,
    clean_up,
    problem,
    remove_old_checkpoints,
    replacing_folder,
    saving_checkpoint,
    step_of,
    write_manifest,
)

FILE_OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")


def save(output_dir: Path, step: int, text: str = "weights", **options) -> None:
    with saving_checkpoint(
        output_dir, step, **{"rank": 0, "world_size": 1, "wait_for_everyone": lambda: None, **options}
    ) as staging:
        folder = staging / f"checkpoint-{step}"
        (folder / "teacher").mkdir(parents=True)
        (folder / "model.safetensors").write_text(text)
        (folder / "teacher" / "config.json").write_text(text)
        (folder / "rng_state.pth").write_text(text)


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


def test_manifest_lists_every_file(tmp_path):
    save(tmp_path, 2)
    manifest = json.loads((tmp_path / "checkpoint-2" / MANIFEST).read_text())
    assert manifest["step"] == 2
    assert sorted(manifest["files"]) == ["model.safetensors", "rng_state.pth", "teacher/config.json"]
    assert manifest["files"]["model.safetensors"]["bytes"] == len("weights")
    assert problem(tmp_path / "checkpoint-2", checksums=True) is None
    assert hidden(tmp_path) == []


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (
            lambda folder: (folder / "model.safetensors").write_text("weig"),
            "has 4 bytes instead of 7",
        ),
        (lambda folder: (folder / "model.safetensors").write_text("WEIGHTS"), "model.safetensors has other contents"),
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
            save(run, 6)
            remove_old_checkpoints(run, 6, keep_last=2, keep_every=None)

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
        texts.add((run / "checkpoint-2" / "model.safetensors").read_text())
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
    (tmp_path / "checkpoint-4" / "model.safetensors").unlink()
    remove_old_checkpoints(tmp_path, 6, keep_last=2, keep_every=None)
    assert steps(tmp_path) == [2, 6]


def test_later_checkpoints_of_a_run_that_was_taken_back_are_not_counted(tmp_path):
    for step in (2, 4, 6, 8):
        save(tmp_path, step)
    remove_old_checkpoints(tmp_path, 4, keep_last=1, keep_every=None)
    assert steps(tmp_path) == [4, 6, 8]


def test_a_failed_save_leaves_the_others_and_says_so(tmp_path):
    with (
        pytest.raises(OSError, match=r"checkpoint-2 could not be written to .*\(no room.*there is no complete"),
        saving_checkpoint(tmp_path, 2, rank=0, world_size=1, wait_for_everyone=lambda: None) as staging,
    ):
        (staging / "checkpoint-2").mkdir(parents=True)
        raise RuntimeError("no room")
    save(tmp_path, 2)
    with (
        pytest.raises(OSError, match=r"GB are free there\); the newest complete checkpoint is checkpoint-2, from"),
        saving_checkpoint(tmp_path, 4, rank=0, world_size=1, wait_for_everyone=lambda: None) as staging,
    ):
        (staging / "checkpoint-4").mkdir(parents=True)
        raise RuntimeError("no room")
    assert steps(tmp_path, complete=False) == [2]
    assert hidden(tmp_path) == []


def test_the_random_states_of_all_ranks_must_be_there(tmp_path):
    with (
        pytest.raises(OSError, match=r"rng_state_1.pth is missing; output_dir must be on a disk that all ranks"),
        saving_checkpoint(tmp_path, 2, rank=0, world_size=2, wait_for_everyone=lambda: None) as staging,
    ):
        (staging / "checkpoint-2").mkdir(parents=True)
        (staging / "checkpoint-2" / "rng_state_0.pth").write_text("state")
    assert steps(tmp_path, complete=False) == []


def test_another_rank_only_writes(tmp_path):
    waited = []
    with saving_checkpoint(
        tmp_path, 2, rank=1, world_size=2, wait_for_everyone=lambda: waited.append(True)
    ) as staging:
        (staging / "checkpoint-2").mkdir(parents=True)
    assert waited == [True]
    assert (staging / "checkpoint-2").is_dir()
    assert steps(tmp_path, complete=False) == []


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
