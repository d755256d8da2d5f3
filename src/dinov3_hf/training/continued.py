"""Continued pre-training: the model to begin with, and a trainer that watches over it."""

import logging
import shutil
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy
from transformers.utils import logging as transformers_logging

from dinov3_hf.evals.features import load_model
from dinov3_hf.hub.model_card import keep_edited_card
from dinov3_hf.models.dinov3_pretraining.modeling_dinov3_pretraining import DINOv3ForPreTraining, SSLNetwork
from dinov3_hf.models.image_channels import ChannelStatistics, change_channels
from dinov3_hf.training.checkpoints import checkpoints, problem, replacing_folder, step_of
from dinov3_hf.training.continued_config import ContinuedConfig
from dinov3_hf.training.course import LogHistory, course
from dinov3_hf.training.evaluation import DenseHealthCallback, DriftCallback
from dinov3_hf.training.lora import add_adapters
from dinov3_hf.training.ssl_trainer import SSLTrainer
from dinov3_hf.training.starting_model import read_starting_model

logger = logging.getLogger(__name__)

KNN, PATCH_DRIFT = "eval_knn_top1", "eval_patch_drift"


def continued_model(args: ContinuedConfig) -> DINOv3ForPreTraining:
    """
    Student and teacher with the weights of `args.model`, for images of `args.num_channels`, and with fresh heads; the
    Gram teacher too. With `args.lora_rank` all of them have adapters.

    Raises:
        FileNotFoundError: the model has no weights.
        ValueError: its weights cannot be read, or are not those of its config.json.
    """
    start = read_starting_model(args.model)
    transformers_logging.disable_progress_bar()  # of reading weights; training has its own
    backbone, _ = load_model(start.source)
    after = ChannelStatistics(tuple(args.image_mean or ()), tuple(args.image_std or ()))
    change_channels(backbone, args.backbone_config().num_channels, start.statistics, after)
    weights = backbone.state_dict()
    model = DINOv3ForPreTraining(args.pretraining_config())
    for network in (model.student, model.teacher):
        network.backbone.load_state_dict(weights)
    if args.lora_rank is not None:
        for adapted in (model.student.backbone, model.teacher.backbone, model.gram_teacher):
            if adapted is not None:
                add_adapters(adapted, args.lora_rank, args.alpha)
        model.teacher.backbone.load_state_dict(model.student.backbone.state_dict())  # A is drawn at random
        model.train()  # freezes what the adapters have thawed in the teachers
    model.refresh_gram_teacher()
    return model


