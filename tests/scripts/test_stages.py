"""`gram_anchor.py` and `adapt_highres.py` as users run them, after a short `pretrain.py` on the digits."""

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModel

from dinov3_hf.models.dinov3_convnext.configuration_dinov3_convnext import DINOv3ConvNextConfig
from dinov3_hf.models.dinov3_convnext.modeling_dinov3_convnext import DINOv3ConvNextModel
from dinov3_hf.models.dinov3_vit.image_processing import build_image_processor
from dinov3_hf.recipes.pages import read_recipe
from dinov3_hf.training.checkpoints import problem
from tests.forks import ENVIRONMENT
from tests.scripts.test_pretrain import RECIPE, logged
from tests.testing_utils import REPOSITORY, run_in_process, save_tiny_vit, saved_state

SCRIPTS = REPOSITORY / "training_scripts"


def main_of(script: str):
    return runpy.run_path(str(SCRIPTS / script))["main"]


@pytest.fixture(scope="module")
def stage_1(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stage_1")
    (folder / "tiny.yaml").write_text(RECIPE)
    main_of("pretrain.py")([str(folder / "tiny.yaml"), "--output_dir", str(folder / "a"), "--eval_data", "null"])
    return folder / "a"


@pytest.fixture
def run(stage_1, tmp_path) -> Path:
    return Path(shutil.copytree(stage_1, tmp_path / "a"))


def content(folder: Path) -> dict[str, tuple[int, int]]:
    found = {str(path): path.stat() for path in folder.rglob("*")}
    return {name: (stat.st_mtime_ns, stat.st_size) for name, stat in found.items()}


def test_the_full_recipe_in_three_commands(capsys, run, tmp_path):
    before = content(run)
    status, said, error = run_in_process(capsys, "--from", run, "--max_steps", "3", main=main_of("gram_anchor.py"))
    assert status == 0, error
    first, *found = said.splitlines()[:6]
    assert first == f"Starts from {run / 'checkpoint-4'}, after 4 steps:"
    assert [line.split()[0] for line in found] == ["student", "teacher", "heads", "optimizer", "steps"]
    gram = tmp_path / "a-gram"
    assert f"The trained teacher is in {gram / 'teacher'}" in said
    steps = logged(gram)
    assert [entry["schedule/gram_weight"] for entry in steps] == [2, 2, 2]  # it rises over 0.5 % of the stage
    assert all(entry["loss/gram"] > 0 for entry in steps)
    assert read_recipe(str(gram / "checkpoint-3" / "recipe.yaml"))["start_from"] == str(run)

    source = gram / "checkpoint-3" / "teacher"
    words = ("--from", source, "--max_steps", "2", "--output_dir", tmp_path / "c")
    status, said, error = run_in_process(capsys, *words, main=main_of("adapt_highres.py"))
    assert status == 0, error
    assert said.startswith(f"Starts from {source}, after 3 steps:\n  student    begins as the teacher\n")
    assert all(entry["loss/gram"] > 0 for entry in logged(tmp_path / "c"))
    assert AutoModel.from_pretrained(tmp_path / "c" / "teacher").config.hidden_size == 32
    assert content(run) == before


def bad_teachers(folder: Path) -> None:
    save_tiny_vit(folder / "WIDER", patch_size=4, hidden_size=64)
    save_tiny_vit(folder / "COARSER", patch_size=8, hidden_size=32)
    DINOv3ConvNextModel(DINOv3ConvNextConfig(hidden_sizes=[8, 32], depths=[1, 1])).save_pretrained(folder / "CONVNEXT")
    build_image_processor(image_size=16).save_pretrained(folder / "CONVNEXT")
    (folder / "EMPTY").mkdir()


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        ((), 2, "there is nothing to start from; name an earlier run, for example --from runs/a"),
        (("--from",), 2, "--from has no value"),
        (("--from", "nowhere"), 1, "start_from nowhere: there is no such folder"),
        (("--from", "EMPTY"), 1, "has no checkpoint-N with the recipe.yaml of a run"),
        (("--from", "WIDER"), 1, "has no checkpoint-N with the recipe.yaml of a run"),
        (("RECIPE", "--from", "EMPTY", "--gram_teacher", "copy"), 1, "holds no checkpoint-N and no teacher/"),
        (("RECIPE", "--from", "WIDER", "--gram_teacher", "copy"), 1, "without prototype heads (heads.safetensors)"),
        (("RECIPE", "--from", "RUN"), 2, "gram_teacher is not set"),
        (("RECIPE", "--gram_teacher", "copy"), 2, "there is nothing to start from"),
        (("--from", "RUN", "--backbone.hidden_size", "64"), 1, "backbone.hidden_size is 32 there and 64 here"),
        (("--from", "RUN", "--output_dir", "RUN"), 1, "is the run that is started from, or lies in it"),
        (("--from", "RUN", "--gram_teacher", "WIDER"), 1, "hidden_size 64, the backbone that is trained 32"),
        (("--from", "RUN", "--gram_teacher", "COARSER"), 1, "patch_size 8, the backbone that is trained 4"),
        (("--from", "RUN", "--gram_teacher", "CONVNEXT"), 1, "model_type dinov3_convnext, the backbone"),
        (("--from", "RUN", "--gram_teacher", "EMPTY"), 1, "EMPTY"),
        (("--from", "RUN", "--gram_crop_size", "30"), 1, "gram_crop_size 30"),
        (("--from", "RUN", "--max_steps", "4", "--gram_start_step", "5"), 1, "gram_start_step 5 is beyond the run"),
        (("--from", "RUN", "--max_steps", "4", "--gram_weight_schedule.cosine_steps", "9"), 1, "are longer than the"),
        (("--from", "RUN", "--start_with", "heads"), 2, "expected one of state, teacher"),
    ],
)
def test_bad_input(capsys, run, tmp_path, arguments, status, says):
    bad_teachers(tmp_path)
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    places = {"RECIPE": tmp_path / "tiny.yaml", "RUN": run}
    places |= {name: tmp_path / name for name in ("WIDER", "COARSER", "CONVNEXT", "EMPTY")}
    words = [places.get(argument, argument) for argument in arguments]
    ended, _, error = run_in_process(capsys, *words, main=main_of("gram_anchor.py"))
    assert ended == status, error
    assert error.startswith("error: ") and says in error
    assert len(error.splitlines()) == 1


