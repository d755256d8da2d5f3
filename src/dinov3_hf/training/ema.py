"""The teacher's moving average."""

import torch
from torch import nn


@torch.no_grad()
def update_ema(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """
    teacher <- momentum * teacher + (1 - momentum) * student, for all parameters in one multi-tensor operation.

    Buffers are left alone: they are functions of the configuration. Parameters must be float32: in bfloat16 the step
    (1 - momentum) (student - teacher) rounds to nothing and the teacher stands still.

    Args:
        teacher, student: modules with the same parameters, in the same order.
        momentum: in [0, 1].
    """
    averages: list[torch.Tensor] = list(teacher.parameters())
    if averages and averages[0].dtype != torch.float32:
        raise ValueError(f"The EMA teacher is {averages[0].dtype}; keep it in float32 and use bf16 autocast instead.")
    torch._foreach_lerp_(averages, list(student.parameters()), 1.0 - momentum)
