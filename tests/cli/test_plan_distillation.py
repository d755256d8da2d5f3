"""`dinov3-hf plan` of a distillation: students in turn and in groups."""

import json
import re

import pytest

from dinov3_hf.cli import errors
from dinov3_hf.cli.main import parse_and_run
from dinov3_hf.distributed.student_ranks import choose_student_ranks
from tests.plan.distillation_step import write_teacher

PAGE = """
train_data: digits
global_batch_size: 512
koleo_group_size: 8
max_steps: 1000
students:
  vits16: {backbone: {preset: vits16}}
  vitb16: {backbone: {preset: vitb16}}
  convnext_tiny: {backbone: {preset: convnext_tiny}}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distillation")
    write_teacher(folder / "teacher")
    (folder / "page.yaml").write_text(PAGE, encoding="utf-8")
    return [str(folder / "page.yaml"), "--teacher", str(folder / "teacher")]


@pytest.fixture
def planned(recipe, capsys):
    def plan(*words):
        parse_and_run(["plan", *recipe, *words, "--json"])
        return json.loads(capsys.readouterr().out)

    return plan


def test_in_turn_and_in_groups(planned):
    facts = planned("--gpus", "8", "--images", "1e6", "--price", "2")
    turn, groups = facts["in_turn"], facts["in_groups"]
    seconds = {name: student["seconds"] for name, student in turn["students"].items()}
    assert turn["seconds"]["students"] == pytest.approx(sum(seconds.values()))
    assert turn["seconds"]["step"] == pytest.approx(turn["seconds"]["teacher"] + turn["seconds"]["students"])
    assert turn["one_by_one_seconds"] == pytest.approx(3 * turn["seconds"]["teacher"] + turn["seconds"]["students"])
    # Other students' weights, gradients, moments and averages lie on the same GPU.
    others = 20 * (facts["students"]["vits16"]["parameters"] + facts["students"]["convnext_tiny"]["parameters"])
    alone = planned("--gpus", "8", "--students", "{vitb16: {backbone: {preset: vitb16}}}")
    assert "in_groups" not in alone
    assert turn["peak_bytes"] - alone["in_turn"]["peak_bytes"] == pytest.approx(others + 4 * others / 20, rel=0.01)

    ranks = {name: student["ranks"] for name, student in groups["students"].items()}
    flop = {name: student["flop_of_image"] for name, student in facts["students"].items()}
    assert ranks == choose_student_ranks(flop, 8, 512)
    slowest = max(student["seconds"] for student in groups["students"].values())
    assert groups["seconds"]["students"] == slowest
    waiting = sum(student["ranks"] * (slowest - student["seconds"]) for student in groups["students"].values())
    assert groups["idle_share"] == pytest.approx(waiting / 8 / groups["seconds"]["step"])

    assert facts["run"]["step_seconds"] == turn["seconds"]["step"] and facts["run"]["student_ranks"] is None
    assert facts["run"]["passes_over_the_data"] == pytest.approx(0.512)
    assert facts["run"]["cost"] == pytest.approx(2 * turn["gpu_hours"])
    asked = planned("--gpus", "8", "--student_ranks", "auto")
    assert asked["run"]["student_ranks"] == ranks
    assert asked["run"]["step_seconds"] == groups["seconds"]["step"]


def test_a_split_that_is_given(planned):
    facts = planned("--gpus", "4", "--student_ranks", "{vitb16: 2, vits16: 1, convnext_tiny: 1}")
    assert facts["run"]["student_ranks"] == {"vits16": 1, "vitb16": 2, "convnext_tiny": 1}


def test_a_batch_that_does_not_fit_is_taken_in_parts(planned):
    large = planned("--gpus", "4", "--gpu", "h200-141gb")["in_turn"]
    small = planned("--gpus", "4", "--gpu", "rtx4090-24gb")["in_turn"]
    assert large["per_device_train_batch_size"] is None and large["students"]["vitb16"]["micro_batch"] == 128
    size = small["per_device_train_batch_size"]
    assert small["fits"] and 128 % size == 0
    assert all(student["micro_batch"] == size for student in small["students"].values())


def test_a_sharded_teacher(planned):
    whole, sharded = (planned("--gpus", "8", "--engine", engine) for engine in ("ddp", "fsdp2"))
    assert sharded["in_turn"]["peak_bytes"] < whole["in_turn"]["peak_bytes"]
    assert sharded["in_groups"]["engine"] == "fsdp2"


def test_features_of_a_teacher_of_another_library(planned, tmp_path):
    """Its operations are those of a forward pass without numbers."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        hidden_size=64, num_attention_heads=2, num_hidden_layers=2, patch_size=16, image_size=64
    )
    transformers.Dinov2Model(config).save_pretrained(tmp_path)
    transformers.BitImageProcessor().save_pretrained(tmp_path)
    facts = planned("--teacher", str(tmp_path), "--gpus", "2", "--global_crop_size", "64", "--local_crop_size", "32")
    tokens, width = 17, 64
    crop = 2 * 16 * (3 * 256) * width + 2 * (2 * tokens * 12 * width**2 + 4 * tokens**2 * width)
    assert facts["teacher"]["flop_of_image"] == pytest.approx(2 * crop, rel=0.02)
    assert facts["teacher"]["head_parameters"] == 0
    assert facts["teacher"]["parameters"] == sum(p.numel() for p in transformers.Dinov2Model(config).parameters())


def test_tables(recipe, capsys):
    parse_and_run(["plan", *recipe, "--gpus", "8"])
    out = capsys.readouterr().out
    for text in ("Students in turn", "Students in groups", "GPUs wait", "one by one", "convnext_tiny"):
        assert text in out
    parse_and_run(["plan", *recipe, "--gpus", "2", "--budget", "1"])
    out = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "in groups: 3 students cannot be spread over 2 ranks" in out and "the budget pays" in out


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["--gpus", "2", "--student_ranks", "auto"], 1, "3 students cannot be spread over 2 ranks"),
        (["--gpus", "24"], 1, "global_batch_size 512 is not a multiple of 24 GPUs, on all of which the teacher runs"),
        (["--gpus", "8", "--student_ranks", "{vits16: 4, vitb16: 4}"], 2, "student_ranks must name each student once"),
        (
            ["--gpus", "8", "--student_ranks", "{vits16: 2, vitb16: 2, convnext_tiny: 2}"],
            1,
            "are 6 ranks, but there are 8 GPUs",
        ),
        (
            ["--gpus", "8", "--student_ranks", "{vits16: 1, vitb16: 1, convnext_tiny: 6}"],
            1,
            "student convnext_tiny: the recipe's global_batch_size 512 cannot be divided among 6 GPUs",
        ),
        (
            ["--gpus", "8", "--per_device_train_batch_size", "7"],
            1,
            "7 does not go with all students on 8 GPUs; use 64, 32,",
        ),
        (["--gpus", "8", "--engine", "zero3"], 2, "engine zero3 trains one network, but there are 3 students"),
        (["--gpus", "8", "--sweep", "sweep.png"], 2, "--sweep draws no distillations"),
        (["--gpus", "8", "--students", "{}"], 2, "there are no students"),
    ],
)
def test_refusals(recipe, capsys, words, status, message):
    with pytest.raises(SystemExit) as ended:
        errors.run(parse_and_run, ["plan", *recipe, *words])
    assert ended.value.code == status
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
