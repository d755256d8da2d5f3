"""YAML as this package reads and writes it: recipes, data recipes, values of the command line."""

import math
import re
from collections.abc import Hashable
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml

from dinov3_hf.errors import ArgumentError


class _CoreLoader(yaml.SafeLoader):
    """YAML 1.2 scalars: `1e-4` is a number, `no` and `on` are text; a key that stands twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(
                    problem="a key must be one word", problem_mark=key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key} stands twice", problem_mark=key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _construct_int(loader: _CoreLoader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node))  # PyYAML would read 010 as octal


_CoreLoader.add_constructor("tag:yaml.org,2002:int", _construct_int)


class _CoreDumper(yaml.SafeDumper):
    """Quotes the texts that `_CoreLoader` would not read as text."""


_SCALARS = {
    "tag:yaml.org,2002:null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "tag:yaml.org,2002:bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "tag:yaml.org,2002:int": (r"[-+]?[0-9][0-9_]*", list("-+0123456789")),
    "tag:yaml.org,2002:float": (
        r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf)|\.(?:nan|NaN)",
        list("-+0123456789."),
    ),
}
for _class in (_CoreLoader, _CoreDumper):
    _class.yaml_implicit_resolvers = {}
    for _tag, (_pattern, _first_characters) in _SCALARS.items():
        _class.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})$"), _first_characters)


def parse_yaml(text: str, source: str) -> Any:
    """The value of a YAML text.

    Args:
        text: YAML.
        source: what it is called in messages: a file, or an option of the command line.

    Raises:
        ArgumentError: the text is not YAML; the message says where.
    """
    try:
        return yaml.load(text, Loader=_CoreLoader)  # a SafeLoader: builds plain values only
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark is not None else ""
        raise ArgumentError(f"{source}{line} is not valid YAML: {error.problem}.") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ArgumentError(f"{source} is not valid YAML: {' '.join(str(error).split())}.") from None


def read_yaml_mapping(path: Path | Traversable, source: str, otherwise: str, form: str) -> dict[str, Any]:
    """The mapping in a YAML file.

    Args:
        path: of the file.
        source: what it is called in messages.
        otherwise: what to do about a file that cannot be read.
        form: what to write into one that is not a mapping.

    Raises:
        ArgumentError: the file cannot be read, or is not a YAML mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ArgumentError(f"{source} cannot be read ({reason}); {otherwise}.") from None
    values = parse_yaml(text, source)
    if not isinstance(values, dict):
        raise ArgumentError(f"{source} is not a mapping; {form}.")
    return values


def dump_yaml(value: Any, inline: bool = False) -> str:
    """YAML text that `parse_yaml` reads back as `value`: plain types, mappings in their order.

    With `inline` it is one line as on a command line: `{preset: vits16}`, `[0.1, 0.5]`, `null`.
    """
    width = math.inf if inline else None
    text = yaml.dump(
        value, Dumper=_CoreDumper, default_flow_style=inline, width=width, sort_keys=False, allow_unicode=True
    )
    # A document of one scalar ends in a line of dots.
    return text.rstrip("\n").removesuffix("\n...") if inline else text
