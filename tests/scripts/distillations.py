"""A small distillation on the digits: the teacher of a short pre-training, students of three kinds."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.scripts.runs import Ranks, Runner
from tests.scripts.test_pretrain import RECIPE as PRETRAINING
from tests.training.test_distillation_trainer import STUDENTS

STEPS = 6
# Whatever could depend on the rank is on: stochastic depth, RoPE augmentation, KoLeo groups over the whole batch.
RECIPE: dict[str, Any] = {
    "train_data": "digits",
    "eval_data": None,
    "students": STUDENTS,
    "global_crop_size": 32,
    "local_crop_size": 32,
    "num_local_crops": 2,
    "global_batch_size": 8,
    "koleo_group_size": 8,
    "drop_path_group_size": 4,
    "max_steps": STEPS,
    "save_strategy": "steps",
    "save_steps": 3,
    "lr_schedule": {"start": 0.0, "peak": 5e-4, "end": 1e-5, "warmup_steps": 2},
    "teacher_momentum_schedule": 0.9,
    "logging_steps": 1,
    "precision": "fp32",
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
}


def pretrained_teacher(forks, folder: Path) -> Path:
    """`folder`/run/teacher, as pre-training leaves it: with its heads."""
    Runner(forks, folder, PRETRAINING).finish(folder / "run", "--max_steps", 2)
    return folder / "run" / "teacher"


def distillation_runner(forks, folder: Path, teacher: Path, *students: str) -> Runner:
    """Of runs of some students, or of all."""
    chosen = {name: STUDENTS[name] for name in students or STUDENTS}
    return Runner(forks, folder, json.dumps({**RECIPE, "students": chosen, "teacher": str(teacher)}))


def distil(runner: Runner, run: Path, num_ranks: int, *arguments: object) -> Path:
    """The folder of a run that comes to its end."""
    ranks = Ranks(runner, run, num_ranks, *arguments, script="distill.py")
    assert ranks.wait() == [0] * num_ranks, ranks.said()
    return run


def split(**ranks: int) -> tuple[str, str]:
    return "--student_ranks", json.dumps(ranks)


def losses(run: Path, *students: str) -> list[dict[str, float]]:
    """Every term of the loss of students, by step."""
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    entries = [entry for entry in history if "loss" in entry]
    prefixes = tuple(f"{name}/loss" for name in students)
    return [{name: value for name, value in entry.items() if name.startswith(prefixes)} for entry in entries]


def assert_same_losses(run: Path, expected: Path, *students: str) -> None:
    """Of all students, or of those that both runs have."""
    names = students or tuple(STUDENTS)
    found, wanted = losses(run, *names), losses(expected, *names)
    assert len(found) == len(wanted) == STEPS
    assert all(f"{name}/loss" in found[0] for name in names)
    for step, (ours, theirs) in enumerate(zip(found, wanted, strict=True), 1):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6), f"step {step}"  # KoLeo comes near zero
