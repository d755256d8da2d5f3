"""Callbacks of self-supervised training: the teacher's update, the collapse warning, the progress line, resuming."""

import logging
from typing import Any

from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dinov3_hf.data.sampler import StreamSampler
from dinov3_hf.models.dinov3_pretraining.modeling_dinov3_pretraining import DINOv3ForPreTraining
from dinov3_hf.training.ema import update_ema
from dinov3_hf.training.evaluation import described
from dinov3_hf.training.guards import NonFiniteGuard
from dinov3_hf.training.schedules import TrainingSchedules

logger = logging.getLogger(__name__)


class TeacherUpdateCallback(TrainerCallback):
    """Moves the teacher after each optimizer step that was taken, by the momentum of that step."""

    def __init__(self, schedules: TrainingSchedules, guard: NonFiniteGuard) -> None:
        self.schedules = schedules
        self.guard = guard

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
        update_ema(model.teacher, model.student, momentum)


class SeenSamplesCallback(TrainerCallback):
    """Tells the sampler of a resumed run how many samples it has seen; the Trainer then drops that many."""

    def __init__(self, sampler: StreamSampler) -> None:
        self.sampler = sampler

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.sampler.num_seen = state.global_step * self.sampler.batch_size


class CollapseWarningCallback(TrainerCallback):
    """
    Warns when the teacher gives nearly all images, or all masked patches, to a handful of prototypes.

    One warning a head for each time that `prototypes/*_entropy` falls below the threshold. A network that starts
    with a small LayerScale sees no difference between images yet: until a tenth of the run is over, low values count
    only once they have been higher.
    """

    threshold = 0.1
    grace = 0.1  # share of the run

    def __init__(self) -> None:
        self._armed: set[str] = set()
        self._grace_is_over = False

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if self._is_first_log_after_grace(state):
            self._armed = {"dino", "ibot"}
        for head in ("dino", "ibot"):
            entropy = (logs or {}).get(f"prototypes/{head}_entropy")
            if entropy is None:
                continue
            if entropy >= self.threshold:
                self._armed.add(head)
            elif head in self._armed:
                self._armed.discard(head)
                logger.warning(
                    "Step %d: the %s head is collapsing, its prototype entropy is %.3f (1 is even use). Lower the "
                    "learning rate, lengthen the warm-up, or enlarge the global batch.",
                    state.global_step,
                    head,
                    entropy,
                )

    def _is_first_log_after_grace(self, state: TrainerState) -> bool:
        if self._grace_is_over or state.global_step <= self.grace * state.max_steps:
            return False
        self._grace_is_over = True
        return True


class TrainingProgressCallback(ProgressCallback):
    """The Trainer's progress bar with time left, and one short line for each log instead of the whole dictionary."""

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
        if evaluation := described(logs):
            values = "  ".join(f"{label} {value}" for label, value in evaluation.items())
            self.training_bar.write(f"step {state.global_step:>7,}  {values}")
        if "loss" not in logs:
            return
        terms = "  ".join(
            f"{name.removeprefix('loss/')} {value:.3f}" for name, value in logs.items() if name.startswith("loss/")
        )
        line = f"step {state.global_step:>7,}  loss {logs['loss']:.3f}  {terms}  lr {logs['learning_rate']:.2e}"
        if "images_per_second" in logs:
            line += f"  {logs['images_per_second']:.0f} img/s"
        self.training_bar.write(line)
