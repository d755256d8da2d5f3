"""Schedules against the original's values: the primitives at every step, whole published recipes at sampled steps."""

import dataclasses
import json
import pickle

import numpy as np
import pytest
from safetensors.numpy import load_file

from dinov3_hf.errors import ArgumentError
from dinov3_hf.training.schedules import (
    Schedule,
    TrainingSchedules,
    lr_scale_factor,
    resolve_steps,
    warmup_cosine,
    warmup_cosine_dinov2,
)
from tests.testing_utils import FIXTURES

F_SCHEDULES = FIXTURES / "f_schedules"
CASE = json.loads((F_SCHEDULES / "primitives" / "case.json").read_text())
EXPECTED = load_file(F_SCHEDULES / "primitives" / "outputs.safetensors")
TOLERANCE = CASE["tolerance"]
# Of the published recipes that have a `schedules` section; the fourth is a recipe of ours, tested with it.
PUBLISHED = ["vit7b16_pretrain", "vit7b16_gram_anchor", "vit7b16_high_res_adapt"]


@pytest.mark.parity
@pytest.mark.parametrize("index", range(len(CASE["config"]["linear_warmup_cosine_decay"])))
def test_dinov3_style_equals_the_reference(index):
    case = CASE["config"]["linear_warmup_cosine_decay"][index]
    schedule = Schedule(
        case["start"],
        case["peak"],
        case["end"],
        warmup_steps=case["warmup_iterations"],
        cosine_steps=case["cosine_iterations"],
    )
    values = schedule.as_array(case["total_iterations"])
    assert values.dtype == np.float64
    np.testing.assert_allclose(values, EXPECTED[f"linear_warmup_cosine_decay/{index}"], **TOLERANCE)


@pytest.mark.parity
@pytest.mark.parametrize("index", range(len(CASE["config"]["cosine_scheduler"])))
def test_dinov2_style_equals_the_reference(index):
    case = CASE["config"]["cosine_scheduler"][index]
    values = [
        warmup_cosine_dinov2(
            step,
            start=case.get("start_warmup_value", 0.0),
            peak=case["base_value"],
            end=case["final_value"],
            warmup_steps=case.get("warmup_iters", 0),
            max_steps=case["total_iters"],
            freeze_steps=case.get("freeze_iters", 0),
            truncation=case.get("trunc_extra", 0.0),
        )
        for step in range(case["total_iters"] + 2)
    ]
    np.testing.assert_allclose(values, EXPECTED[f"cosine_scheduler/{index}"], **TOLERANCE)


def schedule_of_section(section: dict, steps_per_epoch: int) -> Schedule:
    """A schedule of a published file, whose durations are epochs."""
    cosine_epochs = section.get("cosine_epochs")
    return Schedule(
        section["start"],
        section["peak"],
        section["end"],
        warmup_steps=section["warmup_epochs"] * steps_per_epoch,
        cosine_steps=None if cosine_epochs is None else cosine_epochs * steps_per_epoch,
    )


@pytest.mark.parity
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipes_equal_the_reference(name):
    reference = json.loads((F_SCHEDULES / f"{name}.json").read_text())
    steps_per_epoch, section = reference["iterations_per_epoch"], reference["schedules_section"]
    global_batch = reference["world_size"] * reference["batch_size_per_gpu"]
    local_loss = reference.get("dino_local_loss_weight_section")
    schedules = TrainingSchedules(
        max_steps=reference["total_iterations"],
        lr=schedule_of_section(section["lr"], steps_per_epoch).scaled(
            lr_scale_factor(reference["scaling_rule"], global_batch)
        ),
        weight_decay=schedule_of_section(section["weight_decay"], steps_per_epoch),
        teacher_momentum=schedule_of_section(section["momentum"], steps_per_epoch),
        teacher_temperature=schedule_of_section(section["teacher_temp"], steps_per_epoch),
        local_loss_weight=Schedule.constant(1.0)
        if local_loss is None
        else schedule_of_section(local_loss, steps_per_epoch),
        freeze_last_layer_steps=section["lr"]["freeze_last_layer_epochs"] * steps_per_epoch,
    )
    values = [schedules.at(step) for step in reference["iterations"]]
    ours_by_theirs = {
        "lr": "lr",
        "last_layer_lr": "last_layer_lr",
        "weight_decay": "weight_decay",
        "momentum": "teacher_momentum",
        "teacher_temp": "teacher_temperature",
        "dino_local_loss_weight": "local_loss_weight",
    }
    for theirs, ours in ours_by_theirs.items():
        expected = reference.get(theirs, [1.0] * len(values))
        np.testing.assert_allclose([value[ours] for value in values], expected, **TOLERANCE, err_msg=theirs)


