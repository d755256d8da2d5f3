"""The stages as changes to a run's recipe."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dinov3_hf.errors import ArgumentError
from dinov3_hf.recipes.pages import read_recipe
from dinov3_hf.training.arguments import parse_arguments
from dinov3_hf.training.ssl_config import SSLConfig
from dinov3_hf.training.stages import from_run, gram_anchoring, high_resolution
from dinov3_hf.yaml_text import dump_yaml


def fields_and_schedules(recipe: dict[str, Any]) -> tuple[dict[str, Any], np.ndarray]:
    """What changes the result: fields, durations in steps, and the values of the schedules, float64 (steps, names)."""
    args = SSLConfig(**{**recipe, "use_cpu": True, "report_to": "none"})
    fields = args.result_fields(args.recipe())
    for name in [name for name in fields if name.endswith("_schedule") or name == "start_from"]:
        del fields[name]
    for name in ("gram_refresh_steps", "gram_first_refresh_step"):
        duration = fields[name]
        fields[name] = duration * args.max_steps if duration and duration < 1 else duration
    values = [list(args.schedules().at(step).values()) for step in range(0, args.max_steps, 10)]
    return fields, np.array(values)


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    (fields, values), (their_fields, their_values) = map(fields_and_schedules, (ours, theirs))
    assert fields == their_fields
    np.testing.assert_allclose(values, their_values, rtol=1e-9)


@pytest.mark.parametrize(("size", "first"), [("vit7b16", "vit7b16_pretrain"), ("vitl16", "vitl16_im1k")])
def test_the_pages_of_the_stages_are_the_changes_of_the_page_of_stage_1(size, first, tmp_path, monkeypatch):
    """For the 7B model these are the published numbers."""
    monkeypatch.chdir(tmp_path)
    Path("runs/a/checkpoint-5").mkdir(parents=True)
    stage_2 = gram_anchoring(read_recipe(first), "runs/a/checkpoint-5")
    assert (stage_2["output_dir"], stage_2["start_from"]) == ("runs/a-gram", "runs/a/checkpoint-5")
    assert_same(stage_2, read_recipe(f"{size}_gram_anchor"))
    stage_3 = high_resolution(stage_2, "runs/a-gram/teacher")
    assert (stage_3["output_dir"], stage_3["start_from"]) == ("runs/a-gram-highres", "runs/a-gram/teacher")
    assert_same(stage_3, read_recipe(f"{size}_high_res"))
    # Straight from stage 1: as long, and at the same rate.
    straight = high_resolution(read_recipe(first), "runs/a")
    assert_same(straight, read_recipe(f"{size}_high_res"))
    again = high_resolution(stage_3, "runs/b")
    assert again["lr_schedule"]["end"] == pytest.approx(stage_3["lr_schedule"]["end"] * 5 / 12, rel=1e-4)


def test_a_small_run_keeps_its_batch_and_whole_patches():
    stage = high_resolution(read_recipe("quickstart_digits"), "runs/a")
    assert stage["global_batch_size"] == 64  # one KoLeo group
    assert [tuple(sizes.values()) for sizes in stage["crop_sizes"]] == [
        (32, 8, 48, 0.3),
        (48, 8, 72, 0.3),
        (48, 12, 72, 0.3),
        (48, 16, 72, 0.05),
        (48, 24, 72, 0.05),
    ]
    gram = gram_anchoring({**read_recipe("quickstart_digits"), "run_name": "a", "hub_model_id": "me/a"}, "runs/a")
    assert "run_name" not in gram and "hub_model_id" not in gram
    args = SSLConfig(**{**gram, "use_cpu": True, "max_steps": 3})  # shares of any length
    assert args.gram_crop_size == 32


def test_the_recipe_comes_from_the_run(tmp_path):
    run = tmp_path / "a"
    for step in (9, 10):
        (run / f"checkpoint-{step}" / "teacher").mkdir(parents=True)
        page = {**read_recipe("quickstart_digits"), "max_steps": 100 * step}
        (run / f"checkpoint-{step}" / "recipe.yaml").write_text(dump_yaml(page))
    for source, max_steps in (
        (run, 200),
        (run / "teacher", 200),
        (run / "checkpoint-9", 180),
        (run / "checkpoint-9" / "teacher", 180),
    ):
        words = ["--from", str(source), "--use_cpu", "true", "--koleo_group_size", "32"]
        (tmp_path / "a" / "teacher").mkdir(exist_ok=True)
        args = parse_arguments(SSLConfig, words, default_recipe=from_run(gram_anchoring))
        assert (args.max_steps, args.koleo_group_size, args.output_dir) == (max_steps, 32, str(tmp_path / "a-gram"))


def test_runs_without_a_recipe_are_refused(tmp_path):
    default_recipe = from_run(gram_anchoring)
    for words, error, says in (
        ([], ArgumentError, "there is nothing to start from; name an earlier run, for example --from runs/a"),
        (["--from", str(tmp_path / "b")], FileNotFoundError, "b: there is no such folder"),
        (["--from", str(tmp_path)], FileNotFoundError, "has no checkpoint-N with the recipe.yaml of a run"),
    ):
        with pytest.raises(error, match=re.escape(says)):
            parse_arguments(SSLConfig, words, default_recipe=default_recipe)
    (tmp_path / "recipe.yaml").write_text(json.dumps({"no_such_field": 1}))
    with pytest.raises(ArgumentError, match=r"recipe of the run .*recipe\.yaml. has a field 'no_such_field'"):
        parse_arguments(SSLConfig, ["--from", str(Path(tmp_path))], default_recipe=default_recipe)
