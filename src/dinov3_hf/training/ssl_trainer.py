"""`SSLTrainer`: pre-training and its later stages, a student and the teacher that follows it.

What it adds to [`RunTrainer`], overrides of the Trainer's internals:

    get_batch_samples       where a step has several micro-batches, the teacher's targets are balanced over all of them
    create_optimizer        parameter groups with layer-wise rates;  create_scheduler  learning rate and weight decay
    compute_loss            crops are finished on the device, schedules enter the step
    _wrap_model             the engine puts itself around model and optimizer
    training_step           the parts of a micro-batch; a loss that is not finite stays out of the Trainer's own sum
    _clip_grad_norm         one clip per sub-module; a step that is not finite is skipped

`TeacherPublisher` has what goes to the Hub.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dinov3_hf.data.sources.base import Images
from dinov3_hf.distributed.engine import empty_parameters_to_buffers
from dinov3_hf.distributed.pieces import Piece, StateReader
from dinov3_hf.hub.model_card import keep_edited_card
from dinov3_hf.models.dinov3_pretraining.modeling_dinov3_pretraining import (
    DINOv3ForPreTraining,
    SSLNetwork,
    TeacherLogits,
)
from dinov3_hf.training.callbacks import CollapseWarningCallback, TeacherUpdateCallback
from dinov3_hf.training.checkpoint_writer import STATE
from dinov3_hf.training.checkpoints import replacing_folder
from dinov3_hf.training.engines import make_engine
from dinov3_hf.training.evaluation import DenseHealthCallback, KnnCallback, ask
from dinov3_hf.training.gram_config import COPY, EMA
from dinov3_hf.training.gram_teacher import GramTeacherCallback, load_gram_teacher
from dinov3_hf.training.guards import NonFiniteGuard
from dinov3_hf.training.memory import prepare_blocks, shard_networks
from dinov3_hf.training.metrics import RunningMeans, StepValues
from dinov3_hf.training.param_groups import make_adamw, parameter_groups
from dinov3_hf.training.recipe_scheduler import RecipeScheduler
from dinov3_hf.training.run_card import write_run_card
from dinov3_hf.training.run_trainer import Batch, EvaluationImages, RunTrainer
from dinov3_hf.training.ssl_config import SSLConfig
from dinov3_hf.training.starting_point import StartingPoint, find_start
from dinov3_hf.training.teacher_folder import save_teacher_folder
from dinov3_hf.training.teacher_publisher import TeacherPublisher
from dinov3_hf.training.whole_network import network_of_pieces, whole_network


class SSLTrainer(TeacherPublisher, RunTrainer):
    """
    Trains [`DINOv3ForPreTraining`] on images.

    Args:
        model: student, teacher and heads.
        args: the recipe.
        train_images: what to learn from; labels are not looked at.
        eval_images: labelled reference and query images for the k-nearest-neighbour evaluation of the teacher; None
            for the query classifies each reference image by all the others.
        callbacks: further `TrainerCallback`s; an [`Evaluator`] measures what you like.
        start: what `find_start(args)` has found already; by default it looks when a run with `start_from` begins.
    """

    model: DINOv3ForPreTraining
    args: SSLConfig
    optimizer: Optimizer | None
    lr_scheduler: LRScheduler | None  # type: ignore[assignment]  # the Trainer says LambdaLR and takes any

    def __init__(
        self,
        model: DINOv3ForPreTraining,
        args: SSLConfig,
        train_images: Images,
        eval_images: EvaluationImages | None = None,
        callbacks: list[Any] | None = None,
        start: StartingPoint | None = None,
    ) -> None:
        super().__init__(model, args, train_images, eval_images, callbacks)
        empty_parameters_to_buffers(model)
        prepare_blocks(model, args)
        self.engine = make_engine(
            args.launched,
            args.device,
            args.train_batch_size,
            args.bf16,
            args.offload_optimizer,
            self.accelerator.autocast,
        )
        self.schedules = args.schedules()
        self.student_draws = args.student_draws()
        self.guard = NonFiniteGuard()
        self.add_callback(TeacherUpdateCallback(self.schedules, self.guard, self.engine))
        if model.gram_teacher is not None:
            in_half = args.bf16 and self.engine.mixes_dtypes
            nn.Module.to(model.gram_teacher, torch.bfloat16 if in_half else torch.float32)  # it is never trained
            self.add_callback(GramTeacherCallback(args, self.engine))
        self.add_callback(CollapseWarningCallback())
        if eval_images is not None:
            self.add_callback(KnnCallback(*eval_images))
        self.add_callback(DenseHealthCallback(self.train_images))
        self._start = start
        self._num_parts = 1  # forward passes of the present step
        self._step_values = StepValues()
        self._means = RunningMeans()

    @property
    def submodules(self) -> dict[str, nn.Module]:
        """The parts of the student that have a parameter group namespace and a gradient clip of their own."""
        return dict(self.model.student.named_children())

    def _prepare_networks(self, afresh: bool) -> None:
        if afresh:
            self._find_start()
            self._load_gram_teacher()
        self._shard()

    def _load_gram_teacher(self) -> None:
        source, gram_teacher = self.args.gram_teacher, self.model.gram_teacher
        if gram_teacher is not None and source not in (None, COPY, EMA):
            load_gram_teacher(gram_teacher, self.args.backbone_config(), source)

    def _find_start(self) -> None:
        """What the stage starts from; a teacher goes into the whole model, a sharded state in behind the engine."""
        if self.args.start_from is None:
            return
        self._start = self._as_first_process(lambda: self._start or find_start(self.args))
        if self._start.start_with == "teacher":
            self._start.load_teacher(self.model)

    def _shard(self) -> None:
        model = self.model
        networks = [part for network in (model.student, model.teacher) for part in network.children()]
        if model.gram_teacher is not None:
            networks.append(model.gram_teacher)
        shard_networks(self.engine, networks)

    def _wrap_model(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        if self.model_wrapped is not self.model:
            return self.model_wrapped
        wrapped = self.engine.wrap(self.model, self.adamw)
        if wrapped is None:
            return super()._wrap_model(model, *args, **kwargs)
        model, self.optimizer = wrapped
        return model

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        prepared = super()._prepare_for_training(  # type: ignore[no-untyped-call]
            max_steps, train_dataloader, resume_from_checkpoint
        )
        if resume_from_checkpoint is None and self._start is not None and self._start.start_with == "state":
            self._start.load_state(self.engine, self.model, self.adamw)
        return prepared

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[list[Batch]], Tensor | int | None]:
        """
        The micro-batches of one optimizer step in their parts. When there are several in all, the teacher looks at all
        of them first, so that Sinkhorn-Knopp balances its targets over the whole batch and accumulation changes
        nothing but memory.
        """
        split, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        parts = [part for batch in split for part in batch]
        self._num_parts = len(parts)
        if len(parts) > 1:
            self._attach_targets(parts)
        return split, num_items

    @torch.no_grad()
    def _attach_targets(self, batches: list[Batch]) -> None:
        logits: list[TeacherLogits] = []
        for batch in batches:
            inputs = self._prepare_inputs({key: batch[key] for key in ("global_crops", "global_photometric")})
            crops = self.photometric(inputs["global_crops"], inputs["global_photometric"])
            with self.accelerator.autocast():
                logits.append(self.model.teacher_logits(crops, batch["mask_indices"].to(crops.device)))
        temperature = self.schedules.at(self.state.global_step)["teacher_temperature"]
        for batch, target in zip(batches, self.model.teacher_targets_of_step(logits, temperature), strict=True):
            batch["target"] = target

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        if self.optimizer is None:
            args = self.args
            groups = parameter_groups(
                self.submodules,
                layerwise_lr_decay=args.layerwise_lr_decay,
                patch_embed_lr_mult=args.patch_embed_lr_mult,
                rates={"backbone": "backbone_lr"} if self.schedules.backbone_waits else None,
            )
            self.adamw = make_adamw(groups, args)
            self.optimizer = self.adamw
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        if self.lr_scheduler is None:
            self.lr_scheduler = RecipeScheduler(self.adamw, self.schedules)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        values = self.schedules.at(self.state.global_step)
        gram_weight = values.get("gram_weight", 0.0)
        has_gram_crops = gram_weight > 0 and "gram_crops" in inputs
        first_image, num_images = inputs["first_image"], len(inputs["mask"]) // 2
        images = range(first_image, first_image + num_images)  # of the global batch
        output = model(
            global_crops=self.photometric(inputs["global_crops"], inputs["global_photometric"]),
            local_crops=self.photometric(inputs["local_crops"], inputs["local_photometric"]),
            mask=inputs["mask"],
            mask_indices=inputs["mask_indices"],
            mask_weight=inputs["mask_weight"],
            teacher_temperature=values["teacher_temperature"],
            local_loss_weight=values["local_loss_weight"],
            target=inputs.get("target"),
            draws=self.student_draws.at(self.state.global_step, images, self.args.device),
            gram_crops=self.photometric(inputs["gram_crops"]) if has_gram_crops else None,  # clean: normalised only
            gram_weight=gram_weight,
        )
        self._step_values.add({f"loss/{name}": value for name, value in output.losses.items()} | {"loss": output.loss})
        self._step_values.add(
            {f"prototypes/{name}_entropy": value for name, value in output.prototype_entropy.items()}
        )
        return (output.loss, output) if return_outputs else output.loss

    def training_step(  # type: ignore[override]  # what get_batch_samples returns
        self, model: nn.Module, inputs: list[Batch], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        model.train()
        losses = []
        for part in inputs:
            # More gradients are to come before ranks exchange them and the optimizer moves.
            is_last = self.accelerator.sync_gradients and part is inputs[-1]
            with nullcontext() if is_last else self.engine.no_sync(model):
                loss = self.compute_loss(model, self._prepare_inputs(part)) / self._num_parts
                self.engine.backward(loss)
            losses.append(loss.detach())
        loss = torch.stack(losses).sum()
        # The log has the mean over good steps; the Trainer's own sum would stay NaN for the rest of the run.
        return torch.where(loss.isfinite(), loss, torch.zeros_like(loss))

    def _clip_grad_norm(self, model: nn.Module) -> float:
        norms = self.engine.clip_gradients(self.submodules, self.args.max_grad_norm)
        self._step_values.add({f"grad_norm/{name}": norm for name, norm in norms.items()})
        norm = torch.linalg.vector_norm(torch.stack(list(norms.values())))
        told = {"failures": len(self._step_failures), "preempted": self.preemption.is_told}
        self._step_values.add({"grad_norm": norm, **{name: norm.new_tensor(float(n)) for name, n in told.items()}})
        return self._settle_step(self._step_values.pop())

    def _settle_step(self, values: dict[str, float]) -> float:
        """
        The last look at a step before the optimizer moves. Returns the norm of all gradients, 0 for a skipped step.

        Args:
            values: of all ranks and micro-batches, the same on every rank; so are the decisions that follow.
        """
        self._settle_run(any_failures=values.pop("failures") > 0, any_preempted=values.pop("preempted") > 0)
        if self.guard.passes(self.state.global_step + 1, values, self.is_world_process_zero()):
            self._means.add(values)
            return values["grad_norm"]
        self.engine.discard_gradients(self.model)
        return 0.0

    @property
    def _step_was_skipped(self) -> bool:
        return self.guard.step_was_skipped

    def _ask_evaluators(self, prefix: str) -> dict[str, float]:
        teacher = self._whole_teacher()
        if not self.is_world_process_zero():
            return {}
        numbers = ask(self.callback_handler.callbacks, nn.Module.to(teacher.backbone, self.args.device), self.args)
        return {f"{prefix}_{name}": value for name, value in numbers.items()}

    def _training_values(self, step: int) -> dict[str, float]:
        values = self.schedules.at(step - 1)  # of the step just taken
        return {
            **self._means.pop(),
            "learning_rate": values["lr"],
            **{f"schedule/{name}": value for name, value in values.items()},
            "guard/skipped_steps": self.guard.num_skipped,
        }

    def _save_config(self, folder: Path) -> None:
        self.model.config.save_pretrained(folder)

    def _folder_names(self) -> tuple[str, ...]:
        return ("teacher",)

    def _state_pieces(self) -> Iterator[Piece]:
        return self.engine.pieces(self.model, self.adamw)

    def _load_state(self, reader: StateReader) -> None:
        self.engine.load(self.model, self.adamw, reader)

    def _complete_checkpoint(self, folder: Path, step: int, log_history: list[dict[str, float]]) -> None:
        teacher = network_of_pieces(StateReader(folder / STATE), "teacher", self.empty_teacher)
        self._write_teacher(teacher, folder / "teacher", step, log_history)

    def empty_teacher(self) -> SSLNetwork:
        """A network like the teacher; its values mean nothing."""
        return SSLNetwork(self.args.pretraining_config())

    def _whole_teacher(self) -> SSLNetwork:
        """The teacher itself, or where the engine shards it, a copy on rank 0. All ranks call it."""
        return whole_network(self.engine, self.model.teacher, self.empty_teacher, self.is_world_process_zero())

    def save_teacher(self, folder: Path) -> None:
        """
        Write the teacher backbone as a model folder that plain `transformers` opens, with its heads beside it. A model
        card in it that somebody has edited stays. All ranks call it, and the first one writes.

        Raises:
            OSError: it could not be written; the folder is as it was.
        """
        teacher = self._whole_teacher()
        if self.is_world_process_zero():
            with replacing_folder(folder) as staged:
                keep_edited_card(folder, staged)
                self._write_teacher(teacher, staged, self.state.global_step, self.state.log_history)

    def save_outcome(self, folder: Path) -> str:
        """Write what the run has come to, the last teacher, to `folder`, and return what to tell people."""
        self.save_teacher(folder)
        return f"The trained teacher is in {folder}"

    def _write_teacher(
        self, teacher: SSLNetwork, folder: Path, step: int, log_history: list[dict[str, float]]
    ) -> None:
        save_teacher_folder(teacher, self.args, folder)
        write_run_card(folder, self.args, step, log_history)