def num_trainable(model: DINOv3ForPreTraining) -> tuple[int, int]:
    """Parameters of the student's backbone: those that are trained, and all."""
    parameters = list(model.student.backbone.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


class ContinuedTrainer(SSLTrainer):
    """
    [`SSLTrainer`] that measures drift from the model it began with, keeps the best checkpoint, and stops when training
    does harm. `harm` then says why.

    Args:
        model: of `continued_model(args)`.
        args, train_images, eval_images, callbacks: as of [`SSLTrainer`].
    """

    args: ContinuedConfig

    def __init__(self, model: DINOv3ForPreTraining, args: ContinuedConfig, *images: Any, **options: Any) -> None:
        super().__init__(model, args, *images, **options)
        self.remove_callback(DenseHealthCallback)
        if self.is_world_process_zero():
            # Now: a checkpoint that is resumed from is not loaded yet.
            self.add_callback(DriftCallback(self.train_images, self.model.teacher.backbone, args))
        self.guard_against_harm = HarmCallback()
        self.add_callback(self.guard_against_harm)

    def empty_teacher(self) -> SSLNetwork:
        teacher = super().empty_teacher()
        if self.args.lora_rank is not None:
            add_adapters(teacher.backbone, self.args.lora_rank, self.args.alpha)
        return teacher

    def describe_start(self) -> str:
        """In a few lines what is trained, and how the first layer was converted."""
        args = self.args
        start = read_starting_model(args.model)
        trainable, total = num_trainable(self.model)
        lines = [
            f"Starts from {start.source}, with fresh heads: the backbone waits for {self.schedules.head_steps:,} of "
            f"{args.max_steps:,} steps, then joins in over {self.schedules.ramp_steps:,}."
        ]
        if args.lora_rank is not None:
            lines.append(
                f"Low-rank adapters of rank {args.lora_rank}: {trainable:,} of {total:,} parameters of the backbone "
                "are trained."
            )
        channels = start.config.num_channels
        if args.num_channels != channels:
            how = "are folded into one, exactly" if args.num_channels == 1 else f"repeat for {args.num_channels}"
            lines.append(
                f"The kernels of {channels} channels {how}; image_mean is {_rounded(args.image_mean)}, image_std "
                f"{_rounded(args.image_std)}."
            )
        return "\n".join(lines)

    def show_course(self) -> None:
        """Print the evaluations before, during and after."""
        headings, rows = course(self.state.log_history)
        # A narrow terminal wraps headings at spaces only.
        table = Table(
            *(heading.replace("-", " ") for heading in headings), box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False
        )
        for column in table.columns:
            column.justify = "right"
        for row in rows:
            table.add_row(*row)
        Console().print(table)

    def save_outcome(self, folder: Path) -> str:
        """
        Write the result to `folder`: the last teacher, or if training has done harm that of the best checkpoint.

        Returns:
            What to tell people.

        Raises:
            RuntimeError: training has done harm, and there is no checkpoint at least as good as the start.
        """
        best = best_checkpoint(Path(self.args.output_dir or "."), self.state)
        if self.harm is None:
            outcome = super().save_outcome(folder)
            is_last = best is None or step_of(best) == self.state.global_step
            better = "" if is_last else f"; the best one on the way is in {best}/teacher"
            return f"{outcome}{better}"
        remedy = "lower learning_rate, raise head_steps or gram_weight_schedule, or set lora_rank"
        said = f"stopped at step {self.state.global_step:,} of {self.args.max_steps:,}: {self.harm}"
        if best is None:
            raise RuntimeError(f"{said}. Nothing on the way was better than {self.args.model}: keep it; {remedy}.")
        if self.is_world_process_zero():
            with replacing_folder(folder) as staged:
                shutil.copytree(best / "teacher", staged, dirs_exist_ok=True)
                keep_edited_card(folder, staged)
        return (
            f"{said[0].upper()}{said[1:]}.\n{folder} is the teacher of {best.name}, the best. To go further, {remedy}."
        )

    @property
    def harm(self) -> str | None:
        """Why the run has stopped before its end; None if it has not."""
        return self.guard_against_harm.harm


class HarmCallback(TrainerCallback):
    """
    Stops a run whose teacher has lost more than `max_knn_drop` or moved further than `max_patch_drift`, and sees to it
    that a checkpoint of the best one exists.

    The start is the evaluation at step 0. Best is the highest kNN accuracy, or without labels the newest.
    """

    def __init__(self) -> None:
        self.harm: str | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert isinstance(args, ContinuedConfig)
        limits = (args.max_knn_drop, args.max_patch_drift)
        if args.eval_strategy == IntervalStrategy.NO and limits != (None, None) and state.is_world_process_zero:
            logger.warning(
                "max_knn_drop and max_patch_drift are not looked at with eval_strategy no; set eval_strategy: steps, "
                "or both to null."
            )

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert isinstance(args, ContinuedConfig)
        history = [entry for entry in state.log_history if PATCH_DRIFT in entry]
        now = history[-1]
        if state.global_step == 0:
            return
        self.harm = harm_done(args, history)
        if self.harm is not None:
            control.should_training_stop = True
            if state.is_world_process_zero:
                logger.warning("step %d: %s; stopping.", state.global_step, self.harm)
        elif all(now.get(KNN, 0.0) >= entry.get(KNN, 0.0) for entry in history):
            state.best_global_step = state.global_step
            control.should_save = args.save_strategy != SaveStrategy.NO


def harm_done(args: ContinuedConfig, history: LogHistory) -> str | None:
    """What is wrong with the newest of these evaluations beside that of step 0; None if nothing is."""
    start, now = history[0], history[-1]
    if args.max_knn_drop is not None and KNN in now and KNN in start:
        drop = start[KNN] - now[KNN]
        if drop > args.max_knn_drop:
            return (
                f"kNN accuracy {now[KNN]:.1f} % is {drop:.1f} points below that of the start, {start[KNN]:.1f} %, "
                f"more than max_knn_drop {args.max_knn_drop:g}"
            )
    if args.max_patch_drift is not None and now[PATCH_DRIFT] > args.max_patch_drift:
        return (
            f"patch features have moved {now[PATCH_DRIFT]:.2f} from the start (1 - mean cosine), more than "
            f"max_patch_drift {args.max_patch_drift:g}"
        )
    return None


def best_checkpoint(output_dir: Path, state: TrainerState) -> Path | None:
    """The complete checkpoint of the best step of a run, if there is one."""
    folders = [folder for folder in checkpoints(output_dir) if problem(folder) is None]
    return next((folder for folder in folders if step_of(folder) == state.best_global_step), None)


def _rounded(values: list[float] | None) -> list[float]:
    return [round(value, 3) for value in values or []]
