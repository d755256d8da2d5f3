"""`training_scripts/distill.py` as users run it, with the teacher of a short `pretrain.py`."""

import json
import os
import re
import runpy
import shlex
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from dinov3_hf.training.checkpoints import checkpoints, problem
from tests.scripts.distillations import (
    RECIPE,
    STEPS,
    STUDENTS,
    assert_same_losses,
    distil,
    distillation_runner,
    losses,
    pretrained_teacher,
    split,
)
from tests.scripts.runs import SCRIPTS, Ranks
from tests.testing_utils import require_package, run_in_process, save_tiny_vit, saved_state

SCRIPT = SCRIPTS / "distill.py"
IN_GROUPS = split(vit=1, gated=2, convnext=1)


@pytest.fixture(scope="module")
def teacher(forks, tmp_path_factory) -> Path:
    return pretrained_teacher(forks, tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def runner(forks, tmp_path_factory, teacher):
    return distillation_runner(forks, tmp_path_factory.mktemp("runner"), teacher)


@pytest.fixture(scope="module")
def one(runner, tmp_path_factory) -> Path:
    """A run of one process, in which the students take turns."""
    return distil(runner, tmp_path_factory.mktemp("one") / "run", 1)


# ---- what it does ---------------------------------------------------------------------------------------------------


def test_the_command_of_the_docstring(forks, teacher, tmp_path):
    shutil.copytree(teacher, tmp_path / "runs" / "quickstart" / "teacher")
    [command] = re.findall(r"^    accelerate launch (\S+/distill\.py distill_small_cpu .*)$", SCRIPT.read_text(), re.M)
    assert SCRIPTS.parent / shlex.split(command)[0] == SCRIPT
    short = ("--max_steps", "2", "--global_batch_size", "8", "--koleo_group_size", "8", "--eval_steps", "2")
    done = forks.run(SCRIPT, *shlex.split(command)[1:], *short, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    said = done.stdout[done.stdout.index("Teacher ") :].splitlines()
    network = "ViT with 2 blocks of width 32 and patches of 4 px"
    assert said[0] == f"Teacher runs/quickstart/teacher: {network}; objective prototypes."
    assert said[1:4] == [
        "  vit: dinov3_vit, width 64",
        "  vit_gated: dinov3_vit, width 64",
        "The students take turns on the teacher's answers.",
    ]
    assert said[-3:] == ["The students are in", "  runs/distilled/vit", "  runs/distilled/vit_gated"]
    for name in ("vit", "vit_gated"):
        assert re.search(rf"^step +2  {name} +kNN top-1 \d+\.\d %", done.stdout, re.MULTILINE), done.stdout
        assert AutoModel.from_pretrained(tmp_path / "runs" / "distilled" / name).config.hidden_size == 64


def test_help_says_what_is_the_distillation_s(forks):
    done = forks.run(SCRIPT, "--help")
    assert done.returncode == 0, done.stderr
    assert "distill.py RECIPE" in done.stdout and "--students.vits16.lr_schedule.peak 1e-4" in done.stdout
    for field in ("teacher", "students", "student_ranks", "teacher_to_student_scale", "objective"):
        assert f"--{field} " in done.stdout


def test_each_student_on_a_rank_of_its_own_takes_the_steps_of_one_process(forks, teacher, one, tmp_path):
    names = ("gated", "convnext")
    runner = distillation_runner(forks, tmp_path, teacher, *names)
    assert_same_losses(distil(runner, tmp_path / "run", 2, *split(gated=1, convnext=1)), one, *names)
    for name in names:
        AutoModel.from_pretrained(tmp_path / "run" / name)
        assert (tmp_path / "run" / f"checkpoint-{STEPS}" / name / "model.safetensors").is_file()


def test_a_run_that_has_ended_is_not_taken_up(runner, one, tmp_path):
    run = shutil.copytree(one, tmp_path / "run")
    before = {path: path.read_bytes() for path in run.glob("*/model.safetensors")}
    distil(runner, run, 1)
    assert before and before == {path: path.read_bytes() for path in run.glob("*/model.safetensors")}


# ---- with ranks, longer ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def grouped(runner, tmp_path_factory) -> Path:
    """A run of four processes in three groups."""
    return distil(runner, tmp_path_factory.mktemp("grouped") / "run", 4, *IN_GROUPS)


def wait_for_a_checkpoint(run: Path, ranks: Ranks) -> None:
    deadline = time.monotonic() + 120
    while not (found := checkpoints(run)) or problem(found[-1]) is not None:
        assert time.monotonic() < deadline, ranks.said()
        time.sleep(0.02)


def assert_same_end(run: Path, whole: Path) -> None:
    """Every number and every weight."""
    assert losses(run, *STUDENTS) == losses(whole, *STUDENTS)
    ours, theirs = (saved_state(folder / f"checkpoint-{STEPS}") for folder in (run, whole))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for name in STUDENTS:
        for file in ("model.safetensors", "heads.safetensors"):
            ours, theirs = load_file(run / name / file), load_file(whole / name / file)
            assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.slow  # `make test-engines` and CI run it
@pytest.mark.parametrize("killed", [0, 1, 3])
def test_a_run_that_loses_a_rank_goes_on_to_the_same_end(runner, grouped, tmp_path, killed):
    """The rank that writes, the only one of a student, one of several."""
    run = tmp_path / "run"
    ranks = Ranks(runner, run, 4, *IN_GROUPS, script="distill.py")
    wait_for_a_checkpoint(run, ranks)
    os.kill(ranks.pids[killed], signal.SIGKILL)
    time.sleep(1)
    for pid in ranks.pids:  # as launchers do
        os.kill(pid, signal.SIGKILL)
    assert ranks.wait()[killed] == -signal.SIGKILL, "the run was over before the kill"
    assert not (run / "vit").exists() and not (run / f"checkpoint-{STEPS}").exists()
    assert_same_end(distil(runner, run, 4, *IN_GROUPS), grouped)


@pytest.mark.slow  # `make test-engines` and CI run it
def test_a_run_that_is_told_to_end_goes_on_to_the_same_end(runner, grouped, tmp_path):
    run = tmp_path / "run"
    ranks = Ranks(runner, run, 4, *IN_GROUPS, script="distill.py")
    wait_for_a_checkpoint(run, ranks)
    os.kill(ranks.pids[1], signal.SIGTERM)
    assert ranks.wait() == [75] * 4, ranks.said()
    assert ranks.said().count("Told to end: saved at step") == 1
    assert_same_end(distil(runner, run, 4, *IN_GROUPS), grouped)


@pytest.mark.slow  # `make test-engines` and CI run it
def test_ranks_are_chosen_by_the_times_that_students_take(runner, one, tmp_path):
    run = tmp_path / "run"
    ranks = Ranks(runner, run, 4, "--student_ranks", "auto", script="distill.py")
    assert ranks.wait() == [0] * 4, ranks.said()
    assert re.search(r"^Measured for a step on one rank: vit \d+\.\d\d s, gated .* idle\.$", ranks.said(), re.M)
    counts = [int(count) for count in re.findall(r"on (\d) of 4 ranks", ranks.said())]
    assert sorted(counts) == [1, 1, 2]
    assert_same_losses(run, one)


@pytest.mark.slow  # `make test-engines` and CI run it
@require_package("deepspeed")
@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_one_student_under_deepspeed(forks, teacher, one, tmp_path, engine):
    runner = distillation_runner(forks, tmp_path, teacher, "gated")
    run = distil(runner, tmp_path / "run", 2, "--engine", engine)
    assert_same_losses(run, one, "gated")
    AutoModel.from_pretrained(run / "gated")
    # What it has saved goes on without it.
    shutil.copytree(run / "checkpoint-3", tmp_path / "again" / "checkpoint-3")
    assert_same_losses(distil(runner, tmp_path / "again", 1), one, "gated")


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def places(tmp_path_factory, teacher) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("places")
    save_tiny_vit(folder / "HEADLESS", patch_size=4)
    save_tiny_vit(folder / "COARSE", patch_size=8)
    (folder / "EMPTY").mkdir()
    return {name: folder / name for name in ("HEADLESS", "COARSE", "EMPTY")} | {"TEACHER": teacher}


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (("--teacher", "null"), 2, "teacher is not set; name the model to distil, for example --teacher OWNER/NAME"),
        (("--teacher", "nowhere/else"), 1, "folder nowhere/else, and as a Hub repository it fails"),
        (("--teacher", "EMPTY"), 1, "holds no config.json of a model; name a model folder"),
        (("--teacher", "HEADLESS", "--objective", "prototypes"), 1, "has none (heads.safetensors), as released mode"),
        (("--teacher", "COARSE"), 1, "patches of 8 pixels, the students of 4; set teacher_to_student_scale: 2"),
        (("--students.vit.backbone.patch_size", "8"), 1, "students vit and gated have patches of 8 and 4 pixels"),
        (("--students.vit.dino_head.num_prototypes", "16"), 1, "student vit: dino_head.num_prototypes is 16, but"),
        (("--student_ranks", "auto"), 1, "3 students need as many ranks or more, but this run has 1; start"),
        (split(vit=1, gated=1, convnext=1), 1, "3 students need as many ranks or more, but this run has 1; start"),
        (split(vit=1), 2, "student_ranks must name each student once: {vit: 1, gated: 1, convnext: 1}"),
        (("--student_ranks", "{vit: 1, gated: 1, convnext: true}"), 2, "student_ranks.convnext is True; expected"),
        (("--students.vit.lr_schedules", "1e-3"), 2, "students.vit cannot have 'lr_schedules'; did you mean lr_sch"),
        (("--students.vit.seed", "1"), 2, "students.vit cannot have 'seed'; it is the same for all students"),
        (("--students.vit.koleo_group_size", "3"), 1, "student vit: koleo_group_size 3 does not divide"),
        (("--students.vitt.lr_schedule", "1"), 2, "there is no 'vitt' in students; did you mean vit?"),
        (("--engine", "zero3"), 2, "engine zero3 trains one network, but there are 3 students; set engine: fsdp2 or"),
        (("--teacher_to_student_scale", "3"), 1, "global_crop_size 32 at teacher_to_student_scale 3 is 10.6667 pix"),
        (("--student_rank", "auto"), 2, "--student_rank is no field; did you mean student_ranks?"),
        (("--train_data", "EMPTY"), 1, "EMPTY"),
    ],
)
def test_bad_input(capsys, places, tmp_path, arguments, status, says):
    assert_refused(capsys, places, tmp_path, json.dumps(RECIPE), arguments, status, says)


