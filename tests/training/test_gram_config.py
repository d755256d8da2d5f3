"""Gram anchoring in a recipe: what is refused, with which remedy, and what reaches the model and the views."""

import pytest

from dinov3_hf.errors import ArgumentError
from dinov3_hf.training.ssl_config import SSLConfig
from tests.training.test_ssl_trainer import make_args


def test_the_fields_reach_model_views_and_schedules(tmp_path):
    config = make_args(
        tmp_path, gram_teacher="copy", gram_start_step=0.5, gram_weight_schedule=1.5, gram_crop_size=32,
        gram_per_image=False, gram_group_size=4, gram_negatives="remove", gram_tokens="masked", gram_antialias=True,
    )  # fmt: skip
    model = config.pretraining_config()
    assert model.gram_teacher == "separate"
    assert not model.gram_per_image
    assert model.gram_group_size == 4
    assert (model.gram_negatives, model.gram_tokens, model.gram_antialias) == ("remove", "masked", True)
    assert config.views(*config.crop_size_mix().sizes).gram_crop_size == 32
    assert [config.schedules().at(step)["gram_weight"] for step in range(6)] == [0, 0, 0, 1.5, 1.5, 1.5]


@pytest.mark.parametrize(
    ("teacher", "kind"), [(None, None), ("ema", "ema"), ("copy", "separate"), ("runs/a", "separate")]
)
def test_the_kind_of_teacher(tmp_path, teacher, kind):
    config = make_args(tmp_path, gram_teacher=teacher)
    assert config.pretraining_config().gram_teacher == kind
    assert ("gram_weight" in config.schedules().at(0)) == (teacher is not None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"gram_crop_size": 32}, "gram_crop_size need .* set gram_teacher: copy, or set gram_crop_size: null"),
        (
            {"gram_crop_size": 32, "gram_teacher": "ema", "gram_refresh_steps": 2, "gram_first_refresh_step": 2},
            "is ema; set .* or set gram_crop_size: null, gram_refresh_steps: null, gram_first_refresh_step: 0",
        ),
        ({"gram_crop_size": 30, "gram_teacher": "copy"}, "gram_crop_size 30 is not a multiple .* 28 or 32"),
        ({"gram_refresh_steps": 2}, "gram_teacher is null"),
        ({"gram_refresh_steps": 2, "gram_teacher": "ema"}, "gram_refresh_steps need .* gram_teacher is ema"),
        ({"gram_max_refreshes": 2, "gram_teacher": "copy"}, "need gram_refresh_steps"),
        ({"gram_refresh_steps": 0, "gram_teacher": "copy"}, "gram_refresh_steps 0 is not positive"),
        ({"gram_refresh_steps": 6, "gram_teacher": "copy"}, r"gram_refresh_steps 6 is beyond the run \(max_steps 6\)"),
        ({"gram_start_step": 9, "gram_teacher": "copy"}, r"gram_start_step 9 is beyond the run \(max_steps 6\)"),
        ({"gram_start_step": -1, "gram_teacher": "copy"}, "gram_start_step -1 is negative"),
        ({"gram_refresh_steps": 2, "gram_first_refresh_step": 7, "gram_teacher": "copy"}, "step 7 is beyond"),
        ({"gram_refresh_steps": 2, "gram_max_refreshes": -1, "gram_teacher": "copy"}, "gram_max_refreshes -1"),
        ({"gram_tokens": "masked", "gram_teacher": "copy"}, "set gram_per_image: false"),
        ({"gram_group_size": 4, "gram_teacher": "copy"}, "needs gram_per_image: false"),
        ({"gram_group_size": 5, "gram_per_image": False, "gram_teacher": "copy"}, "size 5 does not .* use 4 or 8"),
        (
            {"gram_per_image": False, "gram_teacher": "copy", "per_device_train_batch_size": 4},
            r"gram_group_size 16 \(null is the whole global batch\) does not divide the 4 images .* use 4",
        ),
        (
            {"gram_per_image": False, "gram_tokens": "masked", "gram_teacher": "ema", "ibot_weight": 0},
            "gram_tokens masked needs masks",
        ),
        (
            {"gram_teacher": "copy", "gram_weight_schedule": {"start": 0, "peak": 2, "warmup_steps": 9}},
            "gram_weight_schedule.warmup_steps 9 is longer than the run",
        ),
        ({"gram_teacher": "copy", "gram_weight_schedule": -2}, "gram_weight_schedule .* is negative"),
        ({"koleo_weight": -0.1}, "koleo_weight -0.1 is negative"),
    ],
)  # fmt: skip
def test_contradictions_are_refused(tmp_path, fields, message):
    with pytest.raises((ArgumentError, ValueError), match=message) as error:
        make_args(tmp_path, **fields)
    assert "\n" not in str(error.value)


def test_a_wrong_choice_is_refused(tmp_path):
    with pytest.raises(ValueError, match="gram_negatives"):
        make_args(tmp_path, gram_teacher="copy", gram_negatives="drop")


def test_all_of_it_reads_back_from_a_recipe(tmp_path):
    config = make_args(tmp_path, gram_teacher="copy", gram_refresh_steps=2, gram_crop_size=32, gram_start_step=1)
    again = SSLConfig(**config.recipe())
    assert again.recipe() == config.recipe()
    assert SSLConfig.result_fields(again.recipe())["gram_crop_size"] == 32


def test_a_convnext_trains_without_masks(tmp_path):
    backbone = {"model_type": "dinov3_convnext", "depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 24, 32]}
    sizes = {"global_crop_size": 64, "local_crop_size": 40, "gram_crop_size": 96, "gram_teacher": "copy"}
    config = make_args(tmp_path, backbone=backbone, ibot_weight=0, **sizes)
    masks = config.masks(*config.crop_size_mix().sizes)
    assert not masks.counts.any()
    assert masks.grid_height == 2
    with pytest.raises(ValueError, match="ibot_weight"):
        make_args(tmp_path, backbone=backbone, **sizes)
    with pytest.raises(ValueError, match="global_crop_size 48 is not a multiple"):
        make_args(tmp_path, backbone=backbone, ibot_weight=0, **{**sizes, "global_crop_size": 48})
    assert SSLConfig(backbone={"preset": "convnext_tiny"}, ibot_weight=0).backbone_config().hidden_size == 768
