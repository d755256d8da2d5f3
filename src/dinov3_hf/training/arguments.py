"""Command lines of the training scripts: `RECIPE [--field value ...]`.

Values are YAML, so `0.1`, `1e-4`, `true`, `null`, `[0.1, 0.5]` and `{preset: vitb16}` mean what they mean in a recipe.
A dot reaches into a nested field: `--backbone.drop_path_rate 0.1`, `--lr_schedule.peak 1e-4`.
"""

import copy
import dataclasses
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from dinov3_hf.errors import ArgumentError, did_you_mean
from dinov3_hf.field_types import describe, fit_to_annotation
from dinov3_hf.recipes.pages import read_recipe, recipe_names
from dinov3_hf.training.recipe_config import RecipeConfig
from dinov3_hf.training.schedules import Schedule
from dinov3_hf.yaml_text import parse_yaml

_SEE_HELP = "--help lists the fields."
# Short names of fields on the command line.
ALIASES = {"from": "start_from"}

ConfigT = TypeVar("ConfigT", bound=RecipeConfig)


class Override(NamedTuple):
    """One `--field value` of a command line."""

    path: list[str]  # ["lr_schedule", "peak"]
    text: str

    @property
    def option(self) -> str:
        return "--" + ".".join(self.path)

    @property
    def value(self) -> Any:
        return parse_yaml(self.text, self.option)


def parse_arguments(
    config_class: type[ConfigT],
    argv: Sequence[str] | None = None,
    *,
    prog: str | None = None,
    description: str = "",
    default_recipe: Callable[[Mapping[str, str]], tuple[str, Mapping[str, Any]]] | None = None,
) -> ConfigT:
    """The configuration that a command line asks for.

    Args:
        config_class: dataclass of the script, for example [`SSLConfig`].
        argv: words after the script's name; those of this process by default.
        prog: name of the script in the help page.
        description: first paragraph of the help page.
        default_recipe: what to do without a recipe: takes the fields of the command line (dotted name -> text) and
            returns a name for messages and the recipe's fields. By default a recipe must be named.

    Raises:
        ArgumentError: the words cannot be parsed: an unknown recipe or field, a value of the wrong type.
        ValueError: a value is refused by the configuration.
        SystemExit: `--help` was printed.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    prog = prog or Path(sys.argv[0]).name
    if "--help" in words or "-h" in words:
        from dinov3_hf.training.help_page import print_help

        print_help(config_class, prog, description, aliases=ALIASES, needs_recipe=default_recipe is None)
        raise SystemExit(0)
    recipe, overrides = split_words(words)
    if recipe is not None:
        fields: Mapping[str, Any] = read_recipe(recipe)
    elif default_recipe is not None:
        recipe, fields = default_recipe({".".join(override.path): override.text for override in overrides})
    else:
        raise ArgumentError(f"{prog} needs a recipe; give a YAML file, or one of {', '.join(recipe_names())}.")
    return config_class(**merge_fields(config_class, recipe, fields, overrides))


def split_words(words: Sequence[str]) -> tuple[str | None, list[Override]]:
    """The recipe and the overrides of a command line."""
    recipe, overrides = None, []
    remaining = iter(words)
    for word in remaining:
        if word.startswith("--"):
            name, has_value, text = word[2:].partition("=")
            if not has_value:
                text = _next_value(word, remaining)
            first, *inner = name.split(".")
            overrides.append(Override([ALIASES.get(first, first), *inner], text))
        elif recipe is None:
            recipe = word
        else:
            raise ArgumentError(f"{word!r} follows the recipe {recipe!r} without a field; write --FIELD {word}.")
    return recipe, overrides


def _next_value(word: str, remaining: Iterator[str]) -> str:
    value = next(remaining, None)
    if value is None or value.startswith("--"):
        raise ArgumentError(f"{word} has no value; write {word} VALUE (true or false for a switch).")
    return value


def merge_fields(
    config_class: type[RecipeConfig], recipe: str, recipe_fields: Mapping[str, Any], overrides: Sequence[Override]
) -> dict[str, Any]:
    """Keyword arguments of `config_class`: the recipe's fields, changed by the overrides, each of the right type."""
    annotations = get_type_hints(config_class)
    fields = {field.name: field for field in dataclasses.fields(config_class) if field.init}
    merged: dict[str, Any] = {}
    for name, value in recipe_fields.items():
        if name not in fields:
            remedy = did_you_mean(name, fields, _SEE_HELP)
            raise ArgumentError(f"recipe {recipe} has a field {name!r}, which does not exist; {remedy}")
        _refuse_unused(config_class, name)
        merged[name] = _fit(f"{name} in recipe {recipe}", value, annotations[name])
    for override in overrides:
        name, *inner = override.path
        if name not in fields:
            raise ArgumentError(f"{override.option} is no field; {did_you_mean(name, fields, _SEE_HELP)}")
        _refuse_unused(config_class, name)
        if inner:
            base = merged[name] if name in merged else _default(fields[name])
            if name == config_class.BLOCKS and len(inner) > 1:
                base = _with_own_field(override, base, merged, fields)
            merged[name] = _with_entry(override, base, inner)
        else:
            merged[name] = _fit_override(override, annotations[name])
    return merged


