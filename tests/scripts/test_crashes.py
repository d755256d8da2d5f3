"""Runs of the real script that are killed, run out of disk or lose a process, and then go on."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dinov3_hf.data.crop_sizes import CropSizeMix, parse_crop_sizes
from dinov3_hf.training.checkpoints import MANIFEST, checkpoints, step_of
from tests.forks import CAN_MOUNT, ENVIRONMENT
from tests.scripts.runs import SCRIPTS, Runner, complete

MACHINE = ("images_per_second", "data/wait_share", "memory/peak_gib")
STEPS = 8
STATE = "state/rank-00000-of-00001.safetensors"  # of a run of one process

# Prototypes make checkpoints heavy (16 MB) and steps not.
RECIPE = f"""
train_data: digits
eval_data: null
backbone: {{patch_size: 4, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2,
           layerscale_value: 0.1, drop_path_rate: 0.2}}
dino_head: {{num_prototypes: 8192, bottleneck_dim: 32, hidden_dim: 32, num_layers: 2}}
ibot_head: {{num_prototypes: 8192, bottleneck_dim: 32, hidden_dim: 32, num_layers: 2}}
global_crop_size: 16
local_crop_size: 8
num_local_crops: 2
global_batch_size: 8
koleo_group_size: 4
drop_path_group_size: 4
max_steps: {STEPS}
lr_schedule: 1e-3
freeze_last_layer_steps: 0
teacher_temperature_schedule: 0.06
logging_steps: 1
save_strategy: steps
save_steps: 2
save_total_limit: 2
precision: fp32
use_cpu: true
report_to: none
disable_tqdm: true
"""

# Three resolutions, two of them in parts, with crops for a Gram teacher that is copied and refreshed on the way.
SIZES = [
    {"global": 16, "local": 8, "gram": 24, "probability": 0.4},
    {"global": 24, "local": 8, "gram": 32, "probability": 0.3, "per_device_train_batch_size": 4},
    {"global": 24, "local": 12, "gram": 32, "probability": 0.3, "per_device_train_batch_size": 4},
]
GRAM = ("--gram_teacher", "copy", "--gram_start_step", "1", "--gram_refresh_steps", "3")


@pytest.fixture(scope="module")
def runner(forks, tmp_path_factory):
    return Runner(forks, tmp_path_factory.mktemp("runner"), RECIPE)


@pytest.fixture(scope="module")
def whole(runner, tmp_path_factory) -> Path:
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    runner.finish(folder)
    return folder


def hidden(run: Path) -> list[str]:
    return [path.name for path in run.iterdir() if path.name.startswith(".")] if run.is_dir() else []


def losses(state_file: Path) -> list[dict[str, float]]:
    """Every number of every step, in full precision."""
    history = json.loads(state_file.read_text())["log_history"]
    return [
        {name: value for name, value in entry.items() if name not in MACHINE} for entry in history if "loss" in entry
    ]


def assert_same_end(run: Path, whole: Path) -> None:
    assert len(losses(whole / "trainer_state.json")) == STEPS
    assert losses(run / "trainer_state.json") == losses(whole / "trainer_state.json")
    states = sorted(path.relative_to(whole) for path in whole.glob(f"checkpoint-{STEPS}/state/*.safetensors"))
    assert states
    for name in (*states, "teacher/model.safetensors", "teacher/heads.safetensors"):
        ours, theirs = load_file(run / name), load_file(whole / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name
    assert hidden(run) == []


def kill_at_random(runner: Runner, whole: Path, tmp_path: Path, num_kills: int, seed: int) -> int:
    """Kill runs at random moments, every second time while a checkpoint is written; how many were writing one."""
    rng = random.Random(seed)
    run = tmp_path / "run-0"
    num_writing = 0
    for kill in range(num_kills):
        pid = runner.start(run)
        if kill % 2:
            time.sleep(rng.uniform(0, duration(whole)))
        else:
            wait_for_a_save(run)
            time.sleep(rng.uniform(0, 0.2))
        before = complete(run)
        os.kill(pid, signal.SIGKILL)
        status = runner.wait(pid)
        after = complete(run)
        num_writing += any(name.endswith(".saving") for name in hidden(run))
        assert status in (-signal.SIGKILL, 0), runner.log.read_text()
        assert [step_of(folder) for folder in checkpoints(run)] == after, "a half checkpoint has its final name"
        assert set(before[-1:]) <= set(after), "a completed save is lost"

        copy = Path(shutil.copytree(run, tmp_path / f"copy-{kill}")) if run.is_dir() else tmp_path / f"copy-{kill}"
        runner.finish(copy)
        assert_same_end(copy, whole)
        shutil.rmtree(copy)
        if STEPS in after:
            run = tmp_path / f"run-{kill + 1}"
    return num_writing


def duration(run: Path) -> float:
    """Seconds of the steps of a run, its checkpoints included."""
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    return next(entry["train_runtime"] for entry in history if "train_runtime" in entry)


def wait_for_a_save(run: Path) -> None:
    deadline = time.monotonic() + 60
    while not any(name.endswith(".saving") for name in hidden(run)):
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_killed_twice(runner, whole, tmp_path):
    kill_at_random(runner, whole, tmp_path, num_kills=2, seed=0)


@pytest.mark.slow
def test_killed_at_twenty_random_moments(runner, whole, tmp_path):
    seed = int(os.environ.get("DINOV3_HF_TEST_SEED", "1"))
    assert kill_at_random(runner, whole, tmp_path, num_kills=20, seed=seed) >= 4


def test_mixed_sizes_are_killed(runner, tmp_path):
    assert {CropSizeMix(parse_crop_sizes("", SIZES), seed=42).index_at(step) for step in range(STEPS)} == {0, 1, 2}
    words = ("--crop_sizes", json.dumps(SIZES), *GRAM)
    whole, run = tmp_path / "whole", tmp_path / "run"
    runner.finish(whole, *words)
    pid = runner.start(run, *words)
    deadline = time.monotonic() + 60
    while not checkpoints(run):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    assert runner.wait(pid) == -signal.SIGKILL
    assert complete(run) and STEPS not in complete(run)
    runner.finish(run, *words)
    assert_same_end(run, whole)


def test_newest_checkpoint_is_truncated(runner, whole, tmp_path):
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    weights = run / f"checkpoint-{STEPS}" / STATE
    os.truncate(weights, weights.stat().st_size - 1)
    runner.finish(run)
    said = [line for line in runner.log.read_text().splitlines() if "Ignored as incomplete" in line]
    assert len(said) == 1
    assert f"checkpoint-{STEPS} ({STATE} has" in said[0]
    assert said[0].endswith(f"going on from checkpoint-{STEPS - 2}.")
    assert_same_end(run, whole)


def assert_one_line(text: str) -> str:
    errors = [line for line in text.splitlines() if "error" in line.lower()]
    assert "Traceback" not in text
    assert len(errors) == 1, text
    assert errors[0].startswith("error: checkpoint-")
    return errors[0]


def test_no_room_for_a_file(runner, whole, tmp_path):
    limit = (whole / f"checkpoint-{STEPS}" / STATE).stat().st_size - 1
    run = tmp_path / "run"
    pid = runner.start(run, file_size=limit)
    assert runner.wait(pid) == 1
    line = assert_one_line(runner.log.read_text())
    assert line.startswith(f"error: checkpoint-2 could not be written to {run} (")
    assert line.endswith("there is no complete checkpoint yet.")
    assert hidden(run) == [] and checkpoints(run) == []
    runner.finish(run)
    assert_same_end(run, whole)


def sizes(checkpoint: Path) -> list[tuple[str, int]]:
    """Name and size of the files of a checkpoint, in the order of writing."""
    entries = json.loads((checkpoint / MANIFEST).read_text())["files"]
    order = sorted(entries, key=lambda name: (checkpoint / name).stat().st_mtime_ns)
    return [(name, entries[name]["bytes"]) for name in order]


@pytest.mark.skipif(not CAN_MOUNT, reason="may not mount a small disk")
@pytest.mark.parametrize("shares", [(0.5,), pytest.param(tuple(i / 12 for i in range(12)), marks=pytest.mark.slow)])
def test_disk_full_during_a_save(runner, whole, tmp_path, shares):
    """A disk with room for one checkpoint and a share of the next: each share runs out in another file."""
    disk, copy = tmp_path / "disk", tmp_path / "copy"
    disk.mkdir()
    one = sum(size for _, size in sizes(whole / f"checkpoint-{STEPS}"))
    reasons = set()
    for share in shares:
        room = int(one * (1 + share)) + 100_000
        assert runner.forks.command("mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", disk) == 0
        run = disk / "run"
        assert runner.wait(runner.start(run, "--save_total_limit", "1")) == 1, runner.log.read_text()
        line = assert_one_line(runner.log.read_text())
        assert line.startswith(f"error: checkpoint-4 could not be written to {run} (")
        assert line.endswith(
            "newest complete checkpoint is checkpoint-2, from which --resume_from_checkpoint last goes on."
        )
        reasons.add(line[line.index("(") : line.index(";")])
        assert runner.forks.command("cp", "-r", run, copy) == 0  # out of the runner's name space
        assert [step_of(folder) for folder in checkpoints(copy)] == complete(copy) == [2]
        assert hidden(copy) == []
        assert runner.forks.command("umount", disk) == 0
        runner.finish(copy)
        assert_same_end(copy, whole)
        shutil.rmtree(copy)
    assert len(reasons) > len(shares) // 3


@pytest.mark.slow
def test_one_of_two_processes_is_killed(tmp_path):
    recipe = tmp_path / "crash.yaml"
    recipe.write_text(RECIPE)

    def launch(run: Path, *arguments: str) -> subprocess.Popen[str]:
        torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
        words = [*torchrun, SCRIPTS / "pretrain.py", recipe, "--output_dir", run, *arguments]
        return subprocess.Popen(
            [str(word) for word in words],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
        )

    def finish(process: subprocess.Popen[str]) -> None:
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said[-3000:]

    whole, run = tmp_path / "whole", tmp_path / "run"
    finish(launch(whole))
    manifest = json.loads((whole / f"checkpoint-{STEPS}" / MANIFEST).read_text())
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= set(manifest["files"])

    process = launch(run)
    deadline = time.monotonic() + 200
    while not complete(run):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.005)
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(ranks[-1]), signal.SIGKILL)
    process.communicate(timeout=300)
    assert process.returncode != 0
    assert complete(run) and STEPS not in complete(run)
    finish(launch(run, "--resume_from_checkpoint", "last"))
    assert_same_end(run, whole)