@pytest.mark.parity
@pytest.mark.parametrize("name", ["vit7b16_gram_anchor", "vit7b16_high_res_adapt"])
def test_published_gram_weights_equal_the_reference(name):
    reference = json.loads((F_SCHEDULES / f"{name}.json").read_text())
    schedule = schedule_of_section(reference["gram_loss_weight_section"], reference["iterations_per_epoch"])
    values = [schedule.at(step, reference["total_iterations"]) for step in reference["iterations"]]
    np.testing.assert_allclose(values, reference["gram_loss_weight"], **TOLERANCE)


def test_dinov3_warmup_excludes_and_cosine_includes_its_ends():
    schedule = Schedule(0.0, 1.0, 0.25, warmup_steps=4)
    values = schedule.as_array(10)
    assert values[3] == 0.75
    assert values[4] == 1.0
    assert values[9] == 0.25
    assert schedule.at(10, 10) == schedule.at(10**9, 10) == 0.25


def test_dinov2_warmup_includes_its_end_and_cosine_stops_short():
    schedule = Schedule(0.0, 1.0, 0.25, warmup_steps=4, style="dinov2")
    values = schedule.as_array(10)
    assert values[3] == values[4] == 1.0
    assert values[9] > 0.25
    assert schedule.at(10, 10) == 0.25


@pytest.mark.parametrize("style", ["dinov3", "dinov2"])
@pytest.mark.parametrize(("warmup_steps", "max_steps"), [(0, 1), (1, 1), (1, 2), (2, 3), (5, 5)])
def test_the_shortest_runs_are_finite_and_within_bounds(style, warmup_steps, max_steps):
    schedule = Schedule(0.0, 1.0, 0.5, warmup_steps=warmup_steps, style=style)
    values = schedule.as_array(max_steps)
    assert np.isfinite(values).all()
    assert ((values >= 0) & (values <= 1)).all()


@pytest.mark.parametrize("max_steps", [1, 2, 7])
def test_truncation_runs_from_peak_to_end(max_steps):
    schedule = Schedule(1.0, 1.0, 0.1, style="dinov2", truncation=0.5)
    values = schedule.as_array(max_steps)
    assert values[0] == 1.0
    if max_steps > 1:
        assert values[-1] == pytest.approx(0.1)


def test_a_float_below_one_is_a_share_of_the_run():
    shares = Schedule(0.0, 1.0, 0.1, warmup_steps=0.1, cosine_steps=0.5)
    steps = Schedule(0.0, 1.0, 0.1, warmup_steps=20, cosine_steps=100)
    np.testing.assert_array_equal(shares.as_array(200), steps.as_array(200))
    assert resolve_steps(0.07, 100) == 7  # 0.07 * 100 is a little more than 7 in float64
    assert resolve_steps(0, 100) == 0
    assert resolve_steps(12500, 100) == 12500


def test_scaling_leaves_the_start_and_the_dinov2_minimum():
    assert lr_scale_factor("sqrt_wrt_1024", 1024) == 4.0
    assert lr_scale_factor("sqrt_wrt_1024", 4096) == 8.0
    assert lr_scale_factor("none", 4096) == 1.0
    new = Schedule(0.1, 1.0, 0.5, warmup_steps=2).scaled(2.0)
    assert (new.start, new.peak, new.end) == (0.1, 2.0, 1.0)
    old = dataclasses.replace(Schedule(0.1, 1.0, 0.5, warmup_steps=2), style="dinov2").scaled(2.0)
    assert (old.start, old.peak, old.end) == (0.1, 2.0, 0.5)


def test_the_last_layer_is_frozen_without_shifting_its_schedule():
    constant = Schedule.constant(1.0)
    schedules = TrainingSchedules(
        max_steps=10,
        lr=Schedule(0.0, 1.0, 0.0, warmup_steps=5),
        weight_decay=constant,
        teacher_momentum=constant,
        teacher_temperature=constant,
        local_loss_weight=constant,
        freeze_last_layer_steps=3,
    )
    rates = [(schedules.at(step)["last_layer_lr"], schedules.at(step)["lr"]) for step in range(10)]
    assert all(last_layer == 0 for last_layer, _ in rates[:3])
    assert all(last_layer == lr for last_layer, lr in rates[3:])


@pytest.mark.parametrize(
    "plain",
    [
        0.04,
        {"start": 0.0, "peak": 1e-3, "end": 1e-6, "warmup_steps": 0.1},
        {"start": 0.0, "peak": 1e-3, "end": 1e-6, "warmup_steps": 10, "cosine_steps": 0},
        {"start": 0.0, "peak": 1e-3, "end": 1e-6, "warmup_steps": 10, "style": "dinov2", "truncation": 0.25},
    ],
)
def test_plain_values_round_trip(plain):
    schedule = Schedule.parse(plain)
    assert schedule.to_plain() == plain
    assert Schedule.parse(schedule.to_plain()) == schedule
    assert pickle.loads(pickle.dumps(schedule)) == schedule