def test_help_shows_the_short_name_of_a_field(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    status, said, _ = run_in_process(capsys, "--help", main=main_of("adapt_highres.py"))
    assert status == 0
    assert "adapt_highres.py [RECIPE]" in said and "--from, --start_from" in said


@pytest.mark.slow
def test_a_gram_stage_that_is_killed_goes_on(capsys, run, tmp_path):
    words = ["--from", str(run), "--max_steps", "20", "--save_steps", "4", "--eval_data", "null"]
    status, _, error = run_in_process(
        capsys, *words, "--output_dir", tmp_path / "whole", main=main_of("gram_anchor.py")
    )
    assert status == 0, error

    killed = tmp_path / "killed"
    command = [sys.executable, str(SCRIPTS / "gram_anchor.py"), *words, "--output_dir", str(killed)]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not (killed / "checkpoint-8").is_dir():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (killed / "checkpoint-20").exists()

    again = [*words, "--output_dir", str(killed), "--resume_from_checkpoint", "last"]
    status, said, error = run_in_process(capsys, *again, main=main_of("gram_anchor.py"))
    assert status == 0, error
    assert "Starts from" not in said
    ends = [folder / "checkpoint-20" for folder in (tmp_path / "whole", killed)]
    assert [problem(end) for end in ends] == [None, None]
    ours, theirs = (saved_state(end) for end in ends)
    assert any(name.startswith("param/gram_teacher.") for name in ours)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    losses = [
        [
            entry["loss"]
            for entry in json.loads((end / "trainer_state.json").read_text())["log_history"]
            if "loss" in entry
        ]
        for end in ends
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 20
