"""Distillation on several processes, in turn and with ranks for each student: the steps of one process."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.scripts.distillations import (
    STUDENTS,
    assert_same_losses,
    distil,
    distillation_runner,
    pretrained_teacher,
    split,
)

# `make test-engines` and CI run them.
pytestmark = [pytest.mark.slow, pytest.mark.invariant]

ONE_ONE_TWO = split(vit=1, convnext=1, gated=2)  # not in the order of the recipe


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


@pytest.fixture(scope="module")
def grouped(runner, tmp_path_factory) -> Path:
    """A run of four processes in three groups."""
    return distil(runner, tmp_path_factory.mktemp("grouped") / "run", 4, *ONE_ONE_TWO)


def test_groups_of_ranks_take_the_steps_of_one_process(one, grouped):
    assert_same_losses(grouped, one)


def test_the_students_of_groups_are_those_of_one_process(one, grouped):
    for name in STUDENTS:
        for file in ("model.safetensors", "heads.safetensors"):
            ours, theirs = load_file(grouped / name / file), load_file(one / name / file)
            assert ours.keys() == theirs.keys()
            for key, tensor in ours.items():
                torch.testing.assert_close(tensor, theirs[key], rtol=1e-4, atol=1e-5, msg=f"{name} {key}")


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_turns_on_two_ranks_are_the_steps_of_one_process(runner, one, tmp_path, engine):
    assert_same_losses(distil(runner, tmp_path / "run", 2, "--engine", engine), one)


def test_groups_that_shard_their_student_take_the_steps_of_one_process(runner, one, tmp_path):
    assert_same_losses(distil(runner, tmp_path / "run", 4, *ONE_ONE_TWO, "--engine", "fsdp2"), one)


def test_accumulation_in_groups_is_one_batch(runner, tmp_path):
    """Groups of one rank have four micro-batches, the group of two has two a rank."""
    words = ("--per_device_train_batch_size", 2, "--koleo_group_size", 2, "--drop_path_group_size", 2)
    one = distil(runner, tmp_path / "one", 1, *words[2:])
    assert_same_losses(distil(runner, tmp_path / "groups", 4, *ONE_ONE_TWO, *words), one)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_what_groups_have_saved_goes_on_in_turn(runner, one, grouped, tmp_path, num_ranks):
    shutil.copytree(grouped / "checkpoint-3", tmp_path / "run" / "checkpoint-3")
    assert_same_losses(distil(runner, tmp_path / "run", num_ranks), one)


def test_what_was_saved_in_turn_goes_on_in_groups(runner, one, grouped, tmp_path):
    shutil.copytree(one / "checkpoint-3", tmp_path / "run" / "checkpoint-3")
    assert_same_losses(distil(runner, tmp_path / "run", 4, *ONE_ONE_TWO), one)


def test_features_and_gram_in_groups(runner, teacher, tmp_path):
    """Patches of the teacher travel too."""
    words = (
        "--objective",
        "features",
        "--koleo_weight",
        0,
        "--gram_teacher",
        "teacher",
        "--gram_weight_schedule",
        1.0,
    )
    one, groups = distil(runner, tmp_path / "one", 1, *words), tmp_path / "groups"
    assert_same_losses(distil(runner, groups, 4, *ONE_ONE_TWO, *words), one)
