"""YAML pages: what scalars mean, what is refused, and the recipes of the package."""

import pytest

from dinov3_hf.errors import ArgumentError
from dinov3_hf.recipes.pages import read_recipe, recipe_names, recipe_summaries
from dinov3_hf.training.arguments import parse_arguments
from dinov3_hf.training.continued_config import ContinuedConfig
from dinov3_hf.training.distillation_config import DistillationConfig
from dinov3_hf.training.ssl_config import SSLConfig
from dinov3_hf.yaml_text import dump_yaml, parse_yaml
from tests.recipes.distilled import DISTILLED, parse_distilled
from tests.testing_utils import save_tiny_vit


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E3", 1000.0),
        (".5", 0.5),
        ("-.5e-2", -0.005),
        ("1.", 1.0),
        ("10", 10),
        ("010", 10),
        ("-3", -3),
        (".inf", float("inf")),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("no", "no"),
        ("off", "off"),
        ("n", "n"),
        ("1:30", "1:30"),
        ("2026-01-31", "2026-01-31"),
        ("1e-4x", "1e-4x"),
        ("runs/a", "runs/a"),
        ("'1e-4'", "1e-4"),
        ("[0.1, 5e-1]", [0.1, 0.5]),
        ("{a: 1, b: {c: no}}", {"a": 1, "b": {"c": "no"}}),
    ],
)
def test_scalars(text, value):
    parsed = parse_yaml(text, "a test")
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    "value",
    [
        {"b": 1e-5, "a": "1e-5", "c": "no", "d": "null", "e": None, "f": "true", "g": True, "h": [0.5, "0.5"]},
        {"nested": {"x": [], "y": {}}, "path": "a: b # c", "text": "é\nü", "empty": ""},
        {"big": 1e300, "small": 1e-300, "third": 1 / 3, "whole": 2.0, "count": 10**12},
    ],
)
def test_dumped_values_read_back(value):
    assert parse_yaml(dump_yaml(value, inline=True), "a test") == value
    read = parse_yaml(dump_yaml(value), "a test")
    assert read == value
    assert list(read) == list(value)
    assert [type(entry) for entry in read.values()] == [type(entry) for entry in value.values()]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (True, "true"),
        ("1e-4", "'1e-4'"),
        ("sdpa", "sdpa"),
        ({"preset": "vits16"}, "{preset: vits16}"),
        ([0.1, 0.5], "[0.1, 0.5]"),
        (["word"] * 50, f"[{', '.join(['word'] * 50)}]"),
    ],
)
def test_inline_values_stand_on_one_line(value, text):
    assert dump_yaml(value, inline=True) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2", r"the page line 2 is not valid YAML: the key a stands twice"),
        ("a: {b: 1, b: 2}", r"the key b stands twice"),
        ("a: [1, 2", r"the page line 1 is not valid YAML"),
        ("a: b: c", r"the page line 1 is not valid YAML"),
        ("a: !!python/object/apply:os.getcwd []", r"the page line 1 is not valid YAML"),
        ("? [a]\n: 1", r"not valid YAML"),
        ("a: \x00", r"not valid YAML"),
    ],
)
def test_bad_yaml_gets_one_line(text, message):
    with pytest.raises(ArgumentError, match=message) as error:
        parse_yaml(text, "the page")
    assert "\n" not in str(error.value)


def test_bad_recipes_get_one_line(tmp_path):
    with pytest.raises(
        ArgumentError, match=r"there is no recipe 'quickstart_digit'; did you mean quickstart_digits\?"
    ):
        read_recipe("quickstart_digit")
    with pytest.raises(ArgumentError, match=r"there is no recipe 'zzz'; use one of continue_pretraining, "):
        read_recipe("zzz")
    with pytest.raises(ArgumentError, match=r"cannot be read \(No such file or directory\); give a YAML file"):
        read_recipe(str(tmp_path / "none.yaml"))
    (tmp_path / "list.yaml").write_text("- a\n- b\n")
    with pytest.raises(ArgumentError, match=r"list.yaml is not a mapping; write one `field: value` on each line"):
        read_recipe(str(tmp_path / "list.yaml"))
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(ArgumentError, match=r"empty.yaml is not a mapping"):
        read_recipe(str(tmp_path / "empty.yaml"))
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ArgumentError, match=r"cannot be read \(it is not UTF-8 text\)"):
        read_recipe(str(tmp_path / "bytes.yaml"))


def test_a_file_without_a_yaml_suffix_is_a_recipe_too(tmp_path):
    (tmp_path / "mine").write_text("seed: 3\n")
    assert read_recipe(str(tmp_path / "mine")) == {"seed": 3}


def test_every_recipe_says_what_it_is_in_its_first_line():
    summaries = recipe_summaries()
    assert list(summaries) == recipe_names()
    assert all(summary.endswith(".") and not summary.startswith("#") for summary in summaries.values())


def test_continued_pretraining_parses(tmp_path):
    save_tiny_vit(tmp_path / "model")
    words = ["continue_pretraining", "--model", str(tmp_path / "model")]
    config = parse_arguments(ContinuedConfig, words)
    assert (config.global_crop_size, config.local_crop_size, config.ibot_weight) == (224, 96, 1.0)
    config.save_yaml(tmp_path / "again.yaml")
    assert parse_arguments(ContinuedConfig, [str(tmp_path / "again.yaml")]) == config


@pytest.mark.parametrize("name", DISTILLED)
def test_distillation_parses(name, tmp_path):
    config = parse_distilled(name, tmp_path / "teacher", "--output_dir", str(tmp_path))
    assert config.objective == "prototypes"
    for student in config.student_args.values():
        backbone = student.pretraining_config().backbone_config
        assert backbone.model_type in ("dinov3_vit", "dinov3_convnext")  # opens in stock transformers
        assert (
            max(student.schedules().at(step)["lr"] for step in (0, config.max_steps // 10, config.max_steps - 1)) > 0
        )
    config.save_yaml(tmp_path / "again.yaml")
    assert parse_arguments(DistillationConfig, [str(tmp_path / "again.yaml")]) == config


@pytest.mark.parametrize("name", sorted({*recipe_names()} - {"continue_pretraining", *DISTILLED}))
def test_every_recipe_parses(name, tmp_path):
    config = parse_arguments(SSLConfig, [name, "--output_dir", str(tmp_path)])
    backbone = config.pretraining_config().backbone_config
    assert backbone.hidden_size == config.model_width()
    assert backbone.model_type == "dinov3_vit"  # the trained folder opens in stock transformers
    assert config.schedules().at(config.max_steps - 1)["lr"] > 0
    config.save_yaml(tmp_path / "again.yaml")
    assert parse_arguments(SSLConfig, [str(tmp_path / "again.yaml")]) == config
