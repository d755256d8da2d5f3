"""`RunTrainer`: `transformers.Trainer` with what any run on multi-crop views of unlabelled images adds to it, whatever
is trained on them.

Overrides of the Trainer's internals in this file:

    get_train_dataloader    one endless stream of samples, the same whatever ranks and accumulation
    get_batch_samples       the wait for data; at high resolutions micro-batches are split
    log                     images per second, guards
    train                   looks for the checkpoint to go on from, and whether it belongs to this run
    _save_checkpoint        written beside, in the background; renamed when it is whole
    _save, _save_optimizer_and_scheduler, _load_from_checkpoint, _load_optimizer_and_scheduler
                            all ranks' pieces of parameters and moments, in the format of the engines

What a subclass says is in the methods that raise NotImplementedError.
"""

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import ProgressCallback, Trainer
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_utils import TrainOutput

from dinov3_hf.data.collators import collate_views, split_batch
from dinov3_hf.data.crop_sizes import MixedSizes
from dinov3_hf.data.datasets import SSLDataset
from dinov3_hf.data.photometric import Photometric
from dinov3_hf.data.sampler import StreamSampler
from dinov3_hf.data.sources.base import Images, as_source
from dinov3_hf.distributed.pieces import Piece, StateReader, on_host
from dinov3_hf.distributed.reductions import all_reduce_max, gather_lists
from dinov3_hf.training.callbacks import SeenSamplesCallback, TrainingProgressCallback
from dinov3_hf.training.checkpoint_writer import STATE, CheckpointWriter
from dinov3_hf.training.checkpoints import checkpoints, clean_up, remove_old_checkpoints
from dinov3_hf.training.evaluation import LabelledImages
from dinov3_hf.training.guards import DataWait, StarvationWarningCallback, peak_memory
from dinov3_hf.training.preemption import PreemptionCallback, leave_signals_to_the_run
from dinov3_hf.training.resume import RECIPE, IntervalsOfThisRun, find_checkpoint, save_fingerprint
from dinov3_hf.training.ssl_config import SSLConfig
from dinov3_hf.training.stream_progress import load_progress, save_progress
from dinov3_hf.training.unreadable_images import UnreadableImages

logger = logging.getLogger(__name__)

SECONDS_TO_SETTLE = 60.0
Batch = dict[str, Any]
EvaluationImages = tuple[LabelledImages, LabelledImages | None]
Found = TypeVar("Found")


