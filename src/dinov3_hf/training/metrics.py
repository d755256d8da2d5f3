"""Values of each step on their way to the log: summed on the device, reduced, averaged between two logs."""

from collections.abc import Mapping

import torch
from torch import Tensor

from dinov3_hf.distributed.reductions import all_reduce_sum, world_size


class StepValues:
    """
    Named scalars of one optimizer step, summed over its micro-batches on their device.

    Nothing is copied to the host before `pop`, which takes one small reduction and one copy for all names.
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
        """
        The means over micro-batches and ranks since the last call, not finite where one of the values is not.

        Every rank must call it, with the same names in the same order.
        """
        if not self._sums:
            return {}
        means = torch.stack([total / self._counts[name] for name, total in self._sums.items()])  # (names,)
        means = all_reduce_sum(means) / world_size()
        names = list(self._sums)
        self._sums, self._counts = {}, {}
        return dict(zip(names, means.tolist(), strict=True))


class RunningMeans:
    """Averages of the values of several steps."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: Mapping[str, float]) -> None:
        """Add the values of one step."""
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._counts[name] = self._counts.get(name, 0) + 1

    def pop(self) -> dict[str, float]:
        """The means over the steps since the last call."""
        means = {name: total / self._counts[name] for name, total in self._sums.items()}
        self._sums, self._counts = {}, {}
        return means
