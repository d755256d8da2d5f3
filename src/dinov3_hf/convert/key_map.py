"""Tables of parameter names: two columns, the inverse computed.

A pattern is a name in which `{i}` and `{j}` stand for numbers and `{p}` for `weight` or `bias`. `None` on the right
drops the name on purpose; a name that no pattern knows is an error.
"""

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

Value = TypeVar("Value")

_FIELDS = {"i": r"\d+", "j": r"\d+", "p": "weight|bias"}


class KeyMap:
    """
    Renames the keys of a state dict.

    Args:
        table: Pairs (pattern of the source, pattern of the target or `None`).
    """

    def __init__(self, table: Iterable[tuple[str, str | None]]) -> None:
        self.table = list(table)
        self._rules = [(_compile(source), target) for source, target in self.table]

    def rename(self, key: str) -> str | None:
        """
        The name on the other side; `None` if it is dropped on purpose.

        Raises:
            ValueError: No row of the table knows the name.
        """
        for pattern, target in self._rules:
            found = pattern.fullmatch(key)
            if found is not None:
                return None if target is None else target.format(**found.groupdict())
        raise ValueError(
            f"{key} is not a parameter of this architecture; check that the checkpoint is of the right kind."
        )

    def inverse(self) -> "KeyMap":
        """
        The table read from right to left, without the names that are dropped.

        Raises:
            ValueError: Two rows have the same target, so that there is no way back.
        """
        targets = [target for _, target in self.table if target is not None]
        if len(set(targets)) != len(targets):
            raise ValueError("two rows of the table have the same target; split it into two tables.")
        return KeyMap((target, source) for source, target in self.table if target is not None)

    def apply(self, state: Mapping[str, Value]) -> dict[str, Value]:
        """
        Rename every key; the values stay as they are.

        Raises:
            ValueError: A name is unknown, or two names become one.
        """
        renamed: dict[str, Value] = {}
        for key, value in state.items():
            target = self.rename(key)
            if target is None:
                continue
            if target in renamed:
                raise ValueError(f"{key} and another name both become {target}; remove one of them.")
            renamed[target] = value
        return renamed


def _compile(pattern: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", pattern)  # text, field, text, field, ..., text
    groups = [re.escape(part) if at % 2 == 0 else f"(?P<{part}>{_FIELDS[part]})" for at, part in enumerate(parts)]
    return re.compile("".join(groups))
