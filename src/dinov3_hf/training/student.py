"""One of the students of a distillation: network, moving average, and whatever else each student has of its own."""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dinov3_hf.distributed.engine import ShardedModel, empty_parameters_to_buffers
from dinov3_hf.distributed.pieces import Piece, StateReader
from dinov3_hf.distributed.reductions import process_group, rank, world_size
from dinov3_hf.models.dinov3_pretraining.modeling_dinov3_distillation import DINOv3ForDistillation, student_network
from dinov3_hf.training.distillation_teacher import load_teacher, read_teacher
from dinov3_hf.training.ema import update_ema
from dinov3_hf.training.engines import make_engine
from dinov3_hf.training.evaluation import Evaluator
from dinov3_hf.training.guards import NonFiniteGuard, NotFinite
from dinov3_hf.training.memory import set_forwards, shard_networks, use_float8
from dinov3_hf.training.metrics import RunningMeans, StepValues
from dinov3_hf.training.param_groups import make_adamw, parameter_groups
from dinov3_hf.training.recipe_scheduler import RecipeScheduler
from dinov3_hf.training.student_config import StudentConfig
from dinov3_hf.training.whole_network import whole_network

logger = logging.getLogger(__name__)

Batch = dict[str, Any]


class Student:
    """
    Args:
        name: of the student.
        args: of the student.
        evaluators: measure it.
        group: processes that train it; None is all.
        autocast: gives the context of each forward.

    Attributes:
        stopped_at: the step in which it was given up, or None; it stays as it was before.
    """

    def __init__(
        self,
        name: str,
        args: StudentConfig,
        evaluators: list[Evaluator],
        group: dist.ProcessGroup | None,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.name = name
        self.args = args
        self.evaluators = evaluators
        self.group = group
        self.stopped_at: int | None = None
        self.guard = NonFiniteGuard()
        self.schedules = args.schedules()
        self._draws = args.student_draws()
        self._autocast = autocast
        self._step_values = StepValues()
        self._means = RunningMeans()
        self.model = new_student(args)
        prepare_blocks(self.model, args)
        if args.place_model_on_device:
            nn.Module.to(self.model, args.device)
        with self.in_group():
            self.engine = make_engine(
                args.launched, args.device, args.train_batch_size, args.bf16, args.offload_optimizer, autocast
            )
        self._wrapped: nn.Module | None = None
        self.optimizer: Any = None  # what takes the step

    @contextmanager
    def in_group(self) -> Iterator[None]:
        """Where reductions and shards are those of the processes that train this student."""
        with process_group(self.group):
            yield

    @property
    def speaks(self) -> bool:
        """Whether this process is the first of the group."""
        with self.in_group():
            return rank() == 0

    @property
    def is_active(self) -> bool:
        return self.stopped_at is None

    @property
    def submodules(self) -> dict[str, nn.Module]:
        """The parts that have a parameter group namespace and a gradient clip of their own."""
        return dict(self.model.student.named_children())

    @torch.no_grad()
    def load_start(self) -> None:
        """Put the weights of `start_from` into the student, if it names a model; before `prepare`."""
        if self.args.start_from is None:
            return
        start = load_teacher(read_teacher(self.args.start_from), bf16=False)
        for network in (self.model.student, self.model.ema):
            for name, ours in network.named_children():
                theirs = dict(start.named_children()).get(name)
                if theirs is not None and (name == "backbone" or _shapes(ours) == _shapes(theirs)):
                    weights = dict(theirs.named_parameters())
                    for key, parameter in ours.named_parameters():
                        if key in weights:  # a norm for local crops is not in every backbone
                            parameter.copy_(weights[key])

    def prepare(self) -> None:
        """Spread the student over its group, and make its optimizer. Once."""
        if self._wrapped is not None:
            return
        args = self.args
        with self.in_group():
            networks = [part for network in (self.model.student, self.model.ema) for part in network.children()]
            shard_networks(self.engine, networks)
            groups = parameter_groups(
                self.submodules,
                layerwise_lr_decay=args.layerwise_lr_decay,
                patch_embed_lr_mult=args.patch_embed_lr_mult,
            )
            self.adamw = make_adamw(groups, args)
            self.scheduler = RecipeScheduler(self.adamw, self.schedules)
            wrapped = self.engine.wrap(self.model, self.adamw)
            self._wrapped, self.optimizer = (self._data_parallel(), self.adamw) if wrapped is None else wrapped

    def _data_parallel(self) -> nn.Module:
        if world_size() == 1:
            return ShardedModel(self.model, self._autocast)
        device = self.args.device
        with warnings.catch_warnings():
            # There is no other name yet for leaving buffers alone.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            parallel = DistributedDataParallel(
                self.model,
                device_ids=[device.index] if device.type == "cuda" else None,
                process_group=self.group,
                broadcast_buffers=False,
            )
        return ShardedModel(parallel, self._autocast, parallel.no_sync)

    def learn(self, views: Batch, step: int, share: float, is_last: bool) -> Tensor:
        """
        Add the gradients of some images to those of the step.

        Args:
            views: finished crops, masks and the teacher's targets of a part of the batch.
            step: the optimizer step, from 0.
            share: of the step's loss that these images are.
            is_last: of the step.

        Returns:
            Their part of the loss, ().
        """
        assert self._wrapped is not None
        values = self.schedules.at(step)
        first_image, num_images = views["first_image"], len(views["mask"]) // 2
        draws = self._draws.at(step, range(first_image, first_image + num_images), self.args.device)
        with self.in_group(), nullcontext() if is_last else self.engine.no_sync(self._wrapped):
            output = self._wrapped(
                global_crops=views["global_crops"],
                local_crops=views["local_crops"],
                target=views["target"],
                mask_indices=views["mask_indices"],
                mask_weight=views["mask_weight"],
                local_loss_weight=values["local_loss_weight"],
                gram_weight=values.get("gram_weight", 0.0),
                draws=draws,
            )
            loss: Tensor = output.loss * share
            self.engine.backward(loss)
        self._step_values.add({f"loss/{name}": value for name, value in output.losses.items()})
        self._step_values.add({"loss": output.loss})
        self._step_values.add(
            {f"prototypes/{name}_entropy": value for name, value in output.prototype_entropy.items()}
        )
        return loss.detach()

    def settle_step(self, step: int) -> float:
        """
        Clip the gradients, and look at the step before the optimizer moves. After the third step in a row that is not
        finite the student is stopped.

        Args:
            step: number of the step, from 1.

        Returns:
            The norm of all gradients, 0 for a skipped step.
        """
        with self.in_group():
            norms = self.engine.clip_gradients(self.submodules, self.args.max_grad_norm)
            norm = torch.linalg.vector_norm(torch.stack(list(norms.values())))
            self._step_values.add({f"grad_norm/{name}": value for name, value in norms.items()} | {"grad_norm": norm})
            values = self._step_values.pop()
            try:
                passes = self.guard.passes(step, values, self.speaks, left=f"the weights of student {self.name} were")
            except NotFinite as error:
                passes, self.stopped_at = False, step
                if self.speaks:
                    logger.warning(
                        "step %d: student %s is stopped, %s; it stays as it was after step %d, the others go on. "
                        "Distil it again with a lower learning_rate.",
                        *(step, self.name, error.reason, step_of_stopped(step)),
                    )
            if passes:
                self._means.add(values)
                return values["grad_norm"]
            self.engine.discard_gradients(self.model)
            return 0.0

    def move(self, step: int) -> None:
        """
        Let optimizer and moving average take a step, unless it is skipped.

        Args:
            step: the optimizer step, from 0.
        """
        if not self.is_active:
            return
        with self.in_group():
            self.optimizer.step()
            if not self.guard.step_was_skipped:
                update_ema(
                    self.model.ema, self.model.student, self.schedules.at(step)["teacher_momentum"], self.engine
                )

    def pop_log(self, step: int) -> dict[str, float]:
        """
        The means over the steps since the last call, and the schedules of step `step`, from 0; of a student that has
        been stopped, when that was.
        """
        values = self.schedules.at(step)
        return {
            **self._means.pop(),
            **{f"schedule/{name}": value for name, value in values.items()},
            "guard/skipped_steps": self.guard.num_skipped,
            **({} if self.stopped_at is None else {"guard/stopped_at": self.stopped_at}),
        }

    def whole_ema(self) -> nn.Module:
        """The moving average, whole in the first process of the group. All of the group call it."""
        with self.in_group():
            return whole_network(
                self.engine, self.model.ema, lambda: student_network(self.args.pretraining_config()), self.speaks
            )

    def pieces(self) -> list[Piece]:
        """What this process has to save."""
        with self.in_group():
            return [piece.of_network(self.name) for piece in self.engine.pieces(self.model, self.adamw)]

    def load(self, reader: StateReader) -> None:
        """Put what `pieces` has saved into this process' shards."""
        with self.in_group():
            self.engine.load(self.model, self.adamw, reader.of(self.name))


def prepare_blocks(model: DINOv3ForDistillation, args: StudentConfig) -> None:
    """Let the blocks that are trained compute as the recipe says: `gradient_checkpointing`, `torch_compile`, `fp8`."""
    backbone = model.student.backbone
    if args.fp8:
        use_float8(backbone)
    # The recipe's field may also be a boolean, but no more once the configuration is made.
    set_forwards(backbone, args.gradient_checkpointing, args.torch_compile)  # type: ignore[arg-type]


def step_of_stopped(stopped_at: int) -> int:
    """The last step, from 1, that a student took which was stopped in step `stopped_at`."""
    return stopped_at - NonFiniteGuard.max_in_a_row


def new_student(args: StudentConfig) -> DINOv3ForDistillation:
    """A student with random weights, which are a function of the seed and not of what was made before it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        model = DINOv3ForDistillation(args.pretraining_config())
    empty_parameters_to_buffers(model)
    for name, parameter in model.student.named_parameters():
        # Data parallel training waits for the gradient of everything that may have one.
        never_seen = "mask_token" in name or ("local_cls_norm" in name and args.num_local_crops == 0)
        if never_seen:
            parameter.requires_grad_(False)
    return model


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in module.named_parameters()}
