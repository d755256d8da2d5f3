"""Checks of configuration fields that the families share."""

import difflib
from collections.abc import Mapping
from copy import deepcopy
from typing import Any


def check_integer(name: str, value: object, minimum: int) -> None:
    """Raise ValueError unless `value` is an integer of at least `minimum`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"{name} {value!r} is not an integer of at least {minimum}.")


def check_drop_path_rate(rate: float) -> None:
    """Raise ValueError unless `rate` is a share of images that may skip a branch."""
    if not 0 <= rate < 1:
        raise ValueError(f"drop_path_rate {rate} is not in [0, 1); use 0 for no stochastic depth.")


def preset_fields(name: str, presets: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """A copy of the fields of the preset `name`; raise ValueError, naming the closest, where there is none."""
    if name not in presets:
        close = difflib.get_close_matches(name, presets, n=1)
        remedy = f"did you mean {close[0]}?" if close else f"use one of {', '.join(presets)}."
        raise ValueError(f"there is no preset {name!r}; {remedy}")
    return deepcopy(presets[name])
