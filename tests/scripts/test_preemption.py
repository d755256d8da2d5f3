"""Runs of the real script that are told to end at any moment, save themselves, and go on when queued again."""

import os
import random
import re
import signal
import time
from pathlib import Path

import pytest

from tests.scripts.runs import Ranks, Runner, complete
from tests.scripts.test_crashes import RECIPE, STEPS, assert_same_end, duration, hidden, losses

PREEMPTED = 75
SAID = re.compile(
    r"Told to end: saved at step (\d) of 8\. The same command with --resume_from_checkpoint auto goes on\."
)


@pytest.fixture(scope="module")
def runner(forks, tmp_path_factory):
    return Runner(forks, tmp_path_factory.mktemp("runner"), RECIPE)


def wait_for_handlers(ranks: Ranks) -> None:
    """Until every process takes note of signals: before, they end it as they end any program."""
    for pid in ranks.pids:
        deadline = time.monotonic() + 60
        while not catches(pid, signal.SIGTERM):
            assert time.monotonic() < deadline, ranks.said()
            time.sleep(0.001)


def catches(pid: int, number: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    caught = re.search(r"SigCgt:\s*([0-9a-f]+)", status)
    is_gone = "State:\tZ" in status
    return is_gone or (caught is not None and bool(int(caught[1], 16) >> (number - 1) & 1))


def tell_at_random(
    runner: Runner, whole: Path, run: Path, num_ranks: int, times: int, rng: random.Random, *words: str
) -> int:
    """Tell a run to end, and the one that goes on from it, so many `times` or until one has come to its end before;
    how many were told."""
    num_told = 0
    while num_told < times:
        before = complete(run)
        ranks = Ranks(runner, run, num_ranks, *words)
        wait_for_handlers(ranks)
        time.sleep(rng.uniform(0, 0.7 * duration(whole)))  # the machine may be faster now
        os.kill(rng.choice(ranks.pids), rng.choice([signal.SIGTERM, signal.SIGUSR1]))
        statuses = ranks.wait()
        after = complete(run)
        if statuses == [PREEMPTED] * num_ranks:
            num_told += 1
            said = SAID.findall(ranks.said())
            assert len(said) == 1, ranks.said()
            assert after[-1] == int(said[0]) > (before[-1] if before else 0)
            assert losses(run / f"checkpoint-{said[0]}" / "trainer_state.json") == losses_until(whole, int(said[0]))
            assert "Traceback" not in ranks.said() and hidden(run) == []
            continue
        assert after[-1] == STEPS and PREEMPTED not in statuses, ranks.said()
        if any(statuses):  # the signal came behind the last step, while the teacher was written
            break
        return num_told
    assert Ranks(runner, run, num_ranks, *words).wait() == [0] * num_ranks
    return num_told


def losses_until(whole: Path, step: int) -> list[dict[str, float]]:
    return [entry for entry in losses(whole / "trainer_state.json") if entry["step"] <= step]


def tell(runner: Runner, tmp_path: Path, num_ranks: int, times: int, seed: int, *words: str) -> None:
    """Tell runs to end, as many as it takes to tell them so many `times`; each comes to what an unbroken one does."""
    whole = tmp_path / "whole"
    ranks = Ranks(runner, whole, num_ranks, *words)
    assert set(ranks.wait()) == {0}, ranks.said()
    rng = random.Random(seed)
    num_told = num_runs = 0
    while num_told < times:
        run = tmp_path / f"run-{num_runs}"
        num_told += tell_at_random(runner, whole, run, num_ranks, times - num_told, rng, *words)
        assert_same_end(run, whole)
        num_runs += 1
        assert num_runs <= 3 * times


# Two processes have 4 images each, less than a group of stochastic depth.
TWO = ("--backbone.drop_path_rate", "0")


def test_one_process_is_told(runner, tmp_path):
    tell(runner, tmp_path, 1, 1, 0)


def test_one_of_two_processes_is_told(runner, tmp_path):
    tell(runner, tmp_path, 2, 1, 1, *TWO)


@pytest.mark.slow
@pytest.mark.parametrize(("num_ranks", "engine"), [(1, "ddp"), (2, "ddp"), (2, "fsdp2"), (2, "zero3")])
def test_told_twenty_times(runner, tmp_path, num_ranks, engine):
    if engine == "zero3":
        pytest.importorskip("deepspeed")
    seed = int(os.environ.get("DINOV3_HF_TEST_SEED", "2"))
    tell(runner, tmp_path, num_ranks, 20, seed, *(TWO if num_ranks == 2 else ()), "--engine", engine)


def test_data_workers_are_told_too(runner, tmp_path):
    """Schedulers signal every process of a job; with the workers gone the step could not be finished."""
    words = ("--dataloader_num_workers", "2")
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert Ranks(runner, whole, 1, *words).wait() == [0]
    ranks = Ranks(runner, run, 1, *words)
    deadline = time.monotonic() + 60
    while not complete(run):
        assert time.monotonic() < deadline, ranks.said()
        time.sleep(0.001)
    (pid,) = ranks.pids
    workers = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    assert len(workers) >= 2
    for process in (*workers, pid):
        os.kill(process, signal.SIGTERM)
    assert ranks.wait() == [PREEMPTED], ranks.said()
    assert len(SAID.findall(ranks.said())) == 1
    assert Ranks(runner, run, 1, *words).wait() == [0]
    assert_same_end(run, whole)
