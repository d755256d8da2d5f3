"""Going on from a checkpoint: bitwise, from the newest complete one, and only with the recipe that wrote it."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from dinov3_hf.data.sources.spec import load_images
from dinov3_hf.models.dinov3_pretraining.modeling_dinov3_pretraining import DINOv3ForPreTraining
from dinov3_hf.training.checkpoints import MANIFEST, write_manifest
from dinov3_hf.training.resume import find_checkpoint, save_fingerprint
from dinov3_hf.training.ssl_config import SSLConfig
from dinov3_hf.training.ssl_trainer import SSLTrainer
from tests.testing_utils import saved_state, saved_weights
from tests.training.test_ssl_trainer import BACKBONE, HEAD, make_args, make_trainer

STATE = "state/rank-00000-of-00001.safetensors"  # of a run of one process
FINGERPRINT = {"images": 1442, "names": "digits"}


def log_of(trainer) -> list[dict[str, float]]:
    """Every number of every step that does not measure the machine."""
    machine = ("images_per_second", "data/wait_share", "memory/peak_gib")
    return [
        {name: value for name, value in entry.items() if name not in machine}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of a run of 6 steps with a checkpoint after every second."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    make_trainer(folder, save_strategy="steps", save_steps=2).train()
    return folder


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def args_of(run: Path, **changes) -> SSLConfig:
    return make_args(run, save_strategy="steps", save_steps=2, **changes)


def find(wanted: str, run: Path, **changes) -> str:
    return find_checkpoint(wanted, args_of(run, **changes), FINGERPRINT).name


@pytest.mark.parametrize("micro_batch", [16, 4])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_goes_on_bitwise(tmp_path, num_workers, micro_batch):
    options = {
        "dataloader_num_workers": num_workers,
        "per_device_train_batch_size": micro_batch,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    whole = make_trainer(tmp_path, **options)
    whole.train()
    shutil.copytree(tmp_path / "checkpoint-6", tmp_path / "whole-6")
    for step in (4, 6):
        shutil.rmtree(tmp_path / f"checkpoint-{step}")

    resumed = make_trainer(tmp_path, **options)
    resumed.train(resume_from_checkpoint="last")
    assert len(log_of(whole)) == 6
    assert log_of(resumed) == log_of(whole)
    assert not same_tensors(saved_weights(tmp_path / "checkpoint-2"), whole.model.state_dict())
    folders = [tmp_path / name for name in ("checkpoint-6", "whole-6")]
    for name in ("teacher/model.safetensors", "teacher/heads.safetensors"):
        ours, theirs = (load_file(folder / name) for folder in folders)
        assert same_tensors(ours, theirs), name
    ours, theirs = (saved_state(folder) for folder in folders)
    assert {name.partition("/")[0] for name in ours} == {"param", "exp_avg", "exp_avg_sq", "num_steps"}
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    ours, theirs = (torch.load(folder / "scheduler.pt", weights_only=True) for folder in folders)
    assert ours == theirs
    assert groups_of(resumed) == groups_of(whole)


def groups_of(trainer) -> list[dict]:
    """Settings of the optimizer's parameter groups."""
    return [{name: value for name, value in group.items() if name != "params"} for group in trainer.adamw.param_groups]


def same_tensors(ours, theirs) -> bool:
    return ours.keys() <= theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


class FirstDigits:
    """So few that every step begins a new epoch."""

    digits = load_images("digits", split="train")

    def __len__(self) -> int:
        return 10

    def image(self, i: int):
        return self.digits.image(i)


def test_goes_on_bitwise_across_epochs(tmp_path):
    def trainer():
        args = make_args(tmp_path, save_strategy="steps", save_steps=2)
        torch.manual_seed(args.seed)
        return SSLTrainer(DINOv3ForPreTraining(args.pretraining_config()), args, FirstDigits())

    whole = trainer()
    whole.train()
    for step in (4, 6):
        shutil.rmtree(tmp_path / f"checkpoint-{step}")
    resumed = trainer()
    resumed.train(resume_from_checkpoint=True)
    assert log_of(resumed) == log_of(whole)


def test_a_finished_run_takes_no_further_step(run):
    trainer = make_trainer(run, save_strategy="steps", save_steps=2)
    trainer.train(resume_from_checkpoint="last")
    assert trainer.state.global_step == 6
    assert same_tensors(saved_weights(run / "checkpoint-6"), trainer.model.state_dict())


