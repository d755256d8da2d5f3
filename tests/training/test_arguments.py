"""The grammar `RECIPE [--field value ...]`."""

from enum import Enum
from typing import Any, Literal

import pytest

from dinov3_hf.cli.errors import run
from dinov3_hf.errors import ArgumentError
from dinov3_hf.field_types import describe, fit_to_annotation
from dinov3_hf.recipes.pages import recipe_summaries
from dinov3_hf.training.arguments import parse_arguments
from dinov3_hf.training.schedules import Schedule
from dinov3_hf.training.ssl_config import SSLConfig

RECIPE = """
backbone: {patch_size: 4, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2}
global_crop_size: 16
local_crop_size: 8
global_batch_size: 8
max_steps: 10
lr_schedule: {start: 0, peak: 1e-3, end: 1e-6, warmup_steps: 2}
weight_decay_schedule: 0.04
save_strategy: no
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE + f"output_dir: {tmp_path}\n")
    return str(path)


def parse(*words: str) -> SSLConfig:
    return parse_arguments(SSLConfig, words, prog="pretrain.py")


def test_a_recipe_alone(recipe):
    config = parse(recipe)
    assert config.lr_schedule == Schedule(0.0, 1e-3, 1e-6, warmup_steps=2)
    assert config.save_strategy == "no"


def test_overrides(recipe):
    config = parse(
        *("--max_steps", "1e2", recipe),  # the recipe may stand anywhere
        "--seed=7",
        "--mask_ratio",
        "[0.2, 0.3]",
        "--horizontal_flip=false",
        "--koleo_group_size",
        "null",
        "--backbone.drop_path_rate",
        "0.1",
        "--lr_schedule.peak",
        "1e-4",
        "--weight_decay_schedule.end=0.4",
        "--teacher_momentum_schedule",
        "{peak: 0.99, end: 1}",
        "--dino_head.num_prototypes",
        "16",
        "--run_name",
        "1e-4",
        "--report_to",
        "none",
        "--train_data",
        "--no-such=odd".removeprefix("--no-such="),
    )
    assert config.max_steps == 100
    assert isinstance(config.max_steps, int)
    assert config.seed == 7
    assert config.mask_ratio == [0.2, 0.3]
    assert config.horizontal_flip is False
    assert config.backbone["drop_path_rate"] == 0.1
    assert config.backbone["hidden_size"] == 16
    assert config.lr_schedule == Schedule(0.0, 1e-4, 1e-6, warmup_steps=2)
    assert config.weight_decay_schedule == Schedule(0.04, 0.04, 0.4)
    assert config.teacher_momentum_schedule == Schedule(0.99, 0.99, 1.0)
    assert config.dino_head["num_prototypes"] == 16
    assert config.run_name == "1e-4"
    assert config.report_to == []
    assert config.train_data == "odd"


@pytest.mark.parametrize("text", ["*.parquet", "**/*.tar", "{a,b}/*.tar", "{0..3}.tar", "[ab].tar", "@x", "a: b: c"])
def test_text_need_not_be_yaml(recipe, text):
    assert parse(recipe, "--train_data", text).train_data == text


def test_a_dotted_override_starts_from_the_default(recipe):
    config = parse(recipe, "--teacher_temperature_schedule.peak", "0.08", "--ibot_head.hidden_dim", "32")
    assert config.teacher_temperature_schedule == Schedule(0.04, 0.08, 0.07, warmup_steps=0.3)
    assert config.ibot_head["hidden_dim"] == 32
    assert (
        SSLConfig(output_dir=config.output_dir).teacher_temperature_schedule.peak == 0.07
    )  # the default is untouched


def test_learning_rate_is_a_shorthand(recipe):
    assert parse(recipe, "--learning_rate", "3e-5").lr_schedule.peak == 3e-5


def test_a_later_override_wins(recipe):
    assert parse(recipe, "--seed", "1", "--seed", "2").seed == 2
    assert parse(recipe, "--lr_schedule.peak", "1", "--lr_schedule", "0.5").lr_schedule == Schedule.constant(0.5)


def test_negative_numbers_are_values(recipe):
    with pytest.raises(ValueError, match=r"max_steps -1 is not positive"):
        parse(recipe, "--max_steps", "-1")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--koleo_weights", "1"], r"--koleo_weights is no field; did you mean koleo_weight\?"),
        (["--zzzz", "1"], r"--zzzz is no field; --help lists the fields"),
        (["--max_steps", "ten"], r"--max_steps is 'ten'; expected an integer"),
        (["--max_steps", "1.5"], r"--max_steps is '1.5'; expected an integer"),
        (["--koleo_weight", "true"], r"--koleo_weight is 'true'; expected a number"),
        (["--horizontal_flip", "1"], r"--horizontal_flip is '1'; expected true or false"),
        (["--mask_ratio", "0.1"], r"--mask_ratio is '0.1'; expected a list of numbers"),
        (["--mask_ratio", "[0.1, x]"], r"--mask_ratio is '\[0.1, x\]'; expected a list of numbers"),
        (["--mask_ratio", "[0.1,"], r"--mask_ratio line 1 is not valid YAML"),
        (["--precision", "fp16"], r"--precision is 'fp16'; expected one of auto, bf16, fp32"),
        (["--save_strategy", "sometimes"], r"--save_strategy is 'sometimes'; expected one of no, steps, epoch, best"),
        (["--backbone", "vitb16"], r"--backbone is 'vitb16'; expected a mapping"),
        (["--lr_schedule.peek", "1"], r"lr_schedule has no entry 'peek'; did you mean peak\?"),
        (["--lr_schedule.peak", "big"], r"lr_schedule.peak is 'big'; expected a number"),
        (["--seed.x", "1"], r"--seed.x reaches into seed, which is 42 and no mapping"),
        (["--backbone.preset", "vitx"], r"backbone.preset 'vitx' is unknown"),
        (["--seed"], r"--seed has no value; write --seed VALUE"),
        (["--horizontal_flip", "--seed", "1"], r"--horizontal_flip has no value; .* \(true or false for a switch\)"),
        (["other.yaml"], r"'other.yaml' follows the recipe .* without a field; write --FIELD other.yaml"),
        (["--num_train_epochs", "3"], r"num_train_epochs is not read by this trainer; .* set max_steps"),
        (["--warmup_steps", "0"], r"warmup_steps is not read .* lr_schedule.warmup_steps"),
    ],
)
def test_what_cannot_be_parsed_gets_one_line(recipe, words, message):
    with pytest.raises(ArgumentError, match=message) as error:
        parse(recipe, *words)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("koleo_weights: 1", r"recipe .*tiny.yaml has a field 'koleo_weights', which does not exist; did you mean"),
        ("seed: ten", r"seed in recipe .*tiny.yaml is 'ten'; expected an integer"),
        ("train_data: 2024", r"train_data in recipe .*tiny.yaml is 2024; expected text or null"),
        ("num_train_epochs: 3.0", r"num_train_epochs is not read by this trainer"),
        ("seed: 1\nseed: 2", r"is not valid YAML: the key seed stands twice"),
    ],
)
def test_recipe_files_are_checked_in_the_same_way(recipe, tmp_path, line, message):
    (tmp_path / "tiny.yaml").write_text(f"{RECIPE}{line}\n")
    with pytest.raises(ArgumentError, match=message):
        parse(recipe)


def test_no_recipe():
    with pytest.raises(
        ArgumentError, match=r"pretrain.py needs a recipe; give a YAML file, or one of continue_pretraining"
    ):
        parse()


class Colour(Enum):
    RED = "red"
    NO = "no"


@pytest.mark.parametrize(
    ("value", "text", "annotation", "expected"),
    [
        (1, None, float, 1),
        (1e6, None, int, 1_000_000),
        (None, "null", int | None, None),
        ("x", "x", str | None, "x"),
        (5, "5", str, "5"),
        (0.1, "0.1", float | str, 0.1),
        ("no", "no", Colour | str, "no"),
        ("b", "b", Literal["a", "b"], "b"),
        ([1, 2.5], None, list[float], [1, 2.5]),
        ({"a": 1}, None, dict[str, Any] | None, {"a": 1}),
        ("anything", None, Any, "anything"),
    ],
)
def test_values_that_fit(value, text, annotation, expected):
    fitted = fit_to_annotation(value, annotation, text)
    assert fitted == expected
    assert type(fitted) is type(expected)


@pytest.mark.parametrize(
    ("value", "annotation", "words"),
    [
        ("3", int, "an integer"),
        (1.5, int | None, "an integer or null"),
        (True, float, "a number"),
        (1, bool, "true or false"),
        (3, str, "text"),
        ("blue", Colour | str, "one of red, no"),
        ("c", Literal["a", "b"], "one of a, b"),
        (["a"], list[float], "a list of numbers"),
        ([3], list[dict[str, Any]] | None, "a list of mappings or null"),
        ("a", dict[str, Any], "a mapping"),
        (float("inf"), int, "an integer"),
    ],
)
def test_values_that_do_not_fit(value, annotation, words):
    with pytest.raises(TypeError):
        fit_to_annotation(value, annotation)
    assert describe(annotation) == words


def test_help_shows_the_groups_and_every_field(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    with pytest.raises(SystemExit) as exit:
        parse("--help")
    assert exit.value.code == 0
    page = capsys.readouterr().out
    titles = [page.index(title) for title in ("Changes the result", "Orchestration", "Efficiency", "Also accepted")]
    assert titles == sorted(titles)
    for name, position in {
        "koleo_weight": 0,
        "eval_data": 1,
        "save_steps": 1,
        "precision": 2,
        "torch_compile": 2,
    }.items():
        assert titles[position] < page.index(f"--{name} ") < titles[position + 1]
    assert all(f"{name} " in page and summary in page for name, summary in recipe_summaries().items())
    assert "num_train_epochs" not in page


@pytest.mark.parametrize(
    ("words", "status", "line"),
    [
        (["--koleo_weights", "1"], 2, "error: --koleo_weights is no field; did you mean koleo_weight?"),
        (
            ["--global_crop_size", "18"],
            1,
            "error: global_crop_size 18 is not a multiple of patch_size 4; use 16 or 20.",
        ),
    ],
)
def test_a_program_ends_with_one_line_and_a_status(recipe, capsys, words, status, line):
    with pytest.raises(SystemExit) as exit:
        run(lambda argv: parse_arguments(SSLConfig, argv), [recipe, *words])
    assert exit.value.code == status
    assert capsys.readouterr().err.splitlines() == [line]
