"""The `--help` page of the training scripts."""

import dataclasses
import inspect
from collections.abc import Mapping
from enum import Enum
from typing import Any, get_type_hints

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import TrainingArguments

from dinov3_hf.field_types import describe
from dinov3_hf.recipes.pages import recipe_summaries
from dinov3_hf.training.recipe_config import CHANGES_THE_RESULT, EFFICIENCY, ORCHESTRATION, RecipeConfig
from dinov3_hf.training.schedules import Schedule
from dinov3_hf.yaml_text import dump_yaml

_TITLES = {
    CHANGES_THE_RESULT: "Changes the result",
    ORCHESTRATION: "Orchestration (where and how often to write, log, evaluate)",
    EFFICIENCY: "Efficiency (speed and memory only)",
}


def print_help(
    config_class: type[RecipeConfig], prog: str, description: str, *, aliases: Mapping[str, str], needs_recipe: bool
) -> None:
    """Prints usage, recipes, and the fields of `config_class` in their groups, each with its default."""
    console = Console(highlight=False)
    recipe = "RECIPE" if needs_recipe else r"\[RECIPE]"
    options = {name: f"--{alias}, --{name}" for alias, name in aliases.items()}
    console.print(f"[bold]Usage:[/bold] {prog} {recipe} \\[--field value ...]\n")
    if description:
        console.print(escape(description.strip()) + "\n")
    console.print("[bold]RECIPE[/bold]  the path of a YAML file, or one of")
    recipes = Table(box=None, show_header=False, padding=(0, 1, 0, 1))
    recipes.add_column(no_wrap=True, style="cyan")
    recipes.add_column()
    for name, summary in recipe_summaries().items():
        recipes.add_row(name, escape(summary))
    console.print(recipes)
    console.print(
        "\nValues are YAML: 1e-4, true, null, \\[0.1, 0.5]. A dot reaches into a nested field: "
        "--backbone.preset vitb16, --lr_schedule.peak 1e-4.\n--debug shows the traceback of an error."
    )
    annotations = get_type_hints(config_class)
    groups = fields_by_group(config_class)
    for group, title in _TITLES.items():
        console.print(f"\n[bold]{title}[/bold]")
        table = Table(box=None, show_header=False, padding=(0, 1, 0, 1))
        table.add_column(no_wrap=True, style="cyan")
        table.add_column(style="green", max_width=24)
        table.add_column()
        for field in groups[group]:
            help = escape(str(field.metadata["help"]).replace("%%", "%"))
            table.add_row(
                options.get(field.name, f"--{field.name}"),
                escape(_default_text(field)),
                f"{help} ({_type_text(annotations[field.name])})",
            )
        console.print(table)
    others = sorted(name for name in other_field_names(config_class))
    console.print(f"\n[bold]Also accepted, as in transformers.TrainingArguments:[/bold] {', '.join(others)}.")


def fields_by_group(config_class: type[RecipeConfig]) -> dict[str, list[dataclasses.Field[Any]]]:
    """The documented fields of each group: those of the configuration itself in their order, then inherited ones."""
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    groups: dict[str, list[dataclasses.Field[Any]]] = {group: [] for group in _TITLES}
    own_classes = [cls for cls in config_class.__mro__ if not issubclass(TrainingArguments, cls)]
    own_names = [name for cls in own_classes for name in inspect.get_annotations(cls)]
    for name in dict.fromkeys(own_names):
        if name in fields and "group" in fields[name].metadata and name not in config_class.UNUSED_FIELDS:
            groups[fields[name].metadata["group"]].append(fields[name])
    for group, names in config_class.INHERITED_GROUPS.items():
        groups[group] += [fields[name] for name in names if name not in config_class.UNUSED_FIELDS]
    return groups


def other_field_names(config_class: type[RecipeConfig]) -> set[str]:
    """Inherited fields that work but belong to no group."""
    documented = {field.name for fields in fields_by_group(config_class).values() for field in fields}
    inherited = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    return inherited - documented - set(config_class.UNUSED_FIELDS)


def _default_text(field: dataclasses.Field[Any]) -> str:
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if isinstance(value, Schedule):
        value = value.to_plain()
    if isinstance(value, Enum):
        value = value.value
    return dump_yaml(value, inline=True)


def _type_text(annotation: Any) -> str:
    return "number or mapping" if annotation is Schedule else describe(annotation)
