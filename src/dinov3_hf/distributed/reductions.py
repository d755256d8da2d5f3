"""Reductions over the processes of a run, or of a group of them.

Every function is the identity (or 1, or 0) without a process group, so callers need no branch of their own.

Legend: W processes, R rows of a process, `...` any further dimensions.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_group: ContextVar[dist.ProcessGroup | None] = ContextVar("group", default=None)


@contextmanager
def process_group(group: dist.ProcessGroup | None) -> Iterator[None]:
    """Where the processes are those of a group, for every function of this module.

    Threads that are started inside of it are outside of it; the backward pass of what was computed in it is not.

    Args:
        group: of `torch.distributed.new_group`; this process is in it. None: all processes.

    Raises:
        ValueError: this process is not in the group.
    """
    if group is not None and dist.get_rank(group) < 0:
        raise ValueError("this process is not in the process group; enter the group that it is in.")
    token = _group.set(group)
    try:
        yield
    finally:
        _group.reset(token)


def current_group() -> dist.ProcessGroup | None:
    """The group of `process_group`; None: all processes."""
    return _group.get()


def world_size() -> int:
    """Number of processes; 1 without a process group."""
    return dist.get_world_size(_group.get()) if _is_distributed() else 1


def rank() -> int:
    """Index of this process; 0 without a process group."""
    return dist.get_rank(_group.get()) if _is_distributed() else 0


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum of `tensor` over all processes.

    Args:
        tensor: (...), same shape and dtype in every process.

    Returns:
        (...), a new tensor, or `tensor` itself in a single process. No gradient passes through it.
    """
    return _all_reduce(tensor, dist.ReduceOp.SUM) if world_size() > 1 else tensor


def all_reduce_max(tensor: Tensor) -> Tensor:
    """Element-wise maximum of `tensor` over all processes; otherwise as `all_reduce_sum`."""
    return _all_reduce(tensor, dist.ReduceOp.MAX) if world_size() > 1 else tensor


def gather_rows(rows: Tensor) -> Tensor:
    """The rows of all processes, in the order of the ranks; differentiable.

    The gradient of a row is summed over the losses of all processes. With gradients averaged over the processes
    afterwards, as data parallel training does, this is the gradient of the mean of their losses.

    Args:
        rows: (R, ...), same shape and dtype in every process.

    Returns:
        (W * R, ...), or `rows` itself in a single process.
    """
    return _GatherRows.apply(rows) if world_size() > 1 else rows


def rows_of_each_process(rows: Tensor) -> Iterator[Tensor]:
    """
    The rows of process 0, then those of process 1, and so on: all rows, without room for all of them at a time.

    Args:
        rows: (R, ...), same shape and dtype in every process. Every process has to take all that is yielded.

    Returns:
        W times (R, ...); `rows` itself where they are this process's own. No gradient passes.
    """
    group = _group.get()
    for source in range(world_size()):
        part = rows.contiguous() if source == rank() else torch.empty_like(rows, memory_format=torch.contiguous_format)
        if world_size() > 1:
            dist.broadcast(part, source if group is None else dist.get_global_rank(group, source), group=group)
        yield part


def gather_lists(items: list[Any]) -> list[Any]:
    """The lists of all processes joined in the order of the ranks. Their entries must be picklable."""
    if world_size() == 1:
        return items
    lists: list[list[Any]] = [[] for _ in range(world_size())]
    dist.all_gather_object(lists, items, group=_group.get())
    return [item for part in lists for item in part]


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _all_reduce(tensor: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
    reduced = tensor.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(reduced, op=operation, group=_group.get())
    return reduced


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.group = _group.get()  # gradients of GPUs are computed in a thread of their own
        gathered = rows.new_empty((world_size() * rows.shape[0], *rows.shape[1:]))  # (W * R, ...)
        dist.all_gather(list(gathered.chunk(world_size())), rows.contiguous(), group=ctx.group)
        return gathered

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # An all-reduce and a slice: gloo has no reduce-scatter, and what is gathered here is small (CLS features).
        with process_group(ctx.group):
            num_rows = grad.shape[0] // world_size()
            return all_reduce_sum(grad)[rank() * num_rows : (rank() + 1) * num_rows]
