"""`SSLTrainer`: `transformers.Trainer` with what self-supervised training adds to it.

All overrides of the Trainer's internals are in this file:

    get_train_dataloader    one endless stream of samples, the same whatever ranks and accumulation
    get_batch_samples       the wait for data; at high resolutions micro-batches are split; where there are several,
                            the teacher's targets are balanced over all micro-batches of a step
    create_optimizer        parameter groups with layer-wise rates;  create_scheduler  learning rate and weight decay
    compute_loss            crops are finished on the device, schedules enter the step
    _wrap_model             the engine puts itself around model and optimizer
    training_step           the parts of a micro-batch; a loss that is not finite stays out of the Trainer's own sum
    _clip_grad_norm         one clip per sub-module; a step that is not finite is skipped
    evaluate                what the evaluators among the callbacks say of the teacher
    log                     loss terms, norms, schedule values, images per second, guards
    train                   looks for the checkpoint to go on from, and whether it belongs to this run; or for what a
                            stage starts from
    _save_checkpoint        written beside, in the background; renamed when it is whole
    _save, _save_optimizer_and_scheduler, _load_from_checkpoint, _load_optimizer_and_scheduler
                            all ranks' pieces of parameters and moments, in the format of the engines

`TeacherPublisher` has what goes to the Hub.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from transformers import ProgressCallback
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_utils import TrainOutput

from dinov3_hf.data.collators import collate_views, split_batch
from dinov3_hf.data.crop_sizes import MixedSizes
from dinov3_hf.data.datasets import SSLDataset
from dinov3_hf.data.photometric import Photometric
from dinov3_hf.data.sampler import StreamSampler
from dinov3_hf.data.sources.base import Images, as_source
from dinov3_hf.distributed.engine import PARAMETER, empty_parameters_to_buffers
from dinov3_hf.distributed.pieces import Piece, StateReader, on_host
from dinov3_hf.distributed.reductions import all_reduce_max, gather_lists
from dinov3_hf.hub.model_card import keep_edited_card
from dinov3_hf.models.dinov3_pretraining.modeling_dinov3_pretraining import (
    DINOv3ForPreTraining,
    SSLNetwork,
    TeacherLogits,
)
from dinov3_hf.models.dinov3_pretraining.prototype_head import PrototypeHead
from dinov3_hf.training.callbacks import (
    CollapseWarningCallback,
    SeenSamplesCallback,
    TeacherUpdateCallback,
    TrainingProgressCallback,
)
from dinov3_hf.training.checkpoint_writer import STATE, CheckpointWriter
from dinov3_hf.training.checkpoints import checkpoints, clean_up, remove_old_checkpoints, replacing_folder
from dinov3_hf.training.engines import make_engine
from dinov3_hf.training.evaluation import DenseHealthCallback, KnnCallback, LabelledImages, ask
from dinov3_hf.training.gram_config import COPY, EMA
from dinov3_hf.training.gram_teacher import GramTeacherCallback, load_gram_teacher
from dinov3_hf.training.guards import DataWait, NonFiniteGuard, StarvationWarningCallback, peak_memory
from dinov3_hf.training.memory import blocks_of, prepare_blocks, products_of
from dinov3_hf.training.metrics import RunningMeans, StepValues
from dinov3_hf.training.param_groups import parameter_groups
from dinov3_hf.training.preemption import PreemptionCallback, leave_signals_to_the_run
from dinov3_hf.training.recipe_scheduler import RecipeScheduler
from dinov3_hf.training.resume import RECIPE, IntervalsOfThisRun, find_checkpoint, save_fingerprint
from dinov3_hf.training.run_card import write_run_card
from dinov3_hf.training.ssl_config import SSLConfig
from dinov3_hf.training.starting_point import StartingPoint, find_start
from dinov3_hf.training.stream_progress import load_progress, save_progress
from dinov3_hf.training.teacher_folder import save_teacher_folder
from dinov3_hf.training.teacher_publisher import TeacherPublisher
from dinov3_hf.training.unreadable_images import UnreadableImages

logger = logging.getLogger(__name__)

SECONDS_TO_SETTLE = 60.0
Batch = dict[str, Any]
Found = TypeVar("Found")


class SSLTrainer(TeacherPublisher):
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
    train_dataset: MixedSizes
    optimizer: Optimizer | None
    lr_scheduler: LRScheduler | None  # type: ignore[assignment]  # the Trainer says LambdaLR and takes any

    def __init__(
        self,
        model: DINOv3ForPreTraining,
        args: SSLConfig,
        train_images: Images,
        eval_images: tuple[LabelledImages, LabelledImages | None] | None = None,
        callbacks: list[Any] | None = None,
        start: StartingPoint | None = None,
    ) -> None:
        self.train_images = as_source(train_images, args.backbone_config().num_channels)
        self.crop_sizes = args.crop_size_mix()
        datasets = [
            SSLDataset(self.train_images, args.views(sizes), args.masks(sizes), seed=args.seed)
            for sizes in self.crop_sizes.sizes
        ]
        super().__init__(
            model=model,
            args=args,
            train_dataset=MixedSizes(datasets, self.crop_sizes, args.global_batch_size),
            eval_dataset=self.train_images if eval_images is None else eval_images,  # the Trainer insists on some
            callbacks=callbacks,
        )
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
        self.checkpoint_writer = CheckpointWriter(Path(args.output_dir or "."))
        batch_size = args.global_batch_size
        share = (args.per_device_train_batch_size, args.process_index, args.world_size)
        self.sampler = StreamSampler(self.train_images, args.max_steps * batch_size, batch_size, args.seed, *share)
        self.schedules = args.schedules()
        self.student_draws = args.student_draws()
        self.photometric = Photometric(args.image_mean, args.image_std).to(args.device)
        self.guard = NonFiniteGuard()
        self.unreadable_images = UnreadableImages(
            Path(args.output_dir or "."), self.train_images.num_images, args.max_unreadable_share
        )
        self.add_callback(SeenSamplesCallback(self.sampler))
        self.add_callback(TeacherUpdateCallback(self.schedules, self.guard, self.engine))
        if model.gram_teacher is not None:
            in_half = args.bf16 and self.engine.mixes_dtypes
            nn.Module.to(model.gram_teacher, torch.bfloat16 if in_half else torch.float32)  # it is never trained
            self.add_callback(GramTeacherCallback(args, self.engine))
        self.add_callback(CollapseWarningCallback())
        self.add_callback(StarvationWarningCallback())
        self.add_callback(self.unreadable_images)
        self.preemption = PreemptionCallback()
        self.add_callback(self.preemption)
        if eval_images is not None:
            self.add_callback(KnnCallback(*eval_images))
        self.add_callback(DenseHealthCallback(self.train_images))
        if not args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(TrainingProgressCallback())
        self.add_callback(IntervalsOfThisRun())
        self._start = start
        self._staging: Path | None = None  # while a checkpoint is written
        self._pieces: list[Piece] = []  # for it
        self._num_parts = 1  # forward passes of the present step
        self._step_values = StepValues()
        self._means = RunningMeans()
        self._data_wait = DataWait()
        self._step_failures: list[tuple[str, str]] = []  # name and reason of images that could not be read
        self._last_log: tuple[float, int] | None = None  # time in seconds, step

    @property
    def submodules(self) -> dict[str, nn.Module]:
        """The parts of the student that have a parameter group namespace and a gradient clip of their own."""
        return dict(self.model.student.named_children())

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, ignore_keys_for_eval: Any = None
    ) -> TrainOutput:
        """
        Train to `max_steps`.

        Args:
            resume_from_checkpoint: None to start afresh, "last" (or True) for the newest complete checkpoint in
                `output_dir`, "auto" for that or a fresh start if there is none, or a checkpoint folder.
            trial: not used.
            ignore_keys_for_eval: not used.

        Raises:
            FileNotFoundError: there is no such checkpoint, or nothing in `start_from`.
            ValueError: it is incomplete, or belongs to another recipe or other images; what is in `start_from` is
                another network.
            OSError: a checkpoint could not be written; the complete ones are as they were.
            Preempted: a signal has ended the run, which is saved.
        """
        with self.preemption.watching():
            wanted = "last" if resume_from_checkpoint is True else resume_from_checkpoint
            folder = self._checkpoint_to_go_on_from(wanted)
            if folder is None:
                self._find_start()
                self._load_gram_teacher()
            self._shard()
            try:
                outcome = super().train(resume_from_checkpoint=folder)
                self.checkpoint_writer.wait()
            finally:
                self.checkpoint_writer.settle(SECONDS_TO_SETTLE)
                for callback in self.callback_handler.callbacks:
                    if isinstance(callback, TrainingProgressCallback):
                        callback.close()
        self.preemption.end_run(self.state, self.accelerator.wait_for_everyone)
        return outcome

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
        blocks = [block for network in networks for block in blocks_of(network)]
        products = [
            module
            for network in networks
            for module in (network.children() if isinstance(network, PrototypeHead) else products_of(network))
        ]
        self.engine.shard(networks, blocks, products)

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

    def _checkpoint_to_go_on_from(self, wanted: str | bool | None) -> str | None:
        return self._as_first_process(lambda: self._find_checkpoint(str(wanted) if wanted else None))

    def _as_first_process(self, find: Callable[[], Found]) -> Found:
        """What the first process finds, for all, so that they agree; what it finds wrong is every process's error."""
        found: Any = None
        if self.is_world_process_zero():
            try:
                found = find()
            except Exception as error:
                found = error
        (found,) = broadcast_object_list([found])
        if isinstance(found, Exception):
            raise found
        result: Found = found
        return result

    def _find_checkpoint(self, wanted: str | None) -> str | None:
        output_dir = Path(self.args.output_dir or ".")
        clean_up(output_dir)
        folder = find_checkpoint(wanted, self.args, self.train_images.fingerprint())
        if folder is not None:
            return str(folder)
        if wanted is None and (earlier := checkpoints(output_dir)):
            logger.warning(
                "%s holds %s of an earlier run, to be replaced; --resume_from_checkpoint last would go on from it.",
                output_dir,
                earlier[-1].name,
            )
        return None

    def get_train_dataloader(self) -> DataLoader[Batch]:
        args = self.args
        loader = DataLoader(
            self.train_dataset,
            batch_size=args.per_device_train_batch_size,
            sampler=self.sampler,
            collate_fn=collate_views,
            drop_last=True,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            worker_init_fn=leave_signals_to_the_run,
        )
        prepared: DataLoader[Batch] = self.accelerator.prepare(loader)
        return prepared

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[list[Batch]], Tensor | int | None]:
        """
        The loader's micro-batches of one optimizer step, each in the parts in which its resolution fits the memory.
        When there are several in all, the teacher looks at all of them first, so that Sinkhorn-Knopp balances its
        targets over the whole batch and accumulation changes nothing but memory.
        """
        with self._data_wait.waiting():
            batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._step_failures = [failure for batch in batches for failure in batch.pop("unreadable")]
        size = self.crop_sizes.at(self.state.global_step).per_device_train_batch_size
        split = [split_batch(batch, size or self.args.train_batch_size) for batch in batches]
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
            self.adamw = AdamW(
                groups,
                betas=(args.adam_beta1, args.adam_beta2),
                eps=args.adam_epsilon,
                fused=_has_fused_adamw(args.device),
            )
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

    def floating_point_ops(self, inputs: list[Batch]) -> int:  # type: ignore[override]
        return 0  # the Trainer would count tokens of a language model

    def _clip_grad_norm(self, model: nn.Module) -> float:
        norms = self.engine.clip_gradients(self.submodules, self.args.max_grad_norm)
        self._step_values.add({f"grad_norm/{name}": norm for name, norm in norms.items()})
        norm = torch.linalg.vector_norm(torch.stack(list(norms.values())))
        told = {"failures": len(self._step_failures), "preempted": self.preemption.is_told}
        self._step_values.add({"grad_norm": norm, **{name: norm.new_tensor(float(n)) for name, n in told.items()}})
        return self._settle_step(self._step_values.pop())

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> float:
        # The Trainer does not clip when there is no limit.
        return self._clip_grad_norm(model) if grad_norm is None else grad_norm

    def _settle_step(self, values: dict[str, float]) -> float:
        """
        The last look at a step before the optimizer moves. Returns the norm of all gradients, 0 for a skipped step.

        Args:
            values: of all ranks and micro-batches, the same on every rank; so are the decisions that follow.
        """
        self.preemption.agree(values.pop("preempted") > 0)
        failures = gather_lists(self._step_failures) if values.pop("failures") > 0 else []
        is_main = self.is_world_process_zero()
        self.unreadable_images.count(self.args.global_batch_size, failures, is_main)
        if self.guard.passes(self.state.global_step + 1, values, is_main):
            self._means.add(values)
            return values["grad_norm"]
        self.engine.discard_gradients(self.model)
        return 0.0

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """
        What the [`Evaluator`]s among the callbacks say of the teacher, as `{prefix}_{name}`: health of its dense
        features, k-nearest-neighbour accuracy if there are `eval_images`, and what `callbacks` adds.
        """
        if eval_dataset is not None:
            raise ValueError(
                "evaluate measures by its callbacks; add_callback(KnnCallback(reference, query)) instead."
            )
        metrics: dict[str, float] = {}
        teacher = self._whole_teacher()
        if self.is_world_process_zero():
            numbers = ask(self.callback_handler.callbacks, nn.Module.to(teacher.backbone, self.args.device), self.args)
            metrics = {f"{metric_key_prefix}_{name}": value for name, value in numbers.items()}
        metrics = broadcast_object_list([metrics])[0]
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            step = self.state.global_step
            values = self.schedules.at(step - 1)  # of the step just taken
            guards = torch.tensor([self._data_wait.pop(), peak_memory(self.args.device)], device=self.args.device)
            wait_share, peak_gib = all_reduce_max(guards).tolist()
            del logs["loss"], logs["grad_norm"]  # skipped steps included
            logs = {
                **self._means.pop(),
                **logs,
                "learning_rate": values["lr"],
                **{f"schedule/{name}": value for name, value in values.items()},
                "guard/skipped_steps": self.guard.num_skipped,
                "data/unreadable_images": len(self.unreadable_images.images),
                "data/wait_share": wait_share,
                "memory/peak_gib": peak_gib,
            }
            now = time.perf_counter()
            if self._last_log is not None:
                then, last_step = self._last_log
                logs["images_per_second"] = (step - last_step) * self.args.global_batch_size / (now - then)
            self._last_log = (now, step)
        super().log(logs, start_time)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        args, step = self.args, self.state.global_step
        folder = self.checkpoint_writer.begin(step)
        self._staging, self._pieces, error = folder.parent, [], None
        try:
            super()._save_checkpoint(model, trial)  # the small files
        except Exception as own:
            error = own  # of this rank, which the others are to hear of
        finally:
            self._staging = None
        log_history, best = list(self.state.log_history), self.state.best_global_step
        # Behind a skipped step the weights may be ruined already: keep what was saved before.
        keep_last = None if self.guard.step_was_skipped else args.save_total_limit

        def complete(checkpoint: Path) -> None:
            teacher = self._teacher_of(StateReader(checkpoint / STATE))
            self._write_teacher(teacher, checkpoint / "teacher", step, log_history)

        def remove_old() -> None:
            remove_old_checkpoints(folder.parent.parent, step, keep_last, args.keep_every_steps, keep_step=best)

        self.checkpoint_writer.finish(step, self._pieces, complete, remove_old, error)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir or ".")
            self.model.config.save_pretrained(folder)
            self.args.save_yaml(folder / RECIPE)
            save_fingerprint(folder, self.train_images.fingerprint())

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.args.should_save:
            assert self.lr_scheduler is not None
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)
        self._pieces = on_host(self.engine.pieces(self.model, self.adamw))
        save_progress(Path(output_dir), self.args.process_index, self.sampler.progress())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Nothing yet: parameters come with the moments, when the engine has sharded both."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            assert self.lr_scheduler is not None
            self.sampler.restore(load_progress(Path(checkpoint)))
            self.engine.load(self.model, self.adamw, StateReader(Path(checkpoint) / STATE))
            self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    def empty_teacher(self) -> SSLNetwork:
        """A network like the teacher, without values."""
        with torch.device("meta"):
            return SSLNetwork(self.args.pretraining_config())

    def _teacher_of(self, reader: StateReader) -> SSLNetwork:
        prefix = f"{PARAMETER}/teacher."
        names = [name for name in reader.names() if name.startswith(prefix)]
        return self._filled({name.removeprefix(prefix): reader.tensor(name) for name in names})

    @torch.no_grad()
    def _whole_teacher(self) -> SSLNetwork:
        """The teacher itself, or where the engine shards it, a copy on rank 0. All ranks call it."""
        if self.engine.holds_everything:
            return self.model.teacher
        is_main, tensors = self.is_world_process_zero(), {}
        for name, tensor in self.engine.whole_tensors(self.model.teacher):
            if is_main:
                tensors[name] = tensor.to("cpu", copy=True)
        return self._filled(tensors) if is_main else self.model.teacher

    def _filled(self, tensors: dict[str, Tensor]) -> SSLNetwork:
        teacher = self.empty_teacher()
        nothing = {name: torch.empty(value.shape) for name, value in teacher.state_dict().items() if not value.numel()}
        teacher.load_state_dict(nothing | tensors, assign=True)
        return teacher.requires_grad_(False).eval()

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


def _has_fused_adamw(device: torch.device) -> bool:
    return device.type in ("cuda", "cpu", "mps", "xpu")