def test_parse_fills_what_follows_from_the_peak():
    assert Schedule.parse({"peak": 0.5}) == Schedule.constant(0.5)
    assert Schedule.parse({"peak": 0.04, "end": 0.4}) == Schedule(0.04, 0.04, 0.4)
    assert Schedule.parse({"start": 0, "peak": 1, "warmup_steps": 1e3}).warmup_steps == 1000


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("fast", r"lr_schedule is 'fast'; expected a number, or a mapping"),
        (True, r"lr_schedule is True; expected a number, or a mapping"),
        ({"peek": 1.0}, r"lr_schedule has no entry 'peek'; did you mean peak\?"),
        ({"peak": "high"}, r"lr_schedule.peak is 'high'; expected a number"),
        ({"start": 0.0}, r"lr_schedule has no peak; add peak"),
        ({"peak": 1.0, "warmup_steps": 10}, r"lr_schedule has a warm-up but no start; add start"),
        ({"peak": 1.0, "style": "dinov1"}, r"lr_schedule: schedule style 'dinov1' is unknown; use dinov3 or dinov2"),
        ({"start": 0, "peak": 1.0, "warmup_steps": -1}, r"lr_schedule: schedule warmup_steps -1 is no duration"),
        ({"start": 0, "peak": 1.0, "warmup_steps": 1.5}, r"lr_schedule: schedule warmup_steps 1.5 is no duration"),
        ({"peak": 1.0, "style": "dinov2", "cosine_steps": 3}, r"cosine_steps needs style dinov3"),
        ({"peak": 1.0, "truncation": 0.1}, r"truncation needs style dinov2"),
        ({"peak": 1.0, "style": "dinov2", "truncation": -1}, r"truncation -1.0 is negative"),
    ],
)
def test_unusable_schedules_are_refused_in_one_line(value, message):
    with pytest.raises(ArgumentError, match=message) as error:
        Schedule.parse(value, "lr_schedule")
    assert "\n" not in str(error.value)


def test_schedules_longer_than_the_run_are_refused():
    with pytest.raises(ValueError, match=r"lr_schedule.warmup_steps 200 is longer than the run \(max_steps 100\)"):
        Schedule(0.0, 1.0, 0.0, warmup_steps=200).check(100, "lr_schedule")
    with pytest.raises(ValueError, match=r"use cosine_steps of at most 60"):
        Schedule(0.0, 1.0, 0.0, warmup_steps=40, cosine_steps=80).check(100, "lr_schedule")
    Schedule(0.0, 1.0, 0.0, warmup_steps=40, cosine_steps=60).check(100, "lr_schedule")


def test_a_value_costs_no_table():
    # A billion steps: anything proportional to the run would not return.
    value = warmup_cosine(5 * 10**8, start=0, peak=1, end=0, warmup_steps=0, max_steps=10**9 + 1)
    assert value == pytest.approx(0.5)


def test_the_backbone_waits_for_its_heads_and_then_catches_up():
    fields = {
        "max_steps": 20,
        "lr": Schedule(0.0, 1.0, 0.1, warmup_steps=4),
        "weight_decay": Schedule.constant(0.04),
        "teacher_momentum": Schedule.constant(0.9),
        "teacher_temperature": Schedule.constant(0.07),
        "local_loss_weight": Schedule.constant(1.0),
    }
    waiting = TrainingSchedules(**fields, head_steps=5, ramp_steps=4)
    shares = [waiting.at(step)["backbone_lr"] / max(waiting.at(step)["lr"], 1e-9) for step in range(20)]
    assert shares == pytest.approx([0] * 5 + [0, 0.25, 0.5, 0.75] + [1] * 11)
    tenth = TrainingSchedules(**fields, head_steps=5, ramp_steps=4, backbone_lr_mult=0.1)
    assert [tenth.at(s)["backbone_lr"] for s in range(20)] == pytest.approx(
        [0.1 * waiting.at(s)["backbone_lr"] for s in range(20)]
    )
    at_once = TrainingSchedules(**fields, head_steps=5)
    assert [at_once.at(step)["backbone_lr"] > 0 for step in range(20)] == [step >= 5 for step in range(20)]
    plain = TrainingSchedules(**fields)
    assert not plain.backbone_waits and "backbone_lr" not in plain.at(3)
    assert waiting.at(7) == {**plain.at(7), "backbone_lr": plain.at(7)["lr"] * 0.5}
