"""`training_scripts/pretrain.py` on data with bad files, and with a learning rate that ruins the weights."""

import json
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.data.bad_files import UNREADABLE
from tests.scripts.test_pretrain import RECIPE, pretrain
from tests.testing_utils import saved_state
from tests.training.test_unreadable_images import save_photos

pytestmark = pytest.mark.slow


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE.replace("train_data: digits", f"train_data: {tmp_path / 'photos'}"))
    return path


def report(folder: Path) -> list[str]:
    return [json.loads(line)["name"] for line in (folder / "unreadable_images.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_folder_with_three_per_cent_of_bad_files_trains_to_the_end(recipe, tmp_path, num_workers):
    bad = save_photos(tmp_path / "photos", 33 * len(UNREADABLE), len(UNREADABLE))
    one_epoch = 34 * len(UNREADABLE) // 8 + 1
    steps = ("--max_steps", one_epoch, "--save_steps", 20, "--dataloader_num_workers", num_workers)
    done = pretrain(recipe, *steps, "--output_dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert sorted(report(tmp_path / "run")) == bad
    assert "is left out and listed in" in done.stderr and "Traceback" not in done.stderr
    count = f"{len(bad)} of {34 * len(UNREADABLE)} images could not be read, see {tmp_path / 'run'}"
    assert count in done.stderr
    assert (tmp_path / "run" / "teacher" / "model.safetensors").is_file()


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_folder_with_eight_per_cent_of_bad_files_ends_the_run(recipe, tmp_path, num_ranks):
    save_photos(tmp_path / "photos", 368, 32)
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    launcher = torchrun if num_ranks == 2 else (sys.executable,)
    done = pretrain(recipe, "--max_steps", 100, "--output_dir", tmp_path / "run", launcher=launcher)
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(set(errors)) == 1  # of several ranks, torchrun ends the others with the first
    assert num_ranks == 2 or done.stderr.splitlines()[-1] == errors[0]
    assert errors[0].startswith("error: 21 of 400 images cannot be read, more than max_unreadable_share 0.05 allows;")
    assert str(tmp_path / "run" / "unreadable_images.jsonl") in errors[0]
    assert len(report(tmp_path / "run")) == 21
    assert not (tmp_path / "run" / "teacher").exists()


def test_three_steps_that_are_not_finite_end_the_run(recipe, tmp_path):
    recipe.write_text(RECIPE)  # digits
    run = tmp_path / "run"
    explode = ("--lr_schedule", "{start: 0.0, peak: 1e38, warmup_steps: 20}", "--max_steps", 20, "--save_steps", 1)
    done = pretrain(recipe, *explode, "--weight_decay_schedule", 0.0, "--output_dir", run)
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert "Traceback" not in done.stderr
    assert lines[-1].startswith("error: step ") and "not finite, the third step in a row." in lines[-1]
    assert sum("of 3 in a row" in line for line in lines) == 2
    assert not (run / "teacher").exists()
    checkpoints = sorted(run.glob("checkpoint-*"))
    assert checkpoints
    for folder in checkpoints:
        for path in folder.rglob("*.safetensors"):
            assert all(tensor.isfinite().all() for tensor in load_file(path).values()), path
        saved = saved_state(folder)
        assert any(name.startswith("exp_avg_sq/") for name in saved)
        assert all(tensor.isfinite().all() for tensor in saved.values())
        assert "NaN" not in (folder / "trainer_state.json").read_text()
