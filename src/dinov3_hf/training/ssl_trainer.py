"""`SSLTrainer`: `transformers.Trainer` with what self-supervised training adds to it.

All overrides of the Trainer's internals are in this file:

    get_train_dataloader    one endless stream of samples, the same whatever ranks and accumulation
    get_batch_samples       the wait for data; at high resolutions micro-batches are split; where there are several,
                            the teacher's targets are balanced over all micro-batches of a step
    create_optimizer        parameter groups with layer-wise rates;  create_scheduler  learning rate and weight decay
    compute_loss            crops are finished on the device, schedules enter the step
    training_step           the parts of a micro-batch; a loss that is not finite stays out of the Trainer's own sum
    _clip_grad_norm         one clip per sub-module; a step that is not finite is skipped
    evaluate                what the evaluators among the callbacks say of the teacher
    log                     loss terms, norms, schedule values, images per second, guards
    train                   looks for the checkpoint to go on from, and whether it belongs to this run; or for what a
                            stage starts from
    _save_checkpoint        written beside, renamed when it is whole, older ones removed afterwards
    _save                   the training state's model, the arguments as YAML and the teacher as a model folder
    init_hf_repo, push_to_hub   the teacher's repository, and its upload
"""

import logging
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from transformers import ProgressCallback, Trainer
from transformers.trainer_utils import TrainOutput

from dinov3_hf.data.collators import collate_views, split_batch
from dinov3_hf.data.crop_sizes import MixedSizes
from dinov3_hf.data.datasets import SSLDataset
from dinov3_hf.data.photometric import Photometric
from dinov3_hf.data.sampler import StreamSampler
from dinov3_hf.data.sources.base import Images, as_source
from dinov3_hf.distributed.reductions import all_reduce_max, gather_lists
from dinov3_hf.hub.model_card import keep_edited_card
from dinov3_hf.hub.push import PushError, create_repository, push_folder
from dinov3_hf.models.dinov3_pretraining.modeling_dinov3_pretraining import DINOv3ForPreTraining, TeacherLogits
from dinov3_hf.training.callbacks import (
    CollapseWarningCallback,
    SeenSamplesCallback,
    TeacherUpdateCallback,
    TrainingProgressCallback,
)
from dinov3_hf.training.checkpoints import (
    checkpoints,
    clean_up,
    remove_old_checkpoints,
    replacing_folder,
    saving_checkpoint,
)
from dinov3_hf.training.clipping import clip_gradients
from dinov3_hf.training.evaluation import DenseHealthCallback, KnnCallback, LabelledImages, ask
from dinov3_hf.training.gram_config import COPY, EMA
from dinov3_hf.training.gram_teacher import GramTeacherCallback, load_gram_teacher
from dinov3_hf.training.guards import DataWait, NonFiniteGuard, StarvationWarningCallback, peak_memory
from dinov3_hf.training.memory import prepare_blocks
from dinov3_hf.training.metrics import RunningMeans, StepValues
from dinov3_hf.training.param_groups import parameter_groups
from dinov3_hf.training.preemption import PreemptionCallback, leave_signals_to_the_run
from dinov3_hf.training.recipe_scheduler import RecipeScheduler
from dinov3_hf.training.resume import RECIPE, IntervalsOfThisRun, find_checkpoint, save_fingerprint
from dinov3_hf.training.run_card import write_run_card
from dinov3_hf.training.ssl_config import SSLConfig
from dinov3_hf.training.starting_point import StartingPoint, find_start
from dinov3_hf.training.teacher_folder import save_teacher_folder
from dinov3_hf.training.unreadable_images import UnreadableImages

logger = logging.getLogger(__name__)

Batch = dict[str, Any]
Found = TypeVar("Found")


