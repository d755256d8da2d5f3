"""Plans of ablations and the statistics of their scores."""

import json
import math
from pathlib import Path

import pytest
from scipy import stats

from dinov3_hf.errors import ArgumentError
from dinov3_hf.training.ablation import (
    Scores,
    estimate,
    json_table,
    keep_scores,
    kept_scores,
    markdown_table,
    read_plan,
    rows_of,
)
from tests.testing_utils import REPOSITORY

PLAN = """
recipe: quickstart_digits
output_dir: runs/ablation
seeds: [0, 1, 2]
base: {backbone.num_register_tokens: 4, max_steps: 40}
variants:
  no_koleo: {koleo_weight: 0}
  no_registers: {backbone.num_register_tokens: 0}
"""


def write(folder: Path, text: str = PLAN) -> str:
    path = folder / "plan.yaml"
    path.write_text(text)
    return str(path)


def test_estimate_is_student_s_interval():
    values = [61.2, 64.9, 60.3, 66.0]
    found = estimate(values)
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.mean - found.half_width, found.mean + found.half_width) == pytest.approx((low, high))


def test_difference_to_full_is_paired(tmp_path):
    plan = read_plan(write(tmp_path), {})
    full, off = {0: 60.0, 1: 70.0, 2: 65.0}, {0: 58.5, 1: 69.5, 2: 63.0}
    scores = {
        "full": {seed: Scores(40.0, value) for seed, value in full.items()},
        "no_koleo": {seed: Scores(40.0, value) for seed, value in off.items()},
    }
    rows = rows_of(plan, scores)
    assert [row.variant for row in rows] == ["full", "no_koleo"]  # nothing is known of no_registers
    low, high = stats.ttest_rel(list(off.values()), list(full.values())).confidence_interval(0.95)
    difference = rows[1].difference
    assert (difference.mean - difference.half_width, difference.mean + difference.half_width) == pytest.approx(
        (low, high)
    )
    assert rows[0].difference is None
    # a seed that only one of them has finished says nothing about the difference
    del scores["full"][2], scores["no_koleo"][0]
    assert rows_of(plan, scores)[1].difference.mean == pytest.approx(-0.5)


def test_one_seed_has_no_interval(tmp_path):
    assert math.isnan(estimate([3.0]).half_width)
    with pytest.raises(ValueError, match="no values"):
        estimate([])
    plan = read_plan(write(tmp_path), {"seeds": "[7]"})
    rows = rows_of(plan, {"full": {7: Scores(40.0, 60.0)}, "no_koleo": {7: Scores(40.0, 61.5)}})
    assert markdown_table(rows).splitlines()[2:] == [
        "| full |  | 1 | 40.0 | 60.0 |  |",
        "| no_koleo | `koleo_weight: 0` | 1 | 40.0 | 61.5 | +1.5 |",
    ]
    table = json.loads(json.dumps(json_table(plan, rows), allow_nan=False))
    assert table["settings"][1]["difference_to_full"] == {"mean": 1.5, "half_width": None}
    assert table["settings"][1]["runs"] == [{"seed": 7, "untrained": 40.0, "trained": 61.5}]


def test_runs_of_a_plan(tmp_path):
    plan = read_plan(write(tmp_path), {"max_steps": "80", "output_dir": "elsewhere", "seeds": "[3, 4]"})
    runs = plan.runs()
    assert [(run.variant, run.seed) for run in runs] == [
        *(("full", 3), ("no_koleo", 3), ("no_registers", 3)),
        *(("full", 4), ("no_koleo", 4), ("no_registers", 4)),
    ]
    last = runs[-1]
    assert last.folder == Path("elsewhere/no_registers/seed-4")
    assert last.words[0] == "quickstart_digits"
    options = dict(zip(last.words[1::2], last.words[2::2], strict=True))
    # a variant wins over the command line, which wins over the base
    assert options["--backbone.num_register_tokens"] == "0"
    assert options["--max_steps"] == "80"
    assert options["--seed"] == "4"
    assert options["--eval_on_start"] == "true"
    assert options["--output_dir"] == "elsewhere/no_registers/seed-4"


def test_the_plan_of_the_digits_takes_off_every_part():
    plan = read_plan(str(REPOSITORY / "training_scripts" / "ablations" / "digits.yaml"), {})
    assert len(plan.runs()) == 24
    assert list(plan.variants) == [
        *("full", "no_koleo", "no_ibot", "no_sinkhorn", "no_registers", "no_rope_augmentation", "no_drop_path"),
        "no_multi_crop",
    ]


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("seeds: [0, 1, 2]", "", "has no entry seeds"),
        ("seeds: [0, 1, 2]", "seeds: many", "seeds is 'many'; expected a list of integers"),
        ("seeds: [0, 1, 2]", "seeds: [1, 1]", "different"),
        ("seeds: [0, 1, 2]", "seeds: []", "one or several"),
        ("variants:", "variant:", "did you mean variants"),
        ("koleo_weight: 0}", "koleo_weights: 0}", "variant no_koleo: --koleo_weights is no field; did you mean"),
        ("no_koleo:", "no/koleo:", "no/koleo"),
        ("no_koleo: {koleo_weight: 0}", "no_koleo: 0", "mapping"),
        ("no_koleo:", "full:", "is the base itself"),
        ("quickstart_digits", "quickstart_digit", "did you mean quickstart_digits"),
        ("variants:", "variants: [", "line"),
    ],
)
def test_plans_that_cannot_be_parsed(tmp_path, old, new, says):
    path = write(tmp_path, PLAN.replace(old, new))
    with pytest.raises(ArgumentError, match=says) as refused:
        read_plan(path, {})
    assert "\n" not in str(refused.value)


def test_plans_that_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"variant full: .*eval_data") as refused:
        read_plan(write(tmp_path), {"eval_data": "null"})
    assert not isinstance(refused.value, ArgumentError)
    with pytest.raises(ValueError, match="variant no_koleo: koleo_group_size 3"):
        read_plan(write(tmp_path, PLAN.replace("koleo_weight: 0", "koleo_group_size: 3")), {})
    with pytest.raises(ArgumentError, match=r"nowhere\.yaml cannot be read"):
        read_plan("nowhere.yaml", {})


def finish(run, log_history) -> None:
    run.folder.mkdir(parents=True)
    state = {"max_steps": 40, "log_history": log_history}
    (run.folder / "trainer_state.json").write_text(json.dumps(state))


def test_finished_runs_are_kept_and_runs_of_another_plan_refused(tmp_path):
    run, other = read_plan(write(tmp_path), {"output_dir": str(tmp_path)}).runs()[:2]
    assert kept_scores(run) is None
    finish(run, [{"step": 0, "eval_knn_top1": 41.0}, {"step": 40, "loss": 3.0}, {"step": 40, "eval_knn_top1": 62.5}])
    assert kept_scores(run) is None  # until it is known to have ended well
    assert keep_scores(run) == Scores(41.0, 62.5)
    assert kept_scores(run) == Scores(41.0, 62.5)

    longer = read_plan(write(tmp_path), {"output_dir": str(tmp_path), "max_steps": "50"}).runs()[0]
    with pytest.raises(ValueError, match="max_steps 40, and now it is 50; delete it, or give another output_dir"):
        kept_scores(longer)

    finish(other, [{"step": 0, "eval_knn_top1": 41.0}])
    with pytest.raises(ValueError, match="not evaluated"):
        keep_scores(other)
