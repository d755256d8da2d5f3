"""Recipes as YAML pages: those that are part of the package, and files of the user's own."""

from importlib.resources import files
from pathlib import Path
from typing import Any

from dinov3_hf.errors import ArgumentError, did_you_mean
from dinov3_hf.yaml_text import read_yaml_mapping


def recipe_names() -> list[str]:
    """Names of the recipes of the package, in alphabetical order."""
    return sorted(
        page.name.removesuffix(".yaml") for page in files("dinov3_hf.recipes").iterdir() if page.name.endswith(".yaml")
    )


def recipe_summaries() -> dict[str, str]:
    """Name of each recipe of the package -> the first line of its page, which says what it is."""
    pages = {name: files("dinov3_hf.recipes") / f"{name}.yaml" for name in recipe_names()}
    return {
        name: page.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ") for name, page in pages.items()
    }


def read_recipe(recipe: str) -> dict[str, Any]:
    """The fields of a recipe.

    Args:
        recipe: the name of a recipe of the package (`vitl16_im1k`), or the path of a YAML file.

    Raises:
        ArgumentError: there is no such recipe, or it is not a YAML mapping.
    """
    names = recipe_names()
    if recipe in names:
        page = files("dinov3_hf.recipes") / f"{recipe}.yaml"
    elif Path(recipe).suffix in (".yaml", ".yml") or Path(recipe).is_file():
        page = Path(recipe)
    else:
        raise ArgumentError(f"there is no recipe {recipe!r}; {did_you_mean(recipe, names)}")
    return read_yaml_mapping(
        page,
        f"recipe {recipe}",
        otherwise=f"give a YAML file, or one of {', '.join(names)}",
        form="write one `field: value` on each line",
    )
