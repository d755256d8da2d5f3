"""Fits a value read from YAML to the type annotation of the field that it is meant for."""

import types
from collections.abc import Mapping
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin

from dinov3_hf.errors import ArgumentError, did_you_mean


def fit_to_annotation(value: Any, annotation: Any, text: str | None = None) -> Any:
    """`value` as the annotation wants it.

    Integers pass as floats and whole floats (`1e6`) as integers; nothing else is converted, so that `"3"` is no number
    and `1` no boolean.

    Args:
        value: plain value (None, bool, int, float, str, list, mapping).
        annotation: `int`, `float | None`, `list[float]`, `Literal[...]`, an `Enum`, ...; `Any` and other classes take
            every value.
        text: how the value was typed on a command line; a field that takes text gets it unchanged (`--run_name 1e3`).

    Raises:
        TypeError: the value does not fit.
    """
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        return _fit_to_union(value, get_args(annotation), text)
    if origin is Literal:
        choices = get_args(annotation)
        if text in choices:
            return text
        if value in choices and type(value) is type(choices[choices.index(value)]):
            return value
    elif origin is list or annotation is list:
        if isinstance(value, list):
            entry_type = next(iter(get_args(annotation)), Any)
            return [fit_to_annotation(entry, entry_type) for entry in value]
    elif origin is dict or annotation is dict:
        if isinstance(value, Mapping):
            return dict(value)
    elif annotation is str:
        if isinstance(value, str) or text is not None:
            return value if text is None else text
    elif annotation is bool:
        if isinstance(value, bool):
            return value
    elif annotation is int:
        if _is_number(value) and float(value).is_integer():
            return int(value)
    elif annotation is float:
        if _is_number(value):
            return value
    elif annotation is types.NoneType:
        if value is None:
            return None
    elif isinstance(annotation, type) and issubclass(annotation, Enum):
        if (value if text is None else text) in [member.value for member in annotation]:
            return value if text is None else text
    else:
        return value
    raise TypeError(f"{value!r} is not {describe(annotation)}")


def fit_mapping(name: str, entries: Mapping[str, Any], annotations: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a nested field such as `dino_head`, each fitted to its annotation.

    Raises:
        ArgumentError: an entry that does not exist, or a value of the wrong type.
    """
    fitted = {}
    for key, value in entries.items():
        if key not in annotations:
            raise ArgumentError(f"{name} has no entry {key!r}; {did_you_mean(key, annotations)}")
        try:
            fitted[key] = fit_to_annotation(value, annotations[key])
        except TypeError:
            raise ArgumentError(f"{name}.{key} is {value!r}; expected {describe(annotations[key])}.") from None
    return fitted


def _fit_to_union(value: Any, members: tuple[Any, ...], text: str | None) -> Any:
    # In this order `null` is None and `0.1` a number before either is taken for text, and `Strategy | str` is checked
    # against the strategies.
    has_enum = any(isinstance(member, type) and issubclass(member, Enum) for member in members)
    members = tuple(member for member in members if not (has_enum and member is str))
    for member in sorted(members, key=lambda member: member is str):
        try:
            return fit_to_annotation(value, member, text)
        except TypeError:
            continue
    raise TypeError(f"{value!r} fits no member")


def describe(annotation: Any) -> str:
    """What an annotation asks for, in words: `an integer or null`."""
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        members = get_args(annotation)
        has_enum = any(isinstance(member, type) and issubclass(member, Enum) for member in members)
        ordered = sorted(members, key=lambda member: member is types.NoneType)
        return " or ".join(dict.fromkeys(describe(member) for member in ordered if not (has_enum and member is str)))
    if origin is Literal:
        return f"one of {', '.join(str(choice) for choice in get_args(annotation))}"
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return f"one of {', '.join(str(member.value) for member in annotation)}"
    if origin is list:
        (entry,) = get_args(annotation)
        entries = {float: "numbers", int: "integers", dict: "mappings"}.get(get_origin(entry) or entry, "names")
        return f"a list of {entries}"
    names = {bool: "true or false", int: "an integer", float: "a number", str: "text", types.NoneType: "null"}
    if annotation in names:
        return names[annotation]
    if origin is dict or annotation is dict:
        return "a mapping"
    return f"a {annotation.__name__}" if isinstance(annotation, type) else "a value"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
