"""The time of a step is measured of the students as they are trained, on images of a micro-batch."""

import pytest

from dinov3_hf.models.dinov3_vit.layers import DINOv3ViTLayer
from dinov3_hf.training.student_times import REPETITIONS, measure_students
from tests.training.test_distillation_trainer import VIT, make_args, save_teacher

SMALL = {**VIT, "num_hidden_layers": 1}
LARGE = {**VIT, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 6}


@pytest.mark.parametrize("with_heads", [True, False])
@pytest.mark.parametrize("num_local_crops", [0, 2])
def test_seconds_of_a_step(tmp_path, with_heads, num_local_crops):
    teacher = save_teacher(tmp_path / "teacher", with_heads)
    students = {"large": {"backbone": LARGE}, "small": {"backbone": SMALL}}
    run = {"students": students, "num_local_crops": num_local_crops, "koleo_group_size": 2}
    seconds = measure_students(make_args(tmp_path / "run", teacher, **run, global_batch_size=4))
    assert list(seconds) == ["large", "small"]
    assert 0 < 2 * seconds["small"] < seconds["large"] < 10


def test_it_is_that_of_the_whole_batch(tmp_path):
    run = {"students": {"large": {"backbone": LARGE}}, "num_local_crops": 0}
    teacher = save_teacher(tmp_path / "teacher")
    once = measure_students(make_args(tmp_path / "run", teacher, **run, global_batch_size=4))["large"]
    batch = {"global_batch_size": 64, "per_device_train_batch_size": 4}  # one of 16 micro-batches is measured
    assert 4 < measure_students(make_args(tmp_path / "run", teacher, **run, **batch))["large"] / once < 64


@pytest.mark.parametrize(("recomputation", "calls"), [("none", 1), ("full", 2)])
def test_blocks_and_terms_are_those_of_the_recipe(tmp_path, monkeypatch, recomputation, calls):
    counted, forward = [], DINOv3ViTLayer.forward

    def count(self, *inputs, **named):
        counted.append(self)
        return forward(self, *inputs, **named)

    monkeypatch.setattr(DINOv3ViTLayer, "forward", count)
    gram = {"gram_teacher": "teacher", "gram_weight_schedule": 2.0, "gram_tokens": "all"}
    run = {"students": {"small": {"backbone": SMALL}}, "gradient_checkpointing": recomputation, **gram}
    measure_students(make_args(tmp_path / "run", save_teacher(tmp_path / "teacher"), **run))
    assert len(counted) == (1 + REPETITIONS) * calls
