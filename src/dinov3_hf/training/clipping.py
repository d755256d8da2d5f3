"""Gradient clipping, one norm per sub-module."""

from collections.abc import Mapping

from torch import Tensor, nn


def clip_gradients(submodules: Mapping[str, nn.Module], max_norm: float) -> dict[str, Tensor]:
    """Clips the gradients of each sub-module to `max_norm` on its own, in place.

    The published runs clip backbone, DINO head and iBOT head separately, each against the full limit: a head's large
    gradient does not shrink the backbone's step.

        g <- g min(1, max_norm / (||g||_2 + 1e-6))

    Args:
        submodules: for example `{"backbone": ..., "dino_head": ..., "ibot_head": ...}`.
        max_norm: the limit; 0 measures without clipping, as in the Trainer.

    Returns:
        The norms before clipping, float32 `()` each, by the names of `submodules`.
    """
    limit = max_norm if max_norm > 0 else float("inf")
    return {name: nn.utils.clip_grad_norm_(module.parameters(), limit) for name, module in submodules.items()}
