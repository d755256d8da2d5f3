"""Averages of per-step values between two log lines."""

from collections.abc import Mapping

import torch
from torch import Tensor

from dinov3_hf.distributed.reductions import all_reduce_sum, world_size


class RunningMeans:
    """
    Sums named scalars on their device and averages them, over the values and over the ranks, when they are read.

    Nothing is copied to the host before `pop`, so a step never waits for its metrics.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add one value, a tensor of shape (), for each name."""
        for name, value in values.items():
            value = value.detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def pop(self) -> dict[str, float]:
        """The means since the last call; every rank must call it, with the same names in the same order."""
        if not self._sums:
            return {}
        means = torch.stack([total / self._counts[name] for name, total in self._sums.items()])  # (names,)
        means = all_reduce_sum(means) / world_size()
        names = list(self._sums)
        self._sums, self._counts = {}, {}
        return dict(zip(names, means.tolist(), strict=True))