def truncate(folder: Path) -> None:
    file = folder / STATE
    os.truncate(file, file.stat().st_size // 2)


def flip_a_bit(folder: Path) -> None:
    data = bytearray((folder / STATE).read_bytes())
    data[-1] ^= 1
    (folder / STATE).write_bytes(data)


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (truncate, rf"{STATE} has [\d,]+ bytes instead of"),
        (flip_a_bit, f"{STATE} has other contents than were written"),
        (lambda folder: (folder / STATE).unlink(), f"{STATE} is missing"),
        (lambda folder: (folder / "scheduler.pt").unlink(), "scheduler.pt is missing"),
        (lambda folder: (folder / MANIFEST).unlink(), "manifest.json is missing"),
        (empty, "manifest.json is missing"),
    ],
)
def test_an_incomplete_checkpoint_is_named_and_passed_over(run, caplog, damage, says):
    damage(run / "checkpoint-6")
    assert find("last", run) == "checkpoint-4"
    assert len(caplog.records) == 1
    assert caplog.messages[0].startswith("Ignored as incomplete: checkpoint-6 (")
    assert caplog.messages[0].endswith("); going on from checkpoint-4.")
    with pytest.raises(ValueError, match=rf"checkpoint-6 is no complete checkpoint: {says}.*; name another"):
        find(str(run / "checkpoint-6"), run)
    assert find(str(run / "checkpoint-2"), run) == "checkpoint-2"


def test_several_incomplete_checkpoints_are_named_in_one_line(run, caplog):
    for step in (4, 6):
        truncate(run / f"checkpoint-{step}")
    assert find("last", run) == "checkpoint-2"
    assert len(caplog.records) == 1
    assert "checkpoint-6 (state/" in caplog.messages[0]
    assert "checkpoint-4 (state/" in caplog.messages[0]
    truncate(run / "checkpoint-2")
    with pytest.raises(FileNotFoundError, match=r"no complete checkpoint: checkpoint-6 \(.*checkpoint-2 \(.*afresh"):
        find("last", run)


