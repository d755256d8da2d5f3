"""Callbacks of self-supervised training: the teacher's update, the collapse warning, the progress line, resuming."""

import logging
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dinov3_hf.data.sampler import StreamSampler
from dinov3_hf.distributed.engine import Engine
from dinov3_hf.models.dinov3_pretraining.modeling_dinov3_pretraining import DINOv3ForPreTraining
from dinov3_hf.training.ema import update_ema
from dinov3_hf.training.evaluation import described
from dinov3_hf.training.guards import NonFiniteGuard
from dinov3_hf.training.schedules import TrainingSchedules

logger = logging.getLogger(__name__)


class TeacherUpdateCallback(TrainerCallback):
    """Moves the teacher after each optimizer step that was taken, by the momentum of that step."""

    def __init__(self, schedules: TrainingSchedules, guard: NonFiniteGuard, engine: Engine) -> None:
        self.schedules = schedules
        self.guard = guard
        self.engine = engine

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        if self.guard.step_was_skipped:
            return
        model: DINOv3ForPreTraining = kwargs["model"]
        momentum = self.schedules.at(state.global_step)["teacher_momentum"]
        update_ema(model.teacher, model.student, momentum, self.engine)


class SeenSamplesCallback(TrainerCallback):
    """Tells the sampler of a resumed run how many samples it has seen; the Trainer then drops that many."""

    def __init__(self, sampler: StreamSampler) -> None:
        self.sampler = sampler

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.sampler.num_seen = state.global_step * self.sampler.batch_size


@dataclass
class _PrototypeUse:
    """What `CollapseWarningCallback` remembers of a head."""

    was_spread: bool = False
    low_since: int | None = None  # step
    has_warned: bool = False


class CollapseWarningCallback(TrainerCallback):
    """
    Warns when the teacher gives nearly all images, or all masked patches, to a handful of prototypes and goes on so.

    Once `prototypes/*_entropy` has been above `spread`, 50 steps below `collapsed` are a collapse. A network that
    starts with a small LayerScale sees no difference between images yet: before the entropy has risen, low values
    count only after a tenth of the run, and 500 steps at least. One warning a head until the entropy has recovered.
    """

    collapsed = 0.1
    spread = 0.2
    patience = 50  # steps
    first_patience = 500  # steps
    first_patience_share = 0.1  # of the run

    def __init__(self) -> None:
        self._uses = {"dino": _PrototypeUse(), "ibot": _PrototypeUse()}
        self._last_log = 0  # step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        for head, use in self._uses.items():
            entropy = (logs or {}).get(f"prototypes/{head}_entropy")
            if entropy is None:
                continue
            if entropy >= self.spread:
                use.was_spread, use.has_warned = True, False
            if entropy >= self.collapsed:
                use.low_since = None
                continue
            if use.low_since is None:
                use.low_since = self._last_log
            num_steps = state.global_step - use.low_since
            if num_steps >= self._patience(use, state) and not use.has_warned and state.is_world_process_zero:
                use.has_warned = True
                logger.warning(
                    "step %d: the %s head has collapsed, prototypes/%s_entropy has been below %g for %d steps (1 is "
                    "even use). Lower the learning rate, lengthen the warm-up, or enlarge the global batch.",
                    *(state.global_step, head, head, self.collapsed, num_steps),
                )
        if "loss" in (logs or {}):
            self._last_log = state.global_step

    def _patience(self, use: _PrototypeUse, state: TrainerState) -> float:
        if use.was_spread:
            return self.patience
        return max(self.first_patience, self.first_patience_share * state.max_steps)


class TrainingProgressCallback(ProgressCallback):
    """The Trainer's progress bar with time left, and one short line for each log instead of the whole dictionary."""

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero:  # a bar on terminals only: in a file each of its states would be a line
            self.training_bar = tqdm(total=state.max_steps, dynamic_ncols=True, disable=None)
        self.current_step = 0

    def close(self) -> None:
        """Leave the bar's line, so that what is printed next has one of its own; also after an error."""
        if self.training_bar is not None:
            self.training_bar.close()
            self.training_bar = None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.training_bar is None or not logs:
            return
        for line in self.lines(logs, state.global_step):
            self.training_bar.write(line)

    def lines(self, logs: dict[str, float], step: int) -> list[str]:
        """What to tell people of a log entry."""
        rate = f"  {logs['images_per_second']:.0f} img/s" if "images_per_second" in logs else ""
        lines = [f"step {step:>7,}  {_values(described(logs))}"] if described(logs) else []
        if "loss" in logs:
            lines.append(f"step {step:>7,}  {_terms(logs)}  lr {logs['learning_rate']:.2e}{rate}")
        return lines


class StudentsProgressCallback(TrainingProgressCallback):
    """The same with a line for each student."""

    def lines(self, logs: dict[str, float], step: int) -> list[str]:
        names = list(dict.fromkeys(key.partition("/")[0] for key in logs if key.count("/") > 0))
        rate = f"  {logs['images_per_second']:.0f} img/s" if "images_per_second" in logs else ""
        lines = []
        for name in names:
            own = {key.removeprefix(f"{name}/"): value for key, value in logs.items() if key.startswith(f"{name}/")}
            if evaluation := described(own):
                lines.append(f"step {step:>7,}  {name}  {_values(evaluation)}")
            if "loss" in own:
                lines.append(f"step {step:>7,}  {name}  {_terms(own)}  lr {own['schedule/lr']:.2e}{rate}")
                rate = ""
            elif "guard/stopped_at" in own:
                lines.append(f"step {step:>7,}  {name}  stopped at step {own['guard/stopped_at']:,}")
        return lines


def _values(evaluation: dict[str, str]) -> str:
    return "  ".join(f"{label} {value}" for label, value in evaluation.items())


def _terms(logs: dict[str, float]) -> str:
    terms = "".join(
        f"  {name.removeprefix('loss/')} {value:.3f}" for name, value in logs.items() if name.startswith("loss/")
    )
    return f"loss {logs['loss']:.3f}{terms}"