def _refuse_unused(config_class: type[RecipeConfig], name: str) -> None:
    # Here at any value: the configuration itself cannot tell a default that was given from one that was not.
    if name in config_class.UNUSED_FIELDS:
        raise ArgumentError(f"{name} is not read by this trainer; {config_class.UNUSED_FIELDS[name]}.")


def _fit_override(override: Override, annotation: Any) -> Any:
    try:
        value = override.value
    except ArgumentError:
        if annotation is not str and not (_is_union(annotation) and str in get_args(annotation)):
            raise
        value = override.text  # `*.parquet` is no YAML, and need not be where text is meant
    return _fit(override.option, value, annotation, override.text)


def _fit(name: str, value: Any, annotation: Any, text: str | None = None) -> Any:
    try:
        return fit_to_annotation(value, annotation, text)
    except TypeError:
        raise ArgumentError(
            f"{name} is {value if text is None else text!r}; expected {describe(annotation)}."
        ) from None


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _with_entry(override: Override, base: Any, inner: list[str]) -> Any:
    """A copy of the mapping `base` with the entry that a dotted override names."""
    if isinstance(base, Schedule):
        base = base.to_plain()
    if isinstance(base, int | float) and not isinstance(base, bool) and _is_schedule_entry(inner):
        base = {"peak": base}  # a constant schedule that is about to become one with a shape
    if base is None:
        base = {}
    if not isinstance(base, dict):
        raise ArgumentError(f"{override.option} reaches into {override.path[0]}, which is {base!r} and no mapping.")
    key, *deeper = inner
    changed = copy.deepcopy(base)
    changed[key] = _with_entry(override, base.get(key), deeper) if deeper else override.value
    return changed


def _with_own_field(
    override: Override, blocks: Any, merged: Mapping[str, Any], fields: Mapping[str, dataclasses.Field[Any]]
) -> Any:
    """Blocks in which a field that an override reaches into begins as it is outside of the blocks."""
    _, block, name, *deeper = override.path
    if not isinstance(blocks, dict):
        return blocks
    if block not in blocks:
        raise ArgumentError(
            f"{override.option}: there is no {block!r} in {override.path[0]}; {did_you_mean(block, blocks)}"
        )
    own = blocks[block] or {}
    if deeper and name in fields and name not in own:
        own = {**own, name: merged[name] if name in merged else _default(fields[name])}
    return {**blocks, block: own}


def _is_schedule_entry(inner: list[str]) -> bool:
    return len(inner) == 1 and inner[0] in {field.name for field in dataclasses.fields(Schedule)}


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (types.UnionType, Union)