class RunTrainer(Trainer):
    """
    Args:
        model: what is trained.
        args: the recipe.
        train_images: what to learn from; labels are not looked at.
        eval_images: labelled reference and query images; None for the query classifies each reference image by all
            the others.
        callbacks: further `TrainerCallback`s.
    """

    args: SSLConfig
    train_dataset: MixedSizes
    progress_callback: ClassVar[type[TrainingProgressCallback]] = TrainingProgressCallback

    def __init__(
        self,
        model: nn.Module,
        args: SSLConfig,
        train_images: Images,
        eval_images: EvaluationImages | None,
        callbacks: list[Any] | None,
    ) -> None:
        self.train_images = as_source(train_images, len(args.image_mean))
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
        output_dir, batch_size = Path(args.output_dir or "."), args.global_batch_size
        self.checkpoint_writer = CheckpointWriter(output_dir)
        share = (args.per_device_train_batch_size, args.process_index, args.world_size)
        self.sampler = StreamSampler(self.train_images, args.max_steps * batch_size, batch_size, args.seed, *share)
        self.photometric = Photometric(args.image_mean, args.image_std).to(args.device)
        self.unreadable_images = UnreadableImages(output_dir, self.train_images.num_images, args.max_unreadable_share)
        self.preemption = PreemptionCallback()
        for callback in (SeenSamplesCallback(self.sampler), StarvationWarningCallback(), self.unreadable_images):
            self.add_callback(callback)
        self.add_callback(self.preemption)
        if not args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(self.progress_callback())
        self.add_callback(IntervalsOfThisRun())
        self._staging: Path | None = None  # while a checkpoint is written
        self._pieces: list[Piece] = []  # for it
        self._data_wait = DataWait()
        self._step_failures: list[tuple[str, str]] = []  # name and reason of images that could not be read
        self._last_log: tuple[float, int] | None = None  # time in seconds, step

    def _prepare_networks(self, afresh: bool) -> None:
        """Give the networks what a fresh run starts from, and spread them over the ranks. All ranks call it."""
        raise NotImplementedError

    def _folder_names(self) -> tuple[str, ...]:
        """Of the folders that the run writes beside its checkpoints."""
        raise NotImplementedError

    def _state_pieces(self) -> Iterator[Piece]:
        """This rank's pieces of parameters and moments."""
        raise NotImplementedError

    def _load_state(self, reader: StateReader) -> None:
        """Put saved parameters and moments into this rank's shards."""
        raise NotImplementedError

    def _save_config(self, folder: Path) -> None:
        """Write what the networks are into a checkpoint."""
        raise NotImplementedError

    def _complete_checkpoint(self, folder: Path, step: int, log_history: list[dict[str, float]]) -> None:
        """Put the model folders into a checkpoint that holds the pieces of all ranks; in the background, on rank 0."""
        raise NotImplementedError

    def _training_values(self, step: int) -> dict[str, float]:
        """What the log says of the steps since the last one. All ranks call it."""
        raise NotImplementedError

    @property
    def _step_was_skipped(self) -> bool:
        """Whether the last step was not finite, on every rank the same."""
        raise NotImplementedError

    def _ask_evaluators(self, prefix: str) -> dict[str, float]:
        """What the evaluators say, on rank 0. All ranks call it."""
        raise NotImplementedError

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
            self._prepare_networks(afresh=folder is None)
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
        clean_up(output_dir, self._folder_names())
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
        """
        with self._data_wait.waiting():
            batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._step_failures = [failure for batch in batches for failure in batch.pop("unreadable")]
        size = self.crop_sizes.at(self.state.global_step).per_device_train_batch_size
        return [split_batch(batch, size or self.args.train_batch_size) for batch in batches], num_items

    def floating_point_ops(self, inputs: list[Batch]) -> int:  # type: ignore[override]
        return 0  # the Trainer would count tokens of a language model

    def _clip_grad_norm(self, model: nn.Module) -> float:
        raise NotImplementedError

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> float:
        # The Trainer does not clip when there is no limit.
        return self._clip_grad_norm(model) if grad_norm is None else grad_norm

    def _settle_run(self, any_failures: bool, any_preempted: bool) -> None:
        """What is decided about the run at the end of each step; all ranks have come to the same arguments."""
        self.preemption.agree(any_preempted)
        failures = gather_lists(self._step_failures) if any_failures else []
        self.unreadable_images.count(self.args.global_batch_size, failures, self.is_world_process_zero())

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """What the [`Evaluator`]s among the callbacks say, as `{prefix}_{name}`."""
        if eval_dataset is not None:
            raise ValueError(
                "evaluate measures by its callbacks; add_callback(KnnCallback(reference, query)) instead."
            )
        metrics: dict[str, float] = broadcast_object_list([self._ask_evaluators(metric_key_prefix)])[0]
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            step = self.state.global_step
            guards = torch.tensor([self._data_wait.pop(), peak_memory(self.args.device)], device=self.args.device)
            wait_share, peak_gib = all_reduce_max(guards).tolist()
            del logs["loss"], logs["grad_norm"]  # skipped steps included
            logs = {
                **logs,
                **self._training_values(step),
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
        keep_last = None if self._step_was_skipped else args.save_total_limit

        def complete(checkpoint: Path) -> None:
            self._complete_checkpoint(checkpoint, step, log_history)

        def remove_old() -> None:
            remove_old_checkpoints(folder.parent.parent, step, keep_last, args.keep_every_steps, keep_step=best)

        self.checkpoint_writer.finish(step, self._pieces, complete, remove_old, error)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir or ".")
            self._save_config(folder)
            self.args.save_yaml(folder / RECIPE)
            save_fingerprint(folder, self.train_images.fingerprint())

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.args.should_save:
            assert self.lr_scheduler is not None
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)
        self._pieces = on_host(self._state_pieces())
        save_progress(Path(output_dir), self.args.process_index, self.sampler.progress())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Nothing yet: parameters come with the moments, when the engine has sharded both."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            assert self.lr_scheduler is not None
            self.sampler.restore(load_progress(Path(checkpoint)))
            self._load_state(StateReader(Path(checkpoint) / STATE))
            self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))