class SSLTrainer(Trainer):
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
    hub_model_id: str | None  # type: ignore[assignment]  # the full name, once the repository exists
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
        prepare_blocks(model, args)
        batch_size = args.global_batch_size
        self.sampler = StreamSampler(self.train_images, args.max_steps * batch_size, batch_size, seed=args.seed)
        self.schedules = args.schedules()
        self.student_draws = args.student_draws()
        self.photometric = Photometric(args.image_mean, args.image_std).to(args.device)
        self.guard = NonFiniteGuard()
        self.unreadable_images = UnreadableImages(
            Path(args.output_dir or "."), self.train_images.num_images, args.max_unreadable_share
        )
        self.add_callback(SeenSamplesCallback(self.sampler))
        self.add_callback(TeacherUpdateCallback(self.schedules, self.guard))
        if model.gram_teacher is not None:
            nn.Module.to(model.gram_teacher, torch.bfloat16 if args.bf16 else torch.float32)  # it is never trained
            self.add_callback(GramTeacherCallback(args))
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
                self._load_start()
                self._load_gram_teacher()
            try:
                outcome = super().train(resume_from_checkpoint=folder)
            finally:
                for callback in self.callback_handler.callbacks:
                    if isinstance(callback, TrainingProgressCallback):
                        callback.close()
        self.preemption.end_run(self.state, self.accelerator.wait_for_everyone)
        return outcome

    def _load_gram_teacher(self) -> None:
        source, gram_teacher = self.args.gram_teacher, self.model.gram_teacher
        if gram_teacher is not None and source not in (None, COPY, EMA):
            load_gram_teacher(gram_teacher, self.args.backbone_config(), source)

    def _load_start(self) -> None:
        if self.args.start_from is not None:
            start = self._as_first_process(lambda: self._start or find_start(self.args))
            start.load_into(self.model)
            start.load_optimizer(self.create_optimizer(), self.model.student)

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
            self.optimizer = AdamW(
                groups,
                betas=(args.adam_beta1, args.adam_beta2),
                eps=args.adam_epsilon,
                fused=_has_fused_adamw(args.device),
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        if self.lr_scheduler is None:
            self.lr_scheduler = RecipeScheduler(optimizer or self.create_optimizer(), self.schedules)
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
        self.current_gradient_accumulation_steps = self._num_parts  # the Trainer has counted what the loader gave
        *first, last = inputs
        losses = []
        for part in first:
            with self._gradients_stay_local(model):
                losses.append(super().training_step(model, part, num_items_in_batch))
        losses.append(super().training_step(model, last, num_items_in_batch))
        loss = torch.stack(losses).sum()
        # The log has the mean over good steps; the Trainer's own sum would stay NaN for the rest of the run.
        return torch.where(loss.isfinite(), loss, torch.zeros_like(loss))

    @contextmanager
    def _gradients_stay_local(self, model: nn.Module) -> Iterator[None]:
        """More gradients are to come before ranks exchange them and the optimizer moves."""
        is_last = self.accelerator.sync_gradients
        self.accelerator.sync_gradients = False
        with self.accelerator.no_sync(model):
            yield
        self.accelerator.sync_gradients = is_last

    def floating_point_ops(self, inputs: list[Batch]) -> int:  # type: ignore[override]
        return 0  # the Trainer would count tokens of a language model

    def _clip_grad_norm(self, model: nn.Module) -> float:
        norms = clip_gradients(self.submodules, self.args.max_grad_norm)
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
        for parameter in self.model.parameters():
            parameter.grad = None  # AdamW then leaves weights, moments and step counts alone
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
        if self.is_world_process_zero():
            numbers = ask(self.callback_handler.callbacks, self.model.teacher.backbone, self.args)
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
        args, step, output_dir = self.args, self.state.global_step, Path(self.args.output_dir or ".")
        with saving_checkpoint(
            output_dir,
            step,
            rank=args.process_index,
            world_size=args.world_size,
            wait_for_everyone=self.accelerator.wait_for_everyone,
        ) as self._staging:
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = None
        # Behind a skipped step the weights may be ruined already: keep what was saved before.
        if args.should_save and not self.guard.step_was_skipped:
            best = self.state.best_global_step
            remove_old_checkpoints(output_dir, step, args.save_total_limit, args.keep_every_steps, keep_step=best)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir or ".")
        folder.mkdir(parents=True, exist_ok=True)
        self.model.save_pretrained(folder, state_dict=state_dict)
        self.args.save_yaml(folder / RECIPE)
        save_fingerprint(folder, self.train_images.fingerprint())
        self._write_teacher(folder / "teacher")

    def save_teacher(self, folder: Path) -> None:
        """
        Write the teacher backbone as a model folder that plain `transformers` opens, with its heads beside it. A model
        card in it that somebody has edited stays.

        Raises:
            OSError: it could not be written; the folder is as it was.
        """
        with replacing_folder(folder) as staged:
            keep_edited_card(folder, staged)
            self._write_teacher(staged)

    def save_outcome(self, folder: Path) -> str:
        """Write what the run has come to, the last teacher, to `folder`, and return what to tell people."""
        self.save_teacher(folder)
        return f"The trained teacher is in {folder}"

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """
        Create the repository `hub_model_id`, so that a run which cannot be published says so before it begins.

        Raises:
            PushError: the Hub cannot be reached, does not know the user, or refuses.
        """
        if self.is_world_process_zero():
            args = self.args
            self.hub_model_id = create_repository(
                args.hub_model_id or Path(args.output_dir or ".").resolve().name,
                private=args.hub_private_repo if private is None else private,
                token=token or args.hub_token,
            )
            self.push_in_progress = None  # the Trainer waits for it

    def push_to_hub(  # type: ignore[override]  # the address, as in earlier versions of the Trainer
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **card: Any,
    ) -> str | None:
        """
        Write the teacher to `output_dir`/teacher and upload it: the model, not the training state.

        Args:
            commit_message: of the commit.
            blocking: only True; the weights in the folder must not change during the upload.
            token: of the Hub; None takes `hub_token`, or the one of `hf auth login`.
            revision: the branch; None takes `hub_revision`, or main.
            private: of a new repository; None takes `hub_private_repo`.
            card: not used; the card says what is known of the run.

        Returns:
            Address of the repository; None on all ranks but the first.

        Raises:
            PushError: the upload failed. The teacher is in its folder; the message has the command that repeats it.
        """
        if not self.is_world_process_zero():
            return None
        teacher = Path(self.args.output_dir or ".") / "teacher"
        self.save_outcome(teacher)
        return self.push_teacher(teacher, commit_message, token, revision, private)

    def push_teacher(
        self,
        teacher: Path,
        message: str | None = None,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
    ) -> str:
        """What `push_to_hub` does, with a teacher that has been saved already."""
        args = self.args
        revision = revision or args.hub_revision
        repository = self.hub_model_id or args.hub_model_id or Path(args.output_dir or ".").resolve().name
        try:
            pushed = push_folder(
                teacher,
                repository,
                private=args.hub_private_repo if private is None else private,
                revision=revision,
                message=message,
                token=token or args.hub_token,
            )
        except PushError as error:
            branch = ["--revision", revision] if revision else []
            command = shlex.join(["dinov3-hf", "push", str(teacher), repository, *branch])
            raise PushError(f"{error} The command is: {command}") from error
        return pushed.url

    def _write_teacher(self, folder: Path) -> None:
        save_teacher_folder(self.model.teacher, self.args, folder)
        write_run_card(folder, self.args, self.state.global_step, self.state.log_history)


def _has_fused_adamw(device: torch.device) -> bool:
    return device.type in ("cuda", "cpu", "mps", "xpu")