def test_nothing_to_go_on_from(run, tmp_path):
    assert find_checkpoint(None, args_of(run), FINGERPRINT) is None
    with pytest.raises(FileNotFoundError, match="no checkpoint to resume from"):
        find("last", tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        find(str(tmp_path / "elsewhere"), run)
    with pytest.raises(ValueError, match=r"teacher is no complete checkpoint: manifest.json is missing"):
        find(str(run / "checkpoint-6" / "teacher"), run)


def test_starting_afresh_beside_checkpoints_is_said(run, caplog):
    make_trainer(run, max_steps=1).train()
    assert [text for text in caplog.messages if "holds checkpoint-6 of an earlier run" in text]


def test_another_recipe_is_refused_with_every_difference(run):
    changes = {
        "backbone": {**BACKBONE, "hidden_size": 64},
        "dino_head": {**HEAD, "hidden_dim": 64},
        "lr_schedule": {"peak": 1e-3, "end": 1e-4},
        "mask_ratio": [0.1, 0.6],
        "max_steps": 8,
        "seed": 43,
    }
    with pytest.raises(ValueError, match="is a checkpoint of another recipe") as refusal:
        find("last", run, **changes)
    message = str(refusal.value)
    for difference in (
        "backbone.hidden_size is 32 there and 64 here",
        "dino_head.hidden_dim is 32 there and 64 here",
        "lr_schedule is 0.001 there and {",
        "mask_ratio is [0.1, 0.5] there and [0.1, 0.6] here",
        "max_steps is 6 there and 8 here",
        "seed is 42 there and 43 here",
    ):
        assert difference in message
    assert message.count(" there and ") == 6
    assert "\n" not in message


def test_only_what_changes_the_result_counts(run):
    moved = run.rename(run.with_name("moved"))
    changes = {
        "save_steps": 3,
        "save_total_limit": 1,
        "logging_steps": 5,
        "eval_data": None,
        "per_device_train_batch_size": 8,
        "dataloader_num_workers": 2,
        "precision": "fp32",
        "gradient_checkpointing": True,
        # the same in other words
        "dino_head": {"bottleneck_dim": 16, **HEAD, "mlp_bias": True},
        "lr_schedule": {"start": 1e-3, "peak": 1e-3},
        "image_mean": (0.485, 0.456, 0.406),
    }
    args = make_args(moved, **{"save_strategy": "steps", **changes})
    assert find_checkpoint("last", args, FINGERPRINT).name == "checkpoint-6"


def rewrite_recipe(folder: Path, change) -> None:
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    change(recipe)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    write_manifest(folder, step=6)


def test_a_field_that_the_checkpoint_does_not_know_has_its_default(run):
    rewrite_recipe(run / "checkpoint-6", lambda recipe: recipe.pop("mask_circular_shift"))
    assert find("last", run) == "checkpoint-6"
    with pytest.raises(ValueError, match="mask_circular_shift is False there and True here"):
        find("last", run, mask_circular_shift=True)


def test_the_same_images_in_another_place(run):
    folder = run / "checkpoint-6"
    rewrite_recipe(folder, lambda recipe: recipe.update(train_data="elsewhere/photos"))
    assert find_checkpoint("last", args_of(run), FINGERPRINT) == folder
    with pytest.raises(ValueError, match=r"train_data.images is 1442 there and 1443 here"):
        find_checkpoint("last", args_of(run), {**FINGERPRINT, "images": 1443})
    (folder / "train_data.json").unlink()
    write_manifest(folder, step=6)
    with pytest.raises(ValueError, match="train_data is 'elsewhere/photos' there and 'digits' here"):
        find_checkpoint("last", args_of(run), FINGERPRINT)


def test_other_images_in_the_same_place(run):
    with pytest.raises(ValueError, match=r"train_data.names is 'digits' there and 'other' here"):
        find_checkpoint("last", args_of(run), {**FINGERPRINT, "names": "other"})


def test_other_weights_of_a_mixture(run):
    parts = [{"images": 3, "weight": 1.0}, {"images": 4, "weight": 0.5}]
    save_fingerprint(run / "checkpoint-6", {"sources": parts})
    write_manifest(run / "checkpoint-6", step=6)
    assert find_checkpoint("last", args_of(run), {"sources": parts}).name == "checkpoint-6"
    changed = [parts[0], {"images": 4, "weight": 0.25}]
    with pytest.raises(ValueError, match=r"recipe: train_data.sources.1.weight is 0.5 there and 0.25 here; resume"):
        find_checkpoint("last", args_of(run), {"sources": changed})
    with pytest.raises(ValueError, match=r"recipe: train_data.sources is \[.*\] there and \[.*\] here; resume"):
        find_checkpoint("last", args_of(run), {"sources": parts[:1]})


def test_the_present_recipe_says_how_often_to_save(run):
    for step in (4, 6):
        shutil.rmtree(run / f"checkpoint-{step}")
    trainer = make_trainer(run, save_strategy="steps", save_steps=3, logging_steps=2)
    trainer.train(resume_from_checkpoint="last")
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3", "checkpoint-6"]
    assert [entry["step"] for entry in log_of(trainer)] == [1, 2, 4, 6]


class Evil:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("name", ["scheduler.pt", "rng_state.pth"])
def test_nothing_in_a_checkpoint_is_unpickled(run, tmp_path, name):
    marker = tmp_path / "code-was-run"
    shutil.rmtree(run / "checkpoint-6")
    folder = run / "checkpoint-4"
    torch.save({"state": Evil(marker)}, folder / name)
    write_manifest(folder, step=4)
    trainer = make_trainer(run, save_strategy="steps", save_steps=2)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        trainer.train(resume_from_checkpoint="last")
    assert not marker.exists()
    torch.load(folder / name, weights_only=False)  # the file would run it
    assert marker.exists()


def test_a_checkpoint_holds_no_pickled_arguments(run):
    manifest = json.loads((run / "checkpoint-6" / MANIFEST).read_text())
    pickles = {name for name in manifest["files"] if Path(name).suffix in (".pt", ".pth", ".bin", ".pkl")}
    assert pickles == {"scheduler.pt", "rng_state.pth"}
    for name in pickles:
        path = run / "checkpoint-6" / name
        if name != "rng_state.pth":  # numpy's state: read with the allow-list of the Trainer
            torch.load(path, weights_only=True)


def test_a_checkpoint_without_pieces_gives_one_line(run):
    """As earlier versions wrote them."""
    folder = run / "checkpoint-6"
    save_file(saved_weights(folder), folder / "model.safetensors")
    shutil.rmtree(folder / "state")
    torch.save({}, folder / "optimizer.pt")
    write_manifest(folder, step=6)
    trainer = make_trainer(run, save_strategy="steps", save_steps=2)
    with pytest.raises(FileNotFoundError, match=r"checkpoint-6/state holds no training state .*another") as refused:
        trainer.train(resume_from_checkpoint="last")
    assert "\n" not in str(refused.value)