@pytest.mark.parametrize(
    ("students", "says"),
    [
        ('{"vit": {}, "vit": {}}', "the key vit stands twice"),
        ("{}", "there are no students; name at least one, such as students: {vits16: {backbone: {preset: vits16}}}."),
        ("[vit]", "students"),
        ("{state: {}}", "student 'state' cannot be called so, it would name a folder"),
        ("{vit: small}", "students.vit is 'small'; expected a mapping such as {backbone: ...}."),
    ],
)
def test_bad_lists_of_students(capsys, places, tmp_path, students, says):
    recipe = json.dumps({**RECIPE, "students": "STUDENTS"}).replace('"STUDENTS"', students)
    assert_refused(capsys, places, tmp_path, recipe, (), 2, says)


def assert_refused(capsys, places, tmp_path, recipe, arguments, status, says):
    (tmp_path / "recipe.yaml").write_text(recipe)
    words = [tmp_path / "recipe.yaml", "--teacher", places["TEACHER"], *(places.get(word, word) for word in arguments)]
    main = runpy.run_path(str(SCRIPT))["main"]
    ended, _, error = run_in_process(capsys, *words, "--output_dir", tmp_path / "run", main=main)
    assert ended == status, error
    assert error.startswith("error: ") and says in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_ranks_that_are_not_those_of_the_run(runner, tmp_path):
    ranks = Ranks(runner, tmp_path / "run", 4, *split(vit=1, gated=2, convnext=2), script="distill.py")
    assert ranks.wait() == [1] * 4
    errors = {line for line in ranks.said().splitlines() if line.startswith("error: ")}
    assert errors == {
        "error: student_ranks {vit: 1, gated: 2, convnext: 2} are 5 ranks, but 4 have been started; change one, or "
        "set student_ranks: auto."
    }
