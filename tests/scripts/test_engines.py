"""The real scripts on two processes of each engine: the steps of one process, after a killed rank and a change too."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dinov3_hf.training.checkpoints import checkpoints, problem
from tests.forks import ENVIRONMENT
from tests.scripts.runs import Ranks, Runner
from tests.scripts.test_crashes import RECIPE
from tests.testing_utils import REPOSITORY, require_package

# `make test-engines` and CI run them.
pytestmark = [pytest.mark.slow, require_package("deepspeed")]

ENGINES = ("ddp", "fsdp2", "zero3")
STEPS = 20
# Whatever could depend on the rank is on: stochastic depth, RoPE augmentation, KoLeo groups over both ranks.
OPTIONS = [
    *(
        "--max_steps",
        STEPS,
        "--save_steps",
        10,
        "--lr_schedule",
        "{start: 0.0, peak: 5.0e-4, end: 1.0e-5, warmup_steps: 5}",
    ),
    *("--backbone.pos_embed_rescale", 2.0, "--koleo_group_size", 8, "--teacher_momentum_schedule", 0.99),
    *("--dino_head.num_prototypes", 64, "--ibot_head.num_prototypes", 64),
]
TERMS = ("loss", "loss/dino_global", "loss/dino_local", "loss/ibot", "loss/koleo", "loss/gram")


@pytest.fixture(scope="module")
def runner(forks, tmp_path_factory):
    return Runner(forks, tmp_path_factory.mktemp("runner"), RECIPE)


def train(runner: Runner, run: Path, num_ranks: int, *arguments: object) -> Path:
    ranks = Ranks(runner, run, num_ranks, *OPTIONS, *arguments)
    assert ranks.wait() == [0] * num_ranks, ranks.said()
    return run


def losses(run: Path) -> list[dict[str, float]]:
    entries = json.loads((run / "trainer_state.json").read_text())["log_history"]
    return [{name: entry[name] for name in TERMS if name in entry} for entry in entries if "loss" in entry]


def assert_same_losses(run: Path, expected: Path, steps: int, rel: float) -> None:
    found, wanted = losses(run), losses(expected)
    assert len(found) == len(wanted) == steps
    for step, (ours, theirs) in enumerate(zip(found, wanted, strict=True), 1):
        assert ours == pytest.approx(theirs, rel=rel), f"step {step}"


@pytest.fixture(scope="module")
def one(runner, tmp_path_factory) -> Path:
    """An uninterrupted run of one process."""
    return train(runner, tmp_path_factory.mktemp("one") / "run", 1)


@pytest.fixture(scope="module")
def killed(runner, tmp_path_factory) -> dict[str, Path]:
    """Runs of two processes, of which the second is killed when the first checkpoint is there."""
    runs = {}
    for engine in ENGINES:
        runs[engine] = run = tmp_path_factory.mktemp(engine) / "run"
        ranks = Ranks(runner, run, 2, *OPTIONS, "--engine", engine)
        deadline = time.monotonic() + 400  # DeepSpeed compiles an operator the first time
        while not (found := checkpoints(run)) or problem(found[-1]) is not None:
            assert time.monotonic() < deadline, ranks.said()
            time.sleep(0.02)
        os.kill(ranks.pids[1], signal.SIGKILL)
        time.sleep(1)
        os.kill(ranks.pids[0], signal.SIGKILL)  # as launchers do
        assert ranks.wait()[1] == -signal.SIGKILL, "the run was over before the kill"
        assert not (run / "teacher").exists()
    return runs


@pytest.mark.invariant
@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_that_loses_a_rank_goes_on_as_one_process_does(runner, one, killed, engine):
    """The engine's own steps before the kill and after it."""
    run = train(runner, killed[engine], 2, "--engine", engine)
    assert_same_losses(run, one, STEPS, rel=1e-5)


@pytest.mark.invariant
@pytest.mark.parametrize(
    ("start", "engine", "num_ranks"), [("fsdp2", "zero3", 2), ("zero3", "fsdp2", 2), ("fsdp2", "ddp", 1)]
)
def test_a_run_goes_on_with_another_engine_and_number_of_ranks(
    runner, one, killed, tmp_path, start, engine, num_ranks
):
    checkpoint = killed[start] / "checkpoint-10"
    options = ("--engine", engine, "--resume_from_checkpoint", checkpoint)
    run = train(runner, tmp_path / "run", num_ranks, *options)
    assert_same_losses(run, one, STEPS, rel=1e-5)


@pytest.mark.invariant
@pytest.mark.parametrize("engine", ENGINES)
def test_accumulation_is_one_batch(runner, one, tmp_path, engine):
    run = train(runner, tmp_path / "run", 2, "--engine", engine, "--per_device_train_batch_size", 4)
    assert_same_losses(run, one, STEPS, rel=1e-5)


@pytest.mark.invariant
@pytest.mark.parametrize("engine", ENGINES)
def test_gram_anchoring_starts_from_the_state_of_one_process(runner, one, tmp_path, engine):
    options = ("--from", one, "--max_steps", 4, "--gram_refresh_steps", 2, "--gram_first_refresh_step", 2)
    # The term begins in the middle, and with it another forward.
    stage = ("--gram_teacher", "copy", "--gram_weight_schedule", 2.0, "--gram_start_step", 1, "--lr_schedule", 1e-4)
    runs = {}
    for name, num_ranks in (("ddp", 1), (engine, 2)):
        runs[num_ranks] = tmp_path / f"{name}-{num_ranks}"
        ranks = Ranks(
            runner,
            runs[num_ranks],
            num_ranks,
            *(*OPTIONS, *options, *stage, "--engine", name),
            script="gram_anchor.py",
        )
        assert ranks.wait() == [0] * num_ranks, ranks.said()
    assert_same_losses(runs[2], runs[1], 4, rel=1e-5)
    assert ["loss/gram" in entry for entry in losses(runs[2])] == [False, True, True, True]


@pytest.mark.parametrize("engine", ENGINES)
def test_bf16_stays_near_one_process(runner, tmp_path, engine):
    """To 2 %: a weight in bfloat16 has 8 bits, and ranks add up their gradients in another order."""
    options = ("--precision", "bf16", "--max_steps", 6)
    alone = train(runner, tmp_path / "one", 1, *options)
    run = train(runner, tmp_path / "two", 2, *options, "--engine", engine)
    assert_same_losses(run, alone, 6, rel=2e-2)


def test_the_command_of_the_readme(tmp_path):
    """With its launcher: the only one there for several processes."""
    readme = (REPOSITORY / "README.md").read_text()
    [command] = re.findall(r"^accelerate (launch --config_file .*)$", readme, re.MULTILINE)
    accelerate = Path(sys.executable).with_name("accelerate")
    words = [str(accelerate), *shlex.split(command), "--max_steps", "2", "--output_dir", str(tmp_path / "run")]
    done = subprocess.run(words, cwd=REPOSITORY, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list((tmp_path / "run" / "checkpoint-2" / "state").glob("rank-*-of-00002.safetensors"))) == 2
