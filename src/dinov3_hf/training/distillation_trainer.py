"""`DistillationTrainer`: one fixed teacher, several students at once (DINOv3, arXiv 2508.10104, section 5.2).

What it adds to [`RunTrainer`], overrides of the Trainer's internals:

    get_batch_samples       the teacher looks at each image once, for all students; where ranks are in groups, images
                            and answers go to them
    training_step           the students of this rank learn from a micro-batch, one after the other
    _clip_grad_norm         a student whose step is not finite skips it, the third time it is stopped
    create_optimizer        one step for the optimizers and moving averages of all students;  create_scheduler
    _wrap_model             each student has been wrapped by its engine
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3_hf.data.sources.base import Images
from dinov3_hf.distributed.engine import ShardedModel, empty_parameters_to_buffers
from dinov3_hf.distributed.fsdp2 import FSDP2Engine
from dinov3_hf.distributed.pieces import Piece, StateReader, on_host, state_file, write_pieces
from dinov3_hf.distributed.reductions import all_reduce_max, gather_lists
from dinov3_hf.distributed.student_ranks import choose_student_ranks
from dinov3_hf.hub.model_card import keep_edited_card
from dinov3_hf.models.dinov3_pretraining.distillation_targets import (
    TeacherAnswer,
    distillation_targets,
    teacher_answer,
)
from dinov3_hf.models.dinov3_pretraining.modeling_dinov3_distillation import student_network
from dinov3_hf.training.callbacks import StudentsProgressCallback, TrainingProgressCallback
from dinov3_hf.training.checkpoint_writer import STATE
from dinov3_hf.training.checkpoints import replacing_folder
from dinov3_hf.training.distillation_config import AUTO, DistillationConfig
from dinov3_hf.training.distillation_teacher import DistillationTeacher
from dinov3_hf.training.evaluation import DenseHealthCallback, Evaluator, KnnCallback, ask
from dinov3_hf.training.rank_groups import RankGroups
from dinov3_hf.training.run_card import write_run_card
from dinov3_hf.training.run_trainer import Batch, EvaluationImages, RunTrainer
from dinov3_hf.training.student import Student, step_of_stopped
from dinov3_hf.training.student_times import measure_students
from dinov3_hf.training.teacher_folder import save_teacher_folder
from dinov3_hf.training.whole_network import network_of_pieces

STOPPED = "stopped_students.json"
_STAGED = "students"  # pieces of all of them, on the way to their folders


class DistillationTrainer(RunTrainer):
    """
    Trains the students of a recipe to predict what a teacher says of images.

    Args:
        teacher: of `load_teacher(args.description, bf16=args.bf16)`.
        args: the recipe.
        train_images: what to learn from; labels are not looked at.
        eval_images: labelled reference and query images for the k-nearest-neighbour evaluation of each student; None
            for the query classifies each reference image by all the others.
        callbacks: further `TrainerCallback`s; an [`Evaluator`] measures every student.

    Attributes:
        students: those that this rank trains; their `model` has `student` and `ema`.
        student_seconds: measured, of a step of each on one rank, with `student_ranks: auto`; else None.
    """

    args: DistillationConfig
    progress_callback: ClassVar[type[TrainingProgressCallback]] = StudentsProgressCallback

    def __init__(
        self,
        teacher: DistillationTeacher,
        args: DistillationConfig,
        train_images: Images,
        eval_images: EvaluationImages | None = None,
        callbacks: list[Any] | None = None,
    ) -> None:
        self.student_seconds = self._measured_split(args) if args.student_ranks == AUTO else None
        self._networks = nn.ModuleDict()  # what the Trainer takes for the model
        super().__init__(self._networks, args, train_images, eval_images, callbacks)
        self.teacher = teacher
        is_split = args.split is not None and len(args.split) > 1
        self._groups = RankGroups(args) if is_split else None
        own, group = args.student_args, None
        if self._groups is not None:
            own, group = {self._groups.name: own[self._groups.name]}, self._groups.group
        self.students = [
            Student(name, student, self._evaluators(eval_images), group, self.accelerator.autocast)
            for name, student in own.items()
        ]
        for student in self.students:
            self._networks[student.name] = student.model
        self.schedules = args.schedules()  # of what is the same for all students
        self.stopped: dict[str, int] = {}  # student -> step, on all ranks the same
        self._is_prepared = False
        self._skipped = False
        self._num_parts = 1  # forward passes of each student in the present step

    @staticmethod
    def _measured_split(args: DistillationConfig) -> dict[str, float]:
        seconds = measure_students(args)
        args.split_ranks(choose_student_ranks(seconds, args.world_size, args.global_batch_size, args.can_have))
        return seconds

    def _evaluators(self, eval_images: EvaluationImages | None) -> list[Evaluator]:
        knn = [] if eval_images is None else [KnnCallback(*eval_images)]
        return [*knn, DenseHealthCallback(self.train_images)]

    def _prepare_networks(self, afresh: bool) -> None:
        args, teacher = self.args, self.teacher
        if args.place_model_on_device or args.launched.engine == "zero2":
            teacher.to(args.device)
        elif not self._is_prepared:
            empty_parameters_to_buffers(teacher.backbone)
            # Under ZeRO-3 too: DeepSpeed has one engine for one network. Heads are called layer by layer.
            engine = FSDP2Engine(args.device, False, False, self.accelerator.autocast)
            engine.shard([teacher.backbone], teacher.blocks())
            for head in (teacher.dino_head, teacher.ibot_head):
                if head is not None:
                    head.to(args.device)
        self._is_prepared = True
        for student in self.students:
            if afresh:
                student.load_start()
            student.prepare()

    def _wrap_model(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        return self.model_wrapped if self.model_wrapped is not self.model else ShardedModel(self.model)

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        if self.optimizer is None:
            self.optimizer = _AllOptimizers(self)  # type: ignore[assignment]
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:
            self.lr_scheduler = _AllSchedulers(self.students)  # type: ignore[assignment]
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[list[Batch]], Tensor | int | None]:
        """
        The micro-batches of one optimizer step that this rank's students train on, with the teacher's targets,
        balanced over the whole global batch.
        """
        split, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        parts = [part for batch in split for part in batch]
        # Float crops are four times as large as bytes, and do not travel.
        keeps_crops = len(parts) == 1 and self._groups is None
        answers = [self._ask_teacher(part, keeps_crops) for part in parts]
        if self._groups is not None:
            parts, answers = self._groups.share_out(parts, answers)
        self._num_parts = len(parts)
        masks = [part["mask"].to(device) for part in parts]
        with self.students[0].in_group():
            targets = distillation_targets(
                answers,
                masks,
                self.teacher.dino_head,
                self.teacher.ibot_head,
                self.schedules.at(self.state.global_step)["teacher_temperature"],
                self.args.sinkhorn_iterations,
                self.args.objective,
            )
        for part, target in zip(parts, targets, strict=True):
            part["target"] = target
        # In as many micro-batches as the Trainer has counted.
        bounds = [len(parts) * k // len(split) for k in range(len(split) + 1)]
        return [parts[start:stop] for start, stop in pairwise(bounds)], num_items

    def _ask_teacher(self, part: Batch, keeps_crops: bool) -> TeacherAnswer:
        inputs = self._prepare_inputs({name: part[name] for name in ("global_crops", "global_photometric", "mask")})
        crops = self._finished(inputs, "global")
        if keeps_crops:
            part["global_crops"] = crops
        tokens = self.teacher(self._normalized_for_teacher(crops))
        args = self.args
        side = args.mask_grid(args.crop_size_mix().sizes[0])
        return teacher_answer(
            tokens,
            self.teacher.dino_head,
            None if args.mask_free else self.teacher.ibot_head,
            inputs["mask"],
            (side, side),
            objective=args.objective,
            with_patches=args.wants_patches,
        )

    def _normalized_for_teacher(self, crops: Tensor) -> Tensor:
        """Crops (I, C, H, W) as the teacher's image processor would normalise them."""
        statistics, args = self.teacher.description.statistics, self.args
        if (list(statistics.mean), list(statistics.std)) == (args.image_mean, args.image_std):
            return crops
        mean, std, theirs, their_std = (
            torch.tensor(values).view(-1, 1, 1)
            for values in (args.image_mean, args.image_std, statistics.mean, statistics.std)
        )
        scale, shift = (std / their_std).to(crops.device), ((mean - theirs) / their_std).to(crops.device)
        return crops * scale + shift

    def training_step(  # type: ignore[override]  # what get_batch_samples returns
        self, model: nn.Module, inputs: list[Batch], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        model.train()
        loss = torch.zeros((), device=self.args.device)
        active = [student for student in self.students if student.is_active]
        for part in inputs if active else []:
            is_last = self.accelerator.sync_gradients and part is inputs[-1]
            views = self._views(part)
            part.clear()  # the Trainer keeps the batches of a step until it has the next
            for student in active:
                loss += student.learn(views, self.state.global_step, 1 / self._num_parts, is_last)
        # The log has the means over good steps; the Trainer's own sum would stay NaN for the rest of the run.
        return torch.where(loss.isfinite(), loss, torch.zeros_like(loss))

    def _views(self, part: Batch) -> Batch:
        """What the students see: crops finished, and in their size."""
        inputs = self._prepare_inputs(part)
        crops = {
            f"{kind}_crops": self._resized(self._finished(inputs, kind), size)
            for kind, size in (("global", self.args.global_crop_size), ("local", self.args.local_crop_size))
        }
        return {**inputs, **crops}

    def _finished(self, inputs: Batch, kind: str) -> Tensor:
        """Global or local crops, normalised and distorted if they are not yet."""
        crops: Tensor = inputs[f"{kind}_crops"]
        return crops if crops.is_floating_point() else self.photometric(crops, inputs[f"{kind}_photometric"])

    def _resized(self, crops: Tensor, size: int) -> Tensor:
        scale = self.args.teacher_to_student_scale
        if scale == 1 or len(crops) == 0:
            return crops
        side = int(size / scale)
        return F.interpolate(crops, (side, side), mode="bilinear", align_corners=False, antialias=True)

    def _clip_grad_norm(self, model: nn.Module) -> float:
        step = self.state.global_step + 1
        norms = [student.settle_step(step) for student in self.students if student.is_active]
        skipped = any(student.guard.step_was_skipped for student in self.students if student.is_active)
        names = list(self.args.students)
        own = {student.name: float(student.stopped_at or 0) for student in self.students}
        told = [float(len(self._step_failures)), float(self.preemption.is_told), float(skipped)]
        told += [own.get(name, 0.0) for name in names]
        failures, preempted, any_skipped, *stopped = all_reduce_max(
            torch.tensor(told, device=self.args.device)
        ).tolist()
        self.stopped = {name: int(at) for name, at in zip(names, stopped, strict=True) if at}
        self._skipped = any_skipped > 0
        self._settle_run(any_failures=failures > 0, any_preempted=preempted > 0)
        if len(self.stopped) == len(names):
            raise RuntimeError(
                f"step {step}: no student is left, the losses of all are not finite. The checkpoints are as they "
                "were; go on with --resume_from_checkpoint last --precision fp32, or start again with a lower "
                "learning_rate."
            )
        return float(torch.tensor(norms or [0.0]).norm())

    @property
    def _step_was_skipped(self) -> bool:
        return self._skipped

    def _ask_evaluators(self, prefix: str) -> dict[str, float]:
        found = []
        for student in self.students:
            network = student.whole_ema()
            if student.speaks:
                further = [c for c in self.callback_handler.callbacks if isinstance(c, Evaluator)]
                backbone: Any = nn.Module.to(network.get_submodule("backbone"), self.args.device)
                numbers = ask([*student.evaluators, *further], backbone, student.args)
                found.append({f"{student.name}/{prefix}_{name}": value for name, value in numbers.items()})
        return {name: value for numbers in gather_lists(found) for name, value in numbers.items()}

    def _training_values(self, step: int) -> dict[str, float]:
        values = self.schedules.at(step - 1)  # of the step just taken
        own = [
            {f"{student.name}/{name}": value for name, value in student.pop_log(step - 1).items()}
            for student in self.students
            if student.speaks
        ]
        students = {name: value for numbers in gather_lists(own) for name, value in numbers.items()}
        losses = [value for name, value in students.items() if name.endswith("/loss") and name.count("/") == 1]
        return {
            "loss": sum(losses),
            **students,
            "learning_rate": values["lr"],
            "schedule/teacher_temperature": values["teacher_temperature"],
        }

    def _save_config(self, folder: Path) -> None:
        (folder / STOPPED).write_text(json.dumps(self.stopped), encoding="utf-8")

    def _folder_names(self) -> tuple[str, ...]:
        return (*self.args.students, _STAGED)

    def _state_pieces(self) -> Iterator[Piece]:
        for student in self.students:
            yield from student.pieces()

    def _load_state(self, reader: StateReader) -> None:
        self.stopped = json.loads((reader.folder.parent / STOPPED).read_text(encoding="utf-8"))
        for student in self.students:
            student.load(reader)
            student.stopped_at = self.stopped.get(student.name)

    def _complete_checkpoint(self, folder: Path, step: int, log_history: list[dict[str, float]]) -> None:
        reader = StateReader(folder / STATE)
        stopped = json.loads((folder / STOPPED).read_text(encoding="utf-8"))  # training goes on meanwhile
        for name in self.args.students:
            self._write_student(reader, name, folder / name, step, stopped, log_history)

    def save_students(self, folder: Path) -> str:
        """
        Write each student's moving average as a model folder `folder`/NAME that plain `transformers` opens, with its
        prototype heads beside it. A model card in it that somebody has edited stays. All ranks call it.

        Returns:
            What to tell people.

        Raises:
            OSError: one could not be written; its folder is as it was.
        """
        # Not from process to process: the first of a group may be another than the first of all, which writes.
        state = folder / f".{_STAGED}.saving"
        averages = [piece for piece in self._state_pieces() if ".ema." in piece.name]
        path = state_file(state, self.args.process_index, self.args.world_size)
        try:
            self._together(lambda: write_pieces(path, on_host(averages)))
            self._as_first_process(lambda: self._put_students_together(StateReader(state), folder))
        finally:
            if self.is_world_process_zero():
                shutil.rmtree(state, ignore_errors=True)
        lines = [
            f"{folder / name}" + (f" (stopped at step {self.stopped[name]:,})" if name in self.stopped else "")
            for name in self.args.students
        ]
        return "\n".join(["The students are in", *(f"  {line}" for line in lines)])

    def _together(self, write: Callable[[], None]) -> None:
        """Let all ranks write; what one of them finds wrong is every rank's error."""
        errors = []
        try:
            write()
        except Exception as error:  # safetensors has errors of its own
            errors = [str(error)]
        for message in gather_lists(errors):
            raise OSError(message)

    def _put_students_together(self, reader: StateReader, folder: Path) -> None:
        for name in self.args.students:
            with replacing_folder(folder / name) as staged:
                keep_edited_card(folder / name, staged)
                step, log_history = self.state.global_step, self.state.log_history
                self._write_student(reader, name, staged, step, self.stopped, log_history)

    def _write_student(
        self,
        reader: StateReader,
        name: str,
        folder: Path,
        step: int,
        stopped: Mapping[str, int],
        log_history: list[dict[str, float]],
    ) -> None:
        args = self.args.student_args[name]
        network = network_of_pieces(reader.of(name), "ema", lambda: student_network(args.pretraining_config()))
        save_teacher_folder(network, args, folder)
        taken = step_of_stopped(stopped[name]) if name in stopped else step
        write_run_card(folder, args, taken, of_student(name, log_history), stopped.get(name))


def of_student(name: str, log_history: list[dict[str, float]]) -> list[dict[str, float]]:
    """The log of a student as if it were alone: its values under their own names."""
    prefix = f"{name}/"
    return [
        {key.removeprefix(prefix): value for key, value in entry.items() if key.startswith(prefix) or key == "step"}
        for entry in log_history
    ]


class _AllOptimizers:
    """What the Trainer calls in the place of an optimizer: every student moves."""

    def __init__(self, trainer: DistillationTrainer) -> None:
        self._trainer = trainer
        self.param_groups = [group for student in trainer.students for group in student.adamw.param_groups]

    def step(self) -> None:
        for student in self._trainer.students:
            student.move(self._trainer.state.global_step)


class _AllSchedulers:
    """What the Trainer calls in the place of a scheduler."""

    def __init__(self, students: list[Student]) -> None:
        self._schedulers = [student.scheduler for student in students]

    def step(self) -> None:
        for scheduler in self._schedulers:
            scheduler.step()

    def get_last_lr(self) -> list[Any]:
        return [rate for scheduler in self._schedulers for rate in scheduler.get_last_lr()]

    def state_dict(self) -> dict[str, Any]:
        """All are at the same step."""
        return self._schedulers[0].state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        for scheduler in self._schedulers:
            scheduler.load_state_dict(dict(state_dict))
