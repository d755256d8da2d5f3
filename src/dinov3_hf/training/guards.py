"""What keeps a long run from going wrong unnoticed: steps that are not finite, starvation of data, memory."""

import logging
import math
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

GIB = 2**30


class NotFinite(RuntimeError):
    """
    No later step will be better.

    Args:
        step: number of the step, from 1.
        reason: what is not finite.
    """

    def __init__(self, step: int, reason: str) -> None:
        super().__init__(
            f"step {step}: {reason}. The checkpoints are as they were; go on with --resume_from_checkpoint last "
            "--precision fp32, or start again with a lower learning_rate."
        )
        self.reason = reason


class NonFiniteGuard:
    """
    Says of each step whether it may touch optimizer and teacher, and ends a run that has none left that may.

    One bad step (a rare batch, a flipped bit) is best left out. Several in a row mean that the weights themselves have
    gone wrong, and that no later batch will be better.

    Attributes:
        step_was_skipped: the verdict on the last step.
        num_skipped: steps left out so far in this process.
    """

    max_in_a_row = 3

    def __init__(self) -> None:
        self.step_was_skipped = False
        self.num_skipped = 0
        self._in_a_row = 0

    def passes(
        self, step: int, values: Mapping[str, float], is_main: bool, left: str = "optimizer and teacher were"
    ) -> bool:
        """
        Whether every value of a step is finite.

        Args:
            step: number of the step, from 1.
            values: loss terms and gradient norms, already reduced over ranks, so that all come to the same verdict.
            is_main: whether this process speaks for the run.
            left: what a step that does not pass leaves as it is, with its verb.

        Raises:
            NotFinite: it is the third step in a row that does not pass.
        """
        not_finite = [name for name, value in values.items() if not math.isfinite(value)]
        self.step_was_skipped = bool(not_finite)
        if not not_finite:
            self._in_a_row = 0
            return True
        self.num_skipped += 1
        self._in_a_row += 1
        culprit = _culprit(not_finite)
        if self._in_a_row == self.max_in_a_row:
            raise NotFinite(step, f"{culprit} not finite, the third step in a row")
        if is_main:
            logger.warning(
                "step %d: %s not finite; %s left as they are, %d of %d in a row.",
                *(step, culprit, left, self._in_a_row, self.max_in_a_row),
            )
        return False


def _culprit(names: list[str]) -> str:
    """The names nearest to the cause: a loss term spoils their sum, and that the gradients."""
    for prefix in ("loss/", "loss", "grad_norm/"):
        nearest = [name for name in names if name.startswith(prefix)]
        if nearest:
            names = nearest
            break
    return f"{', '.join(names)} {'is' if len(names) == 1 else 'are'}"


class DataWait:
    """Measures the share of the time that a process waits for its next images."""

    def __init__(self) -> None:
        self._waited = 0.0
        self._since: float | None = None

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the code that waits."""
        start = time.perf_counter()
        if self._since is None:
            self._since = start
        yield
        self._waited += time.perf_counter() - start

    def pop(self) -> float:
        """Time waited / time passed since the last call, or since the first wait, in [0, 1]."""
        now = time.perf_counter()
        share = 0.0 if self._since is None else self._waited / (now - self._since)
        self._waited, self._since = 0.0, now
        return share


class StarvationWarningCallback(TrainerCallback):
    """
    Warns once in a run when `data/wait_share` is above a fifth.

    The first log is left out, because data workers take their time to start, and logs are taken together until they
    cover 10 seconds, because a single slow batch says nothing.
    """

    threshold = 0.2
    min_seconds = 10.0

    def __init__(self) -> None:
        self._last_log: float | None = None  # time in seconds
        self._waited = 0.0
        self._passed = 0.0
        self._has_warned = False

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        share = (logs or {}).get("data/wait_share")
        if share is None:
            return
        now = time.perf_counter()
        if self._last_log is not None:
            self._passed += now - self._last_log
            self._waited += share * (now - self._last_log)
        self._last_log = now
        if self._passed < self.min_seconds:
            return
        share = self._waited / self._passed
        self._waited = self._passed = 0.0
        if share > self.threshold and not self._has_warned and state.is_world_process_zero:
            self._has_warned = True
            logger.warning(
                "step %d: %.0f %% of the time is spent waiting for images. Raise dataloader_num_workers (now %d) as "
                "far as there are cores, or put smaller images on a faster disk.",
                *(state.global_step, 100 * share, args.dataloader_num_workers),
            )


def peak_memory(device: torch.device) -> float:
    """
    Most memory that this process has held so far, in GiB.

    On a CUDA device what its tensors took of the device, elsewhere what the process took of the machine, data workers
    not counted.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, KiB elsewhere
    return resident * (1 if sys.platform == "darwin" else 1024) / GIB
