"""Operations and memory of a distillation step are those that torch counts: of the teacher, and of each student."""

import pytest

from dinov3_hf.cli.plan_recipe import distillation_of, read_words
from dinov3_hf.plan.distillation import plan_in_turn
from dinov3_hf.plan.gpus import GPUS
from dinov3_hf.plan.run_plan import Machine
from tests.plan.distillation_step import take_distillation_steps, write_teacher

PAGE = """
train_data: digits
global_batch_size: 8
koleo_group_size: 8
global_crop_size: 96
local_crop_size: 32
num_local_crops: 4
students:
  vit: {backbone: {preset: vits16, num_hidden_layers: 2, drop_path_rate: 0.3}, dino_head: {hidden_dim: 128}}
  gated: {backbone: {preset: vits16plus, num_hidden_layers: 2}, ibot_head: {hidden_dim: 256}}
  convnext: {backbone: {preset: convnext_tiny, depths: [1, 1, 2, 1], hidden_sizes: [48, 96, 192, 384]}}
"""
TWICE = ["--teacher_to_student_scale", "2", "--global_crop_size", "192", "--local_crop_size", "64"]
CASES = [
    pytest.param([], id="prototypes"),
    pytest.param(TWICE, id="prototypes, teacher at twice the size"),
    pytest.param(["--objective", "features"], id="features"),
    *(
        pytest.param(words, id=name, marks=pytest.mark.slow)
        for name, words in {
            "prototypes, float32": ["--precision", "fp32"],
            "prototypes, CLS alone": ["--ibot_weight", "0"],
            "prototypes, Gram": ["--gram_teacher", "teacher", "--gram_weight_schedule", "1.0"],
            "features, CLS alone": ["--objective", "features", "--patch_weight", "0"],
            "features, smooth L1": ["--objective", "features", "--feature_loss", "smooth_l1"],
        }.items()
    ),
]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distillation")
    write_teacher(folder / "teacher")
    (folder / "page.yaml").write_text(PAGE, encoding="utf-8")
    return [str(folder / "page.yaml"), "--teacher", str(folder / "teacher"), "--output_dir", str(folder / "run")]


@pytest.mark.parametrize("changes", CASES)
def test_a_step(recipe, changes):
    asked = read_words([*recipe, *changes])
    distillation = distillation_of(asked.args)
    flop, measured = take_distillation_steps(asked.args, asked.args.global_batch_size)
    teacher = distillation.teacher
    planned = {"teacher": teacher.answer_flop + teacher.target_flop}
    planned |= {name: distillation.student_flop(name) for name in distillation.students}
    assert planned == pytest.approx(flop, rel=0.005)  # 2 % are promised
    assert distillation.flop_of_image == pytest.approx(measured.flop, rel=0.005)
    plan = plan_in_turn(distillation, Machine(GPUS["h100-80gb"], 1), "ddp")
    assert sum(workload.num_parameters for workload in distillation.students.values()) == measured.num_parameters
    assert plan.peak_memory == pytest.approx(measured.peak, rel=0.05)  # 10 % are promised
