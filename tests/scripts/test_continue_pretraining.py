"""`training_scripts/continue_pretraining.py` as users run it: real commands on tiny models, and what it says when
something is wrong."""

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

from dinov3_hf.training import lora
from tests.testing_utils import (
    REPOSITORY,
    require_package,
    run_in_process,
    save_labelled_images,
    save_tiny_vit,
    saved_state,
)

SCRIPT = REPOSITORY / "training_scripts" / "continue_pretraining.py"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
HEAD = "{num_prototypes: 32, bottleneck_dim: 16, hidden_dim: 32, num_layers: 2}"
TINY = {
    "dino_head": HEAD,
    "ibot_head": HEAD,
    "global_crop_size": 32,
    "local_crop_size": 16,
    "num_local_crops": 2,
    "global_batch_size": 4,
    "per_device_train_batch_size": 4,
    "koleo_group_size": 4,
    "max_steps": 6,
    "head_steps": 2,
    "ramp_steps": 2,
    "lr_schedule": 1e-3,
    "teacher_temperature_schedule": 0.06,
    "logging_steps": 1,
    "eval_steps": 3,
    "save_steps": 3,
    "dataloader_num_workers": 0,
    "use_cpu": "true",
    "precision": "fp32",
    "report_to": "none",
}


def words(**changes: object) -> list[str]:
    return [word for field, value in {**TINY, **changes}.items() for word in (f"--{field}", str(value))]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a model and labelled photos."""
    folder = tmp_path_factory.mktemp("place")
    save_tiny_vit(folder / "model")
    save_labelled_images(folder / "photos", num_images=6)
    return folder


@pytest.fixture(scope="module")
def main():
    return runpy.run_path(str(SCRIPT))["main"]


def logged(folder: Path, name: str) -> dict[int, float]:
    state = json.loads((folder / "trainer_state.json").read_text())
    return {entry["step"]: entry[name] for entry in state["log_history"] if name in entry}


def test_from_a_model_to_a_better_known_one(place, tmp_path, main, capsys):
    run = tmp_path / "run"
    status, page, error = run_in_process(
        capsys,
        *("--model", place / "model", "--train_data", place / "photos", "--eval_data", place / "photos"),
        *words(output_dir=run, max_patch_drift="null", max_knn_drop="null"),
        main=main,
    )
    assert status == 0, error
    assert "the backbone waits for 2 of 6 steps, then joins in over 2" in page
    assert "kNN top 1" in page and "0.000" in page
    assert f"The trained teacher is in {run}/teacher" in page
    assert list(logged(run, "eval_knn_top1")) == [0, 3, 6]
    assert logged(run, "eval_patch_drift")[0] == pytest.approx(0, abs=1e-6)
    assert [logged(run, "schedule/backbone_lr")[step] > 0 for step in range(1, 7)] == [False] * 3 + [True] * 3
    model, processor = AutoModel.from_pretrained(run / "teacher"), AutoImageProcessor.from_pretrained(run / "teacher")
    assert type(model).__module__.startswith("transformers.")
    assert list(processor.image_mean) == [0.5] * 3
    card = (run / "teacher" / "README.md").read_text()
    assert "| started from | model |" in card and "## Before, during and after" in card
    assert "| step | kNN top-1 |" in card


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_by_bit(place, tmp_path):
    changes = {"max_steps": 60, "eval_steps": 20, "save_steps": 20, "save_total_limit": "null", "max_knn_drop": "null"}
    command = [sys.executable, str(SCRIPT), "--model", str(place / "model"), "--train_data", str(place / "photos")]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = subprocess.run(
        [*command, *words(**changes, output_dir=whole)], env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    running = subprocess.Popen(
        [*command, *words(**changes, output_dir=killed)],
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    until = time.monotonic() + 240
    while not (killed / "checkpoint-20").is_dir() and time.monotonic() < until:
        time.sleep(0.02)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert not (killed / "teacher").exists()
    done = subprocess.run(
        [*command, *words(**changes, output_dir=killed), "--resume_from_checkpoint", "last"],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    ours, theirs = (saved_state(folder / "checkpoint-60") for folder in (killed, whole))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert logged(killed, "eval_patch_drift") == logged(whole, "eval_patch_drift")


@require_package("peft")
def test_adapters_from_the_command_line(place, tmp_path, main, capsys):
    status, page, error = run_in_process(
        capsys,
        *("--model", place / "model", "--train_data", place / "photos", "--lora_rank", "2"),
        *words(output_dir=tmp_path / "run", eval_steps=6, save_steps=6),
        main=main,
    )
    assert status == 0, error
    assert "Low-rank adapters of rank 2: " in page and "parameters of the backbone are trained" in page
    AutoModel.from_pretrained(tmp_path / "run" / "teacher")


@pytest.mark.parametrize("num_channels", [1, 5])
def test_images_of_other_channels(place, tmp_path, main, capsys, num_channels):
    images = tmp_path / "images"
    images.mkdir()
    rng = np.random.default_rng(0)
    for i in range(4):
        pixels = rng.integers(0, 256, (40, 40, num_channels), dtype=np.uint8)
        if num_channels == 1:
            Image.fromarray(pixels[..., 0]).save(images / f"{i}.png")
        else:
            np.save(images / f"{i}.npy", pixels)
    status, page, error = run_in_process(
        capsys,
        *("--model", place / "model", "--train_data", images, "--num_channels", num_channels),
        *words(output_dir=tmp_path / "run", max_steps=3, head_steps=1, ramp_steps=1, eval_steps=3, save_steps=3),
        main=main,
    )
    assert status == 0, error
    assert f"kernels of 3 channels {'are folded into one' if num_channels == 1 else 'repeat for 5'}" in page
    assert AutoModel.from_pretrained(tmp_path / "run" / "teacher").config.num_channels == num_channels


@pytest.mark.parametrize(
    ("changes", "status", "says"),
    [
        ({"model": None}, 2, "model is not set"),
        ({"train_data": None}, 2, "train_data is not set"),
        ({"model": "NOWHERE"}, 1, "there is no model folder"),
        ({"model": "OTHER"}, 1, "is a 'bert' model; continued pre-training takes a DINOv3 ViT or ConvNeXt"),
        ({"model": "FILE"}, 1, "is a file; convert it first, dinov3-hf convert"),
        ({"model": "BROKEN"}, 1, "copy or download"),
        ({"eval_data": "FLAT"}, 1, "FLAT"),
        ({"eval_data": "nowhere/labelled"}, 1, "nowhere/labelled"),
        ({"num_channels": 1, "image_mean": "[0.5, 0.5, 0.5]"}, 1, "image_mean has 3 values"),
        ({"global_crop_size": 36}, 1, "32 or 40"),
        ({"head_steps": 6}, 1, "which leaves none for the whole network"),
        ({"start_from": "runs/a"}, 2, "name the backbone as model"),
        ({"lora_rank": "many"}, 2, "lora_rank"),
        ({"head_stebs": 3}, 2, "head_steps"),
    ],
)
def test_bad_input(capsys, place, tmp_path, main, changes, status, says):
    (tmp_path / "OTHER").mkdir()
    (tmp_path / "OTHER" / "config.json").write_text('{"model_type": "bert"}')
    shutil.copytree(place / "photos" / "dark", tmp_path / "FLAT")
    shutil.copytree(place / "model", tmp_path / "BROKEN")
    (tmp_path / "BROKEN" / "model.safetensors").write_bytes(b"no weights")
    (tmp_path / "FILE").write_bytes(b"weights")
    given = {"model": place / "model", "train_data": place / "photos", **changes}
    given = {field: tmp_path / value if str(value).isupper() else value for field, value in given.items()}
    arguments = [word for field, value in given.items() if value is not None for word in (f"--{field}", str(value))]
    ended, _, error = run_in_process(capsys, *words(output_dir=tmp_path / "run"), *arguments, main=main)
    last = error.splitlines()[-1]
    assert (ended, last.startswith("error: ")) == (status, True), error
    assert says in last
    assert "Traceback" not in error


def test_adapters_without_peft(capsys, place, tmp_path, main, monkeypatch):
    monkeypatch.setattr(lora, "find_spec", lambda name: None)
    arguments = ("--model", place / "model", "--train_data", place / "photos", "--lora_rank", "2")
    status, _, error = run_in_process(capsys, *arguments, *words(output_dir=tmp_path / "run"), main=main)
    assert status == 2
    assert error == "error: lora_rank needs PEFT, which is not installed; pip install 'dinov3-hf[peft]'.\n"
