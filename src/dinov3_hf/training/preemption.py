"""Preemption: a signal lets a run save itself at the end of its step and ask to be queued again."""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

# What schedulers send: SLURM as many seconds before the end as --signal says, Kubernetes and clouds on eviction.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
STATUS = 75  # EX_TEMPFAIL of sysexits.h: try again later


class Preempted(SystemExit):
    """The run was told to end, and has saved itself: a process that does not catch it ends with status 75."""

    def __init__(self) -> None:
        super().__init__(STATUS)


class PreemptionCallback(TrainerCallback):
    """
    Ends training with a checkpoint once any process has had SIGTERM or SIGUSR1.

    A signal is remembered; with the gradient norms of each step the processes tell each other, so that all of them
    stop behind the same step. A further one ends the process at once, unless it comes within `patience`: launchers
    pass on to their processes what the scheduler has sent to these too.
    """

    patience = 5.0  # seconds

    def __init__(self) -> None:
        self._told_at: float | None = None  # seconds
        self._is_agreed = False

    @property
    def is_told(self) -> bool:
        """Whether this process has had a signal."""
        return self._told_at is not None

    def agree(self, any_is_told: bool) -> None:
        """Take in whether any process has had a signal, the same on all of them."""
        self._is_agreed = any_is_told

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Remember the signals that come during the block, which a thread other than the main one cannot."""
        self._told_at, self._is_agreed = None, False
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._remember) for number in SIGNALS}
        for number in SIGNALS:
            signal.siginterrupt(number, False)  # not every library takes up an interrupted read or write again
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self._told_at is None:
            self._told_at = time.monotonic()
        elif time.monotonic() - self._told_at >= self.patience:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._is_agreed:
            control.should_save = control.should_training_stop = True

    def end_run(self, state: TrainerState, wait_for_everyone: Callable[[], None]) -> None:
        """
        Called when training is over and its checkpoints are in place.

        Args:
            state: of the run.
            wait_for_everyone: returns when all processes have called it.

        Raises:
            Preempted: it is over because of a signal.
        """
        if not self._is_agreed:
            return
        wait_for_everyone()  # launchers end the others as soon as one has ended
        if state.is_world_process_zero:
            logger.warning(
                "Told to end: saved at step %d of %d. The same command with --resume_from_checkpoint auto goes on.",
                *(state.global_step, state.max_steps),
            )
        raise Preempted


def leave_signals_to_the_run(worker: int) -> None:
    """
    Let a data worker outlive the signals of `SIGNALS`, which schedulers send to every process: its run needs it to the
    end of the step, and ends it then. For `DataLoader(worker_init_fn=...)`.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
