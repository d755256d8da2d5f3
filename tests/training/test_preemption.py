"""Signals that a run takes note of, and what becomes of them."""

import os
import signal
import threading
import time

import pytest
from transformers import TrainerCallback, TrainerControl, TrainerState

from dinov3_hf.training.checkpoints import checkpoints
from dinov3_hf.training.preemption import SIGNALS, Preempted, PreemptionCallback
from dinov3_hf.training.resume import find_checkpoint
from tests.training.test_ssl_trainer import make_args, make_trainer


class Signal(TrainerCallback):
    """Sends this process a signal when a step begins."""

    def __init__(self, number: int, step: int):
        self.number, self.step = number, step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), self.number)


def handlers():
    return [signal.getsignal(number) for number in SIGNALS]


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("step", [0, 5])
def test_saves_behind_the_step_and_goes_on(tmp_path, number, step, caplog):
    before = handlers()
    trainer = make_trainer(tmp_path, save_strategy="no", callbacks=[Signal(number, step)])
    with pytest.raises(Preempted) as ended:
        trainer.train(resume_from_checkpoint="auto")
    assert ended.value.code == 75
    assert handlers() == before
    assert [folder.name for folder in checkpoints(tmp_path)] == [f"checkpoint-{step + 1}"]
    assert caplog.messages == [
        f"Told to end: saved at step {step + 1} of 6. The same command with --resume_from_checkpoint auto goes on."
    ]
    resumed = make_trainer(tmp_path, save_strategy="no")
    resumed.train(resume_from_checkpoint="auto")
    assert resumed.state.global_step == 6
    assert [entry["step"] for entry in resumed.state.log_history if "loss" in entry] == [1, 2, 3, 4, 5, 6]


def test_auto_starts_afresh_without_a_complete_checkpoint(tmp_path, caplog):
    args = make_args(tmp_path)
    assert find_checkpoint("auto", args, {}) is None
    assert caplog.messages == []
    (tmp_path / "checkpoint-2").mkdir()
    assert find_checkpoint("auto", args, {}) is None
    assert caplog.messages == [
        f"{tmp_path} holds no complete checkpoint: checkpoint-2 (manifest.json is missing); starting afresh."
    ]
    with pytest.raises(FileNotFoundError, match="holds no complete checkpoint"):
        find_checkpoint("last", args, {})


def test_a_further_signal_ends_the_process(monkeypatch):
    killed = []
    monkeypatch.setattr(os, "kill", lambda process, number: killed.append((number, signal.getsignal(number))))
    preemption = PreemptionCallback()
    before = handlers()
    with preemption.watching():
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGTERM)  # passed on by a launcher
        assert killed == [] and preemption.is_told
        preemption.patience = 0.0
        signal.raise_signal(signal.SIGTERM)
        assert killed == [(signal.SIGTERM, signal.SIG_DFL)]
    assert handlers() == before


def test_one_process_is_enough():
    state = TrainerState(global_step=3, max_steps=9, is_world_process_zero=False)
    waits = []
    preemption = PreemptionCallback()
    with preemption.watching():
        assert not preemption.is_told
        preemption.agree(True)
        control = TrainerControl()
        preemption.on_step_end(None, state, control)
        assert control.should_save and control.should_training_stop
    with pytest.raises(Preempted):
        preemption.end_run(state, lambda: waits.append(time.monotonic()))
    assert len(waits) == 1


def test_nothing_happens_without_a_signal():
    preemption = PreemptionCallback()
    with preemption.watching():
        preemption.agree(False)
        control = TrainerControl()
        preemption.on_step_end(None, TrainerState(), control)
        assert not control.should_save and not control.should_training_stop
    preemption.end_run(TrainerState(), pytest.fail)


def test_leaves_signals_alone_in_other_threads():
    seen = []

    def watch():
        with PreemptionCallback().watching():
            seen.append(handlers())

    before = handlers()
    thread = threading.Thread(target=watch)
    thread.start()
    thread.join()
    assert seen == [before]
