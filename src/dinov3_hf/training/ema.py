"""The teacher's moving average."""

import torch
from torch import nn

from dinov3_hf.distributed.engine import Engine


@torch.no_grad()
def update_ema(teacher: nn.Module, student: nn.Module, momentum: float, engine: Engine | None = None) -> None:
    """
    teacher <- momentum * teacher + (1 - momentum) * student, for all parameters in one multi-tensor operation; shard
    by shard where the networks are sharded.

    Buffers are left alone: they are functions of the configuration. Parameters must be float32: in bfloat16 the step
    (1 - momentum) (student - teacher) rounds to nothing and the teacher stands still.

    Args:
        teacher, student: modules with the same parameters, in the same order.
        momentum: in [0, 1].
        engine: what has sharded them; None if nothing has.
    """
    dtype = next((parameter.dtype for parameter in teacher.parameters()), torch.float32)
    if dtype != torch.float32:
        raise ValueError(f"The EMA teacher is {dtype}; keep it in float32 and use bf16 autocast instead.")
    (engine or Engine()).update_average(teacher, student, 1.0 - momentum)
