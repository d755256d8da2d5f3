"""`training_scripts/pretrain.py` as users run it: real processes, real files."""

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.forks import ENVIRONMENT
from tests.scripts.runs import SCRIPTS, Ranks, Runner
from tests.testing_utils import run_in_process, saved_state

SCRIPT = SCRIPTS / "pretrain.py"

RECIPE = """
train_data: digits
backbone: {patch_size: 4, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2,
           layerscale_value: 0.1, drop_path_rate: 0.25}
drop_path_group_size: 4
dino_head: {num_prototypes: 32, bottleneck_dim: 16, hidden_dim: 32, num_layers: 2}
ibot_head: {num_prototypes: 32, bottleneck_dim: 16, hidden_dim: 32, num_layers: 2}
global_crop_size: 16
local_crop_size: 8
num_local_crops: 2
global_batch_size: 8
koleo_group_size: 4
max_steps: 4
lr_schedule: 1e-3
freeze_last_layer_steps: 0
teacher_temperature_schedule: 0.06
logging_steps: 1
save_strategy: steps
save_steps: 2
precision: fp32
use_cpu: true
report_to: none
"""


@pytest.fixture(scope="module")
def runner(forks, tmp_path_factory):
    return Runner(forks, tmp_path_factory.mktemp("runner"), RECIPE)


@pytest.fixture(scope="module")
def whole(runner, tmp_path_factory) -> Path:
    """A run of one process."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    runner.finish(folder)
    return folder


def pretrain(*arguments: object, launcher: tuple[str, ...] = (sys.executable,)) -> subprocess.CompletedProcess[str]:
    command = [*launcher, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=300, check=False)


def succeed(*arguments: object, **options) -> str:
    done = pretrain(*arguments, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def logged(folder: Path) -> list[dict[str, float]]:
    state = json.loads((folder / "trainer_state.json").read_text())
    return [entry for entry in state["log_history"] if "loss" in entry]


def test_a_folder_with_fewer_photos_than_a_batch(runner, tmp_path):
    photos = tmp_path / "photos" / "nested"
    photos.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(generator.integers(0, 255, (40, 30, 3), dtype=np.uint8)).save(photos / f"{i}.jpg")
    runner.finish(tmp_path / "run", "--train_data", tmp_path / "photos")
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoint-4"):
        assert (folder / "teacher" / "model.safetensors").is_file()


def test_accumulation_follows_the_whole_batch(runner, whole, tmp_path):
    runner.finish(tmp_path / "parts", "--per_device_train_batch_size", 4)
    expected, parts = (logged(run / "checkpoint-4") for run in (whole, tmp_path / "parts"))
    assert [entry["loss"] for entry in parts] == pytest.approx([entry["loss"] for entry in expected], rel=1e-5)


def test_two_processes_follow_one(runner, whole, tmp_path):
    ranks = Ranks(runner, tmp_path / "two", 2)
    assert ranks.wait() == [0, 0], ranks.said()
    one, two = (logged(run / "checkpoint-4") for run in (whole, tmp_path / "two"))
    assert [entry["loss"] for entry in two] == pytest.approx([entry["loss"] for entry in one], rel=1e-5)
    for name in ("loss/koleo", "prototypes/dino_entropy", "prototypes/ibot_entropy"):
        assert [e[name] for e in two] == pytest.approx([e[name] for e in one], rel=1e-5), name


def test_bf16_autocast_on_the_cpu_stays_near_float32(runner, whole, tmp_path):
    runner.finish(tmp_path / "bf16", "--precision", "bf16")
    exact, rounded = (logged(run / "checkpoint-4") for run in (whole, tmp_path / "bf16"))
    assert [e["loss"] for e in rounded] != [e["loss"] for e in exact]
    assert [e["loss"] for e in rounded] == pytest.approx([e["loss"] for e in exact], rel=0.02)
    saved = saved_state(tmp_path / "bf16" / "checkpoint-4")
    assert saved.pop("num_steps") == 4
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


def test_resumed_run_ends_where_the_uninterrupted_one_does(runner, whole, tmp_path):
    # as if the run had been killed after its first checkpoint
    shutil.copytree(whole / "checkpoint-2", tmp_path / "run" / "checkpoint-2")
    runner.finish(tmp_path / "run")
    ours, theirs = (run / "checkpoint-4" for run in (tmp_path / "run", whole))
    assert [entry["loss"] for entry in logged(ours)] == [entry["loss"] for entry in logged(theirs)]
    ours, theirs = saved_state(ours), saved_state(theirs)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_help_has_the_three_groups(forks):
    done = forks.run(SCRIPT, "--help")
    assert done.returncode == 0, done.stderr
    for group in ("changes the result", "orchestration", "efficiency"):
        assert group in done.stdout.lower()


def test_an_error_is_one_line_and_a_status(tmp_path):
    done = pretrain("no_such_recipe", "--output_dir", tmp_path / "run")
    assert done.returncode == 2
    assert done.stderr.startswith("error: there is no recipe 'no_such_recipe'")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (("RECIPE", "--global_bach_size", "8"), 2, "global_batch_size"),
        (("RECIPE", "--max_steps", "many"), 2, "max_steps"),
        (("RECIPE", "--train_data", "null"), 2, "train_data is not set"),
        (("RECIPE", "--gram_teacher", "copy"), 2, "gram_anchor.py --from"),
        (("RECIPE", "--train_data", "nowhere/photos"), 1, "nowhere"),
        (("RECIPE", "--train_data", "EMPTY"), 1, "EMPTY"),
        (("RECIPE", "--train_data", "TEXTS"), 1, "no image"),
        (("RECIPE", "--global_crop_size", "18"), 1, "16 or 20"),
        (("RECIPE", "--per_device_train_batch_size", "3"), 1, "2 or 4"),
        (("RECIPE", "--resume_from_checkpoint", "last"), 1, "checkpoint"),
    ],
)
def test_bad_input(capsys, runner, tmp_path, arguments, status, says):
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "TEXTS").mkdir()
    (tmp_path / "TEXTS" / "notes.txt").write_text("no picture")
    places = {"RECIPE": runner.recipe, "EMPTY": tmp_path / "EMPTY", "TEXTS": tmp_path / "TEXTS"}
    main = runpy.run_path(str(SCRIPT))["main"]
    words = [places.get(argument, argument) for argument in arguments]
    ended, _, error = run_in_process(capsys, *words, "--output_dir", tmp_path / "run", main=main)
    assert ended == status, error
    assert error.startswith("error: ") and says in error
    assert len(error.splitlines()) == 1


def test_batch_smaller_than_the_ranks(runner, tmp_path):
    ranks = Ranks(runner, tmp_path / "run", 2, "--global_batch_size", 1)
    assert ranks.wait() == [1, 1]
    assert "error: global_batch_size 1 is smaller than the number of ranks 2" in ranks.said()


def test_checkpoint_of_another_recipe(runner, whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    assert runner.wait(runner.start(run, "--backbone.hidden_size", 64)) == 1
    said = runner.log.read_text()
    assert "backbone.hidden_size is 32 there and 64 here" in said.splitlines()[-1]
    assert "Traceback" not in said
