"""Compares what we compute with what was recorded."""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch

import torch
from torch import Tensor


class Declined(Exception):
    """An option that the package leaves out on purpose, because no released model and no published recipe uses it."""


class NotInThePackageYet(Exception):
    """A part of the original implementation that the package does not have yet."""


class Unknown(Exception):
    """Something in a case that this program does not know: what it changes would go unnoticed."""


def refuse_unknown(section: str, given: Iterable[str], known: Collection[str]) -> None:
    """Raises Unknown for the first of the names in `given` that is not in `known`."""
    for name in given:
        if name not in known:
            raise Unknown(f"{section}: this program does not know {name}")


@dataclass
class Error:
    """The largest error of one tensor: absolute, and as a multiple of the tolerance (at most 1 passes)."""

    name: str
    absolute: float
    relative: float


@dataclass
class Comparison:
    """Compares named tensors with recorded ones at |a - b| <= atol + rtol |b|; every recorded one has to be compared.

    Args:
        expected: recorded tensors; integers and booleans have to be equal.
        rtol, atol: the case's tolerance.
        left_out: name patterns of recorded tensors that are not compared, with the reason.
    """

    expected: Mapping[str, Tensor]
    rtol: float
    atol: float
    left_out: Mapping[str, str] = field(default_factory=dict)
    errors: list[Error] = field(default_factory=list)
    misses: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def check(self, name: str, actual: Tensor | float, slack: Tensor | float = 0.0) -> None:
        """Compares `actual` with the recorded tensor `name`; a name that was not recorded is left alone.

        Args:
            slack: added to `atol`; a number, or one for each element.
        """
        if name not in self.expected:
            return
        actual, expected = _as_tensor(actual), self.expected[name]
        if _sort(actual) != _sort(expected):
            self._miss(name, f"{_sort(actual)} numbers, recorded {_sort(expected)}")
        elif expected.is_floating_point():
            self.check_pair(name, actual, expected, self.rtol, self.atol + slack)
        else:
            self.check_pair(name, actual, expected)

    def check_pair(
        self,
        name: str,
        actual: Tensor | float,
        expected: Tensor | float,
        rtol: float = 0.0,
        atol: Tensor | float = 0.0,
    ) -> None:
        """Compares two tensors at a tolerance of their own, by default none."""
        actual, expected = _as_tensor(actual), _as_tensor(expected)
        if actual.shape != expected.shape:
            self._miss(name, f"shape {tuple(actual.shape)}, recorded {tuple(expected.shape)}")
            return
        actual, expected = actual.double(), expected.double()
        # Infinity equals itself; NaN equals nothing.
        difference = torch.where(actual == expected, 0.0, (actual - expected).abs())
        # An exact match passes at any tolerance, also at none.
        excess = torch.where(difference == 0, 0.0, difference / (atol + rtol * expected.abs()))
        excess = excess.nan_to_num(nan=math.inf)
        worst = Error(name, _largest(difference), _largest(excess))
        self.errors.append(worst)
        if not worst.relative <= 1:
            self.misses.append(f"{name}: error {worst.absolute:.3g} is {worst.relative:.3g} x the tolerance")

    def _miss(self, name: str, what: str) -> None:
        self.misses.append(f"{name}: {what}")
        self.errors.append(Error(name, math.inf, math.inf))

    def finish(self) -> None:
        """Counts recorded tensors that were not compared as misses, but for those left out."""
        compared = {error.name for error in self.errors}
        reasons: dict[str, int] = {}
        for name in self.expected:
            if name in compared:
                continue
            reason = next((reason for pattern, reason in self.left_out.items() if fnmatch(name, pattern)), None)
            if reason is None:
                self.misses.append(f"{name}: not compared")
            else:
                reasons[reason] = reasons.get(reason, 0) + 1
        self.notes += [f"{reason} ({count} tensors)" for reason, count in reasons.items()]

    @property
    def worst(self) -> Error | None:
        """The largest error relative to its tolerance."""
        return max(self.errors, key=lambda error: error.relative, default=None)


def _as_tensor(value: Tensor | float) -> Tensor:
    # A Python float is float64; torch would make it float32.
    return torch.tensor(value, dtype=torch.float64) if isinstance(value, float) else torch.as_tensor(value).detach()


def _sort(tensor: Tensor) -> str:
    if tensor.dtype == torch.bool:
        return "boolean"
    return "real" if tensor.is_floating_point() else "integer"


def _largest(values: Tensor) -> float:
    return values.max().item() if values.numel() > 0 else 0.0
