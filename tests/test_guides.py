"""What the pages of `docs/` show is true: recipes parse, commands are understood, the example in Python runs."""

import re
import shlex

import pytest
import typer

from dinov3_hf.cli.main import build_app
from dinov3_hf.data.sources.recipe import read_data_recipe
from dinov3_hf.training.arguments import merge_fields, parse_arguments
from dinov3_hf.training.distillation_config import DistillationConfig
from dinov3_hf.training.ssl_config import SSLConfig
from dinov3_hf.yaml_text import parse_yaml
from tests.recipes.distilled import teacher_of
from tests.testing_utils import REPOSITORY, require_package

PAGES = {page.name: page.read_text() for page in sorted((REPOSITORY / "docs").rglob("*.md"))}


def blocks(language: str) -> list[str]:
    return [block for text in PAGES.values() for block in re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)]


def commands(program: str) -> list[str]:
    """What follows `program` in the commands of all pages."""
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    return [line.partition(f"{program} ")[2] for line in lines if f"{program} " in line]


DATA_RECIPES = [block for block in blocks("yaml") if block.startswith("sources:")]
DISTILLATIONS = [block for block in blocks("yaml") if "students:" in block]
RECIPES = [block for block in blocks("yaml") if block not in [*DATA_RECIPES, *DISTILLATIONS]]


@pytest.mark.parametrize("recipe", DATA_RECIPES)
def test_data_recipes_parse(recipe, tmp_path):
    (tmp_path / "data.yaml").write_text(recipe)
    assert read_data_recipe(tmp_path / "data.yaml").sources


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_and_their_fragments_parse(recipe):
    fields = parse_yaml(recipe, "a page")
    SSLConfig(**merge_fields(SSLConfig, "of a page", fields, []))


def test_training_commands_are_understood(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_photos.yaml").write_text(RECIPES[0])
    for words in map(shlex.split, commands("training_scripts/pretrain.py")):
        if not {"RECIPE", "--help"} & set(words):
            parse_arguments(SSLConfig, words)


@pytest.mark.parametrize("recipe", DISTILLATIONS)
def test_distillations_parse(recipe, tmp_path):
    teacher = {"teacher": str(teacher_of("distill_family", tmp_path))}
    DistillationConfig(**merge_fields(DistillationConfig, "of a page", parse_yaml(recipe, "a page"), []), **teacher)


def test_distillation_commands_are_understood(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_students.yaml").write_text(
        PAGES["training.md"].partition("`my_students.yaml`:\n\n```yaml\n")[2].partition("```")[0]
    )
    recipes = set()
    for words in map(shlex.split, commands("training_scripts/distill.py")):
        if not {"RECIPE", "--help"} & set(words):
            recipes.add(words[0])
            named = words.index("--teacher") + 1
            words[named] = str(teacher_of(words[0], tmp_path / "of" / words[0]))
            if "auto" in words:  # one rank is not enough
                words[words.index("auto")] = "null"
            parse_arguments(DistillationConfig, words)
    assert {"distill_small_cpu", "distill_family", "my_students.yaml"} <= recipes


def test_every_recipe_is_described():
    described = set(re.findall(r"^\| `(\w+)` \|", PAGES["recipes.md"].partition("\n## ")[0], re.MULTILINE))
    assert described == {page.stem for page in (REPOSITORY / "src" / "dinov3_hf" / "recipes").glob("*.yaml")}


def parse(command, words: list[str], parent=None) -> None:
    """Reads a command line as `dinov3-hf` does, down to the last option, and runs nothing."""
    context = command.make_context(command.name, words, parent=parent)
    if isinstance(command, typer.core.TyperGroup):
        _, inner, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        parse(inner, rest, context)


@pytest.mark.parametrize("line", commands("dinov3-hf"))
def test_commands_are_understood(line):
    words = shlex.split(line)
    app = typer.main.get_command(build_app(words[0]))
    if "--help" in words:
        with pytest.raises(typer.Exit):
            parse(app, words)
    else:
        parse(app, words)


@require_package("sklearn")
def test_the_example_in_python_runs(tmp_path, monkeypatch):
    [example] = [block for block in blocks("python") if "SSLTrainer" in block]
    monkeypatch.chdir(tmp_path)
    exec(example, {})
    assert (tmp_path / "runs" / "python" / "checkpoint-4" / "teacher" / "model.safetensors").is_file()
