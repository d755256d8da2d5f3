"""The list of unreadable images, and when it ends a run: by itself, and in runs on folders with real bad files."""

import itertools
import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import TrainerCallback, TrainerState

from dinov3_hf.data.sources.folder import FolderImages
from dinov3_hf.data.sources.spec import load_images
from dinov3_hf.distributed.reductions import rank
from dinov3_hf.models.dinov3_pretraining.modeling_dinov3_pretraining import DINOv3ForPreTraining
from dinov3_hf.training.evaluation import KnnCallback
from dinov3_hf.training.ssl_trainer import SSLTrainer
from dinov3_hf.training.unreadable_images import UnreadableImages
from tests.data.bad_files import UNREADABLE, photo, unreadable_contents
from tests.reference.processes import run_in_processes
from tests.training.test_guards import free_port
from tests.training.test_ssl_trainer import make_args

STEP = 16  # images of one step


def save_photos(folder: Path, num_good: int, num_bad: int) -> list[str]:
    """Write JPEGs and bad files, of every kind in turn; return the paths of the bad ones."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(num_good):
        Image.fromarray(photo(24, 32, seed=i)).save(folder / f"good{i:04}.jpg")
    bad = []
    for i, (name, content) in zip(range(num_bad), itertools.cycle(unreadable_contents().items()), strict=False):
        bad.append(folder / f"bad{i:04}_{name}")
        bad[-1].write_bytes(content)
    return [str(path) for path in bad]


def report(folder: Path) -> dict[str, dict[str, object]]:
    lines = (folder / "unreadable_images.jsonl").read_text().splitlines()
    return {entry["name"]: entry for entry in map(json.loads, lines)}


def messages(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "dinov3_hf.training.unreadable_images"]


def photo_trainer(photos: Path, output_dir: Path, callbacks=None, **fields) -> SSLTrainer:
    args = make_args(output_dir, train_data=str(photos), **fields)
    torch.manual_seed(args.seed)
    model = DINOv3ForPreTraining(args.pretraining_config())
    return SSLTrainer(model, args, FolderImages(photos, labelled=False, num_channels=3), callbacks=callbacks)


# --- runs ------------------------------------------------------------------------------------------------------------


def test_three_per_cent_are_left_out_and_named(tmp_path, caplog):
    num_bad = len(UNREADABLE)  # of every kind
    num_images = num_bad * 33 // 12 * 12
    bad = save_photos(tmp_path / "photos", num_images - num_bad, num_bad)
    one_epoch = num_images // 12
    trainer = photo_trainer(tmp_path / "photos", tmp_path / "run", max_steps=one_epoch, global_batch_size=12)
    trainer.train()
    entries = report(tmp_path / "run")
    assert sorted(entries) == bad
    assert all(entry["reason"] and entry["times"] >= 1 for entry in entries.values())
    assert trainer.state.log_history[-2]["data/unreadable_images"] == num_bad
    first, last = messages(caplog)
    assert first.startswith(f"{next(iter(entries))} cannot be read (") and "unreadable_images.jsonl" in first
    path = tmp_path / "run" / "unreadable_images.jsonl"
    assert last == f"{num_bad} of {num_images} images could not be read, see {path}"


def test_eight_per_cent_end_the_run_early(tmp_path):
    save_photos(tmp_path / "photos", 276, 24)
    trainer = photo_trainer(tmp_path / "photos", tmp_path / "run", max_steps=75, global_batch_size=12)
    with pytest.raises(ValueError, match=r"^1\d of 300 images cannot be read, more than max_unreadable_share 0.05"):
        trainer.train()
    assert trainer.state.global_step < 25  # within the first epoch
    assert 16 <= len(report(tmp_path / "run")) <= 19


def test_a_resumed_run_goes_on_with_the_list(tmp_path, caplog):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 10

    bad = save_photos(tmp_path / "photos", 194, 6)
    run = tmp_path / "run"
    fields = {"max_steps": 20, "global_batch_size": 12, "save_strategy": "steps", "save_steps": 5}
    photo_trainer(tmp_path / "photos", run, [Stop()], **fields).train()
    before = report(run)
    assert 0 < len(before) < 6
    with (run / "unreadable_images.jsonl").open("a") as file:
        file.write('{"name": "half a li')  # killed while it wrote
    caplog.clear()
    photo_trainer(tmp_path / "photos", run, **fields).train(resume_from_checkpoint=str(run / "checkpoint-10"))
    assert sorted(report(run)) == bad and set(before) < set(report(run))
    assert [message.split(",")[0] for message in messages(caplog)] == ["6 of 200 images could not be read"]


def test_a_run_from_the_start_takes_no_notice_of_an_old_list(tmp_path):
    save_photos(tmp_path / "photos", 8, 0)
    (tmp_path / "unreadable_images.jsonl").write_text('{"name": "a.jpg", "reason": "broken", "times": 1}\n')
    trainer = photo_trainer(tmp_path / "photos", tmp_path, max_steps=1)
    trainer.train()
    assert not (tmp_path / "unreadable_images.jsonl").exists()
    assert trainer.state.log_history[0]["data/unreadable_images"] == 0


def two_ranks_on_bad_photos(folder: str) -> dict[str, torch.Tensor]:
    os.environ |= {"RANK": str(rank()), "LOCAL_RANK": str(rank()), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    trainer = photo_trainer(Path(folder) / "photos", Path(folder) / "run", max_steps=25, global_batch_size=12)
    trainer.train()
    return {"count": torch.tensor(len(trainer.unreadable_images.images))}


@pytest.mark.slow
def test_two_ranks_keep_one_list(tmp_path):
    bad = save_photos(tmp_path / "photos", 291, 9)
    first, second = run_in_processes(two_ranks_on_bad_photos, 2, str(tmp_path))
    assert first["count"] == second["count"] == 9
    lines = (tmp_path / "run" / "unreadable_images.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["name"] for line in lines) == bad


def test_evaluation_leaves_unreadable_images_out(tmp_path, caplog):
    for split, name in (("train", "a"), ("train", "b"), ("test", "a"), ("test", "b")):
        save_photos(tmp_path / "photos" / split / name, 30, 0)
    (tmp_path / "photos" / "train" / "a" / "good0007.jpg").write_bytes(b"")
    images = [load_images(tmp_path / "photos", split, labelled=True) for split in ("train", "test")]
    trainer = photo_trainer(tmp_path / "photos" / "train" / "b", tmp_path / "run")
    trainer.add_callback(KnnCallback(*images))
    for _ in range(2):
        assert 0 < trainer.evaluate()["eval_knn_top1"] <= 100
    (message,) = [r.getMessage() for r in caplog.records if r.name == "dinov3_hf.training.evaluation"]
    assert message.startswith("1 of 120 images could not be read, the evaluation leaves them out; the first: cannot ")
    assert "good0007.jpg (the file is empty)" in message


# --- the rule --------------------------------------------------------------------------------------------------------


def first_stop(
    folder: Path, shares: float, num_images: int | None, max_share: float = 0.05, steps=2000, seed=0
) -> int:
    """The step at which a run stops whose images are unreadable with a probability of `shares`; 0 for never."""
    rng = np.random.default_rng(seed)
    images = UnreadableImages(folder, num_images, max_share)
    for step in range(1, steps + 1):
        rows = rng.integers(0, 10**9, rng.binomial(STEP, shares))
        try:
            images.count(STEP, [(f"image {row}", "broken") for row in rows], is_main=False)
        except ValueError:
            return step
    return 0


def test_rule_of_large_sets_and_streams(tmp_path):
    for seed in range(20):
        for num_images in (None, 10**9):
            assert first_stop(tmp_path, 0.03, num_images, seed=seed) == 0
            assert first_stop(tmp_path, 0.045, num_images, seed=seed) == 0
            assert 0 < first_stop(tmp_path, 0.08, num_images, seed=seed) * STEP < 6000
            assert 0 < first_stop(tmp_path, 0.5, num_images, seed=seed) * STEP < 400


def test_rule_of_small_sets_is_exact(tmp_path):
    images = UnreadableImages(tmp_path, 100, 0.05)
    for _ in range(40):  # epochs
        images.count(95, [(f"image {i}", "broken") for i in range(5)], is_main=False)
    with pytest.raises(ValueError, match=r"^6 of 100 images cannot be read, more than max_unreadable_share 0\.05"):
        images.count(1, [("image 5", "broken")], is_main=False)


def test_shares_at_the_ends(tmp_path):
    with pytest.raises(ValueError, match=r"^1 of the 17 images drawn so far cannot be read"):
        UnreadableImages(tmp_path, None, 0.0).count(16, [("a", "broken")], is_main=False)
    assert first_stop(tmp_path, 0.9, 100, max_share=1.0, steps=3) == 0


def test_names_of_any_bytes_survive(tmp_path, caplog):
    # A captured message with such a name cannot be sent from a worker process of the tests to the main one.
    caplog.set_level(logging.ERROR, logger="dinov3_hf.training.unreadable_images")
    name = os.fsdecode(b"caf\xe9\xff.jpg") + "\u2028é"
    images = UnreadableImages(tmp_path, None, 0.5)
    images.count(16, [(name, "broken"), (name, "broken")], is_main=True)
    again = UnreadableImages(tmp_path, None, 0.5)
    again.on_train_begin(None, TrainerState(global_step=3), None)
    assert list(again.images) == [name]
    images.on_save(None, TrainerState(), None)
    assert report(tmp_path)[name]["times"] == 2
