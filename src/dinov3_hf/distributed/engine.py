"""How a model that is trained, and networks that follow it, are spread over the ranks.

`Engine` is one process, or DistributedDataParallel: every rank holds everything. `FSDP2Engine` and `ZeroEngine` are in
modules of their own. What a trainer needs of all of them is the same few methods; parameters are known by their names
in the model.

A parameter's *shard* is the part of it that a rank holds, as a flat view of its storage. Networks of the same
architecture are sharded alike, so that a moving average or a copy is taken shard by shard, and no rank ever needs a
whole network for it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from dinov3_hf.distributed.pieces import Piece, StateReader
from dinov3_hf.distributed.reductions import all_reduce_sum, rank, world_size

PARAMETER = "param"
MOMENTS = ("exp_avg", "exp_avg_sq")
NUM_STEPS = "num_steps"  # optimizer steps that the moments are of


class Shard(NamedTuple):
    """What this rank holds of a tensor."""

    start: int  # in the flattened tensor
    values: Tensor  # (n,), a view of the storage
    on_every_rank: bool = False  # the same whole tensor


class Engine:
    """One process, or DistributedDataParallel, which the caller puts around the model."""

    name = "ddp"
    holds_everything = True  # on every rank
    mixes_dtypes = True  # a network may be bfloat16 beside others of float32

    def shard(
        self, networks: Sequence[nn.Module], blocks: Sequence[nn.Module], products: Sequence[nn.Module] = ()
    ) -> None:
        """
        Cut the parameters, in place, before the optimizer is made.

        Args:
            networks: everything that has parameters; each is called on its own, in any order.
            blocks: modules inside them that are gathered one at a time.
            products: modules inside of blocks, or beside them, whose parameters autocast would all make bfloat16.
        """

    def wrap(self, model: nn.Module, optimizer: Optimizer) -> "tuple[nn.Module, Any] | None":
        """What the trainer calls in the place of the model and of the optimizer; None leaves it to the trainer."""
        return None

    def no_sync(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Where gradients are only added up, because more are to come; `model` is what the trainer calls."""
        return model.no_sync() if isinstance(model, DistributedDataParallel | ShardedModel) else nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss, (), to those of the step."""
        loss.backward()

    def clip_gradients(self, submodules: Mapping[str, nn.Module], max_norm: float) -> dict[str, Tensor]:
        """
        Clip the gradients of each sub-module to `max_norm` on its own, in place:

            g <- g min(1, max_norm / (||g||_2 + 1e-6))

        Args:
            submodules: for example `{"backbone": ..., "dino_head": ..., "ibot_head": ...}`.
            max_norm: the limit; 0 measures without clipping, as in the Trainer.

        Returns:
            The norms over all ranks before clipping, float32 () each, by the names of `submodules`.
        """
        limit = max_norm if max_norm > 0 else float("inf")
        return {name: nn.utils.clip_grad_norm_(module.parameters(), limit) for name, module in submodules.items()}

    def discard_gradients(self, model: nn.Module) -> None:
        """Let the step that is due change nothing, moments and step counts of the optimizer included."""
        for parameter in model.parameters():
            parameter.grad = None

    def parameter_shard(self, parameter: nn.Parameter) -> Shard:
        """What this rank holds of a parameter."""
        return self._part_of(parameter.detach())

    def moment_shards(self, parameter: nn.Parameter, optimizer: Optimizer) -> dict[str, Shard]:
        """What this rank holds of the moments of a parameter; empty for one that is not trained."""
        state = optimizer.state.get(parameter)
        return {name: self._part_of(state[name]) for name in MOMENTS} if state else {}

    def _part_of(self, tensor: Tensor) -> Shard:
        return Shard(0, tensor.view(-1), on_every_rank=True)

    def shards_changed(self, module: nn.Module) -> None:
        """To be called when the shards of a network have been written to."""

    def update_average(self, average: nn.Module, module: nn.Module, weight: float) -> None:
        """average <- average + weight (module - average), shard by shard, in one multi-tensor operation."""
        torch._foreach_lerp_(self._shards(average), self._shards(module), weight)
        self.shards_changed(average)

    def copy(self, target: nn.Module, source: nn.Module) -> None:
        """target <- source, shard by shard, in the dtype of the target."""
        for ours, theirs in zip(self._shards(target), self._shards(source), strict=True):
            ours.copy_(theirs)
        self.shards_changed(target)

    def _shards(self, module: nn.Module) -> list[Tensor]:
        return [self.parameter_shard(parameter).values for parameter in module.parameters()]

    def whole_tensors(self, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """
        Name and whole tensor of each parameter, one at a time, on every rank; all ranks go through it together.
        """
        yield from module.named_parameters()

    def num_optimizer_steps(self, optimizer: Optimizer) -> int:
        """Steps that the moments are of."""
        return max((int(state["step"]) for state in optimizer.state.values() if "step" in state), default=0)

    def set_num_optimizer_steps(self, optimizer: Optimizer, num_steps: int) -> None:
        """As many steps as the moments that were put in are of."""
        for state in optimizer.state.values():
            state["step"].fill_(num_steps)

    @torch.no_grad()
    def pieces(self, model: nn.Module, optimizer: Optimizer) -> Iterator[Piece]:
        """
        What this rank has to save, so that all ranks together save everything once: parameters as `param/NAME`,
        moments of AdamW as `exp_avg/NAME` and `exp_avg_sq/NAME`, and `num_steps`. Values are views of the storage.
        """
        for index, (name, parameter) in enumerate(model.named_parameters()):
            shape = tuple(self.shape(parameter))
            shards = {PARAMETER: self.parameter_shard(parameter)}
            shards |= self.moment_shards(parameter, optimizer)
            for kind, shard in shards.items():
                # What every rank has is saved by one, in turn.
                if index % world_size() == rank() if shard.on_every_rank else len(shard.values) > 0:
                    yield Piece(f"{kind}/{name}", shape, shard.start, shard.values)
        if rank() == 0:
            yield Piece(NUM_STEPS, (), 0, torch.tensor([self.num_optimizer_steps(optimizer)]))

    def shape(self, parameter: nn.Parameter) -> torch.Size:
        """Of the whole parameter."""
        return parameter.shape

    @torch.no_grad()
    def load(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        reader: StateReader,
        wanted: Callable[[str], bool] = lambda name: True,
    ) -> None:
        """
        Put saved parameters and moments into this rank's shards.

        Args:
            model, optimizer: sharded as they are.
            reader: of a folder that any engine on any number of ranks has written.
            wanted: says of the name of a parameter whether to load it, by default all.

        Raises:
            ValueError: something that is wanted is not there, or in another shape.
        """
        self.prepare_moments(optimizer)
        for name, parameter in model.named_parameters():
            if not wanted(name):
                continue
            shards = {PARAMETER: self.parameter_shard(parameter)}
            shards |= {
                kind: shard
                for kind, shard in self.moment_shards(parameter, optimizer).items()
                if reader.has(f"{kind}/{name}")  # none are saved before the first step
            }
            for kind, shard in shards.items():
                self._load(shard, f"{kind}/{name}", tuple(self.shape(parameter)), reader)
        self.set_num_optimizer_steps(optimizer, int(reader.tensor(NUM_STEPS)))
        self.shards_changed(model)

    def _load(self, shard: Shard, name: str, shape: tuple[int, ...], reader: StateReader) -> None:
        if not reader.has(name):
            raise ValueError(f"{reader.folder} lacks {name}; resume with the recipe that wrote it.")
        if reader.shape(name) != shape:
            raise ValueError(
                f"{name} is {reader.shape(name)} in {reader.folder} and {shape} here; resume with the recipe that "
                "wrote it."
            )
        if len(shard.values):
            shard.values.copy_(reader.read(name, shard.start, shard.start + len(shard.values)))

    def prepare_moments(self, optimizer: Optimizer) -> None:
        """Make the moments of an optimizer that has not taken a step yet, all zero."""
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if not optimizer.state[parameter]:
                    optimizer.state[parameter] = new_state(parameter)


class ShardedModel(nn.Module):
    """
    What a trainer calls in the place of a sharded model: the model's forward, in autocast if it is asked for.

    Args:
        module: the model.
        autocast: gives the context of each forward.
        no_sync: gives the context in which gradients are added up and not exchanged yet.
    """

    def __init__(
        self,
        module: nn.Module,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        no_sync: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        super().__init__()
        self.module = module
        self._autocast = autocast
        self.no_sync = no_sync

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self._autocast():
            return self.module(*args, **kwargs)


def clip_shards(gradients: Mapping[str, Sequence[Tensor]], max_norm: float, device: torch.device) -> dict[str, Tensor]:
    """
    What `Engine.clip_gradients` does, for gradients of which each rank holds a part.

    Args:
        gradients: name -> this rank's parts, changed in place; they may be in the memory of the host.
        max_norm: 0 measures only.
        device: where ranks meet.
    """
    squares = torch.zeros(len(gradients), dtype=torch.float64, device=device)  # of small numbers
    for index, parts in enumerate(gradients.values()):
        if parts:
            squares[index] = torch.stack(torch._foreach_norm(list(parts))).double().square().sum()
    norms = all_reduce_sum(squares).sqrt().float()  # (names,)
    if max_norm > 0:
        factors = (max_norm / (norms + 1e-6)).clamp(max=1.0)
        for factor, parts in zip(factors, gradients.values(), strict=True):
            if parts:
                torch._foreach_mul_(list(parts), factor.to(parts[0].device))
    return dict(zip(gradients, norms, strict=True))


def empty_parameters_to_buffers(model: nn.Module) -> None:
    """
    Let parameters without values (no register tokens) be buffers: there is nothing to train or to cut, and neither
    FSDP2 nor ZeRO can gather nothing.
    """
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.numel() == 0:
                delattr(module, name)
                module.register_buffer(name, parameter.detach())


def new_state(weights: Tensor) -> dict[str, Tensor]:
    """What AdamW remembers of weights before its first step."""
    step = torch.zeros((), dtype=torch.float32, device=weights.device)  # there, for the fused kernel
    return {"step": step, **{name: torch.zeros_like(weights, requires_grad=False) for name in MOMENTS}}
