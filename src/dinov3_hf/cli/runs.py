"""What training runs have written, finished or not: the teachers of their checkpoints, the log of their evaluations.

Letters: N steps at which something was measured; R runs that are shown as one.
"""

import filecmp
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dinov3_hf.errors import ArgumentError
from dinov3_hf.training.checkpoints import checkpoints, problem, step_of

STATE = "trainer_state.json"


@dataclass(frozen=True)
class Teacher:
    """A teacher as it was after `step` optimizer steps, in the model folder `folder`."""

    step: int
    folder: Path


@dataclass(frozen=True)
class Curves:
    """The evaluations of a run, or of several that differ in their seed.

    Attributes:
        name: of the run or runs.
        folders: of the R runs.
        numbers: by metric, the steps int64 (N,) at which each of the runs has it, and the values float64 (R, N).
    """

    name: str
    folders: tuple[Path, ...]
    numbers: dict[str, tuple[np.ndarray, np.ndarray]]


def is_run(source: str) -> bool:
    """Whether `source` is the output folder of a run with checkpoints, complete or not."""
    return bool(checkpoints(Path(source)))


def teachers_of_run(run: Path) -> tuple[list[Teacher], list[str]]:
    """The teachers of a run in the order of their steps, and of each incomplete checkpoint what is wrong with it.

    The one that a finished run has in `run`/teacher is among them unless it is that of a checkpoint.

    Raises:
        FileNotFoundError: there is no complete checkpoint.
    """
    found: dict[int, Teacher] = {}
    incomplete = []
    for checkpoint in checkpoints(run):
        if (reason := problem(checkpoint)) is None:
            found[step_of(checkpoint)] = Teacher(step_of(checkpoint), checkpoint / "teacher")
        else:
            incomplete.append(f"{checkpoint} is left out: {reason}")
    if not found:
        raise FileNotFoundError(f"{run} has no complete checkpoint ({incomplete[0]}); wait for one, or name a model.")
    final = run / "teacher"
    # A run that has done harm leaves the teacher of its best checkpoint there.
    is_other = not any(_same_weights(final, teacher.folder) for teacher in found.values())
    if final.is_dir() and (run / STATE).is_file() and is_other:
        step = read_state(run / STATE)["global_step"]
        found.setdefault(step, Teacher(step, final))
    return [found[step] for step in sorted(found)], incomplete


def _same_weights(one: Path, other: Path) -> bool:
    first = min(one.glob("model*.safetensors"), default=one / "model.safetensors")
    files = (first, other / first.name)
    return all(file.is_file() for file in files) and filecmp.cmp(*files)  # ends at the first difference


def spread(teachers: Sequence[Teacher], limit: int) -> list[Teacher]:
    """At most `limit` of `teachers`, the last one and others evenly before it."""
    count = min(limit, len(teachers))
    places = np.linspace(0, len(teachers) - 1, count) if count > 1 else np.array([len(teachers) - 1])
    return [teachers[int(place)] for place in places.round()]


def read_state(path: Path) -> dict[str, Any]:
    """`global_step` and `log_history` of a trainer_state.json.

    Raises:
        ValueError: it is damaged.
    """
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        return {"global_step": int(state["global_step"]), "log_history": list(state["log_history"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged; name a checkpoint-N of the run instead.") from error


def newest_log(run: Path) -> list[dict[str, float]]:
    """The log of a run, as far as it has come: of the folder itself or of its newest checkpoint.

    Raises:
        FileNotFoundError: there is no log.
        ValueError: it is damaged.
    """
    whole = [checkpoint for checkpoint in checkpoints(run) if problem(checkpoint) is None]
    files = [path for path in (run / STATE, *(folder / STATE for folder in whole[-1:])) if path.is_file()]
    if not files:
        known = "it has no checkpoint yet" if run.is_dir() else "there is no such folder"
        raise FileNotFoundError(f"{run} has no {STATE} ({known}); name the output folder of a run.")
    newest = max((read_state(path) for path in files), key=lambda state: state["global_step"])
    log: list[dict[str, float]] = newest["log_history"]
    return log


def read_curves(sources: Sequence[str], metrics: Sequence[str]) -> list[Curves]:
    """The evaluations of runs.

    Args:
        sources: FOLDER or NAME=FOLDER; runs with the same NAME become one entry.
        metrics: to look for.

    Raises:
        FileNotFoundError: a run has no log.
        ValueError: a run has none of the metrics, or runs of one name have none in common.
        ArgumentError: a name without a folder.
    """
    found = []
    for name, folders in _named(sources).items():
        logs = [_by_metric(newest_log(folder), metrics) for folder in folders]
        for folder, log in zip(folders, logs, strict=True):
            if not log:
                raise ValueError(f"{folder} has no evaluations in its log yet; train it with eval_strategy: steps.")
        numbers = {}
        for metric in metrics:
            steps = sorted(set.intersection(*(set(log.get(metric, ())) for log in logs)))
            if steps:
                numbers[metric] = (np.array(steps), np.array([[log[metric][step] for step in steps] for log in logs]))
        if not numbers:
            raise ValueError(f"the runs called {name} were not evaluated at the same steps; give each its own name.")
        found.append(Curves(name, tuple(folders), numbers))
    return found


def _by_metric(log: Sequence[dict[str, float]], metrics: Sequence[str]) -> dict[str, dict[int, float]]:
    """Metric -> step -> value, of the metrics that were logged."""
    values = {metric: {int(entry["step"]): entry[metric] for entry in log if metric in entry} for metric in metrics}
    return {metric: course for metric, course in values.items() if course}


def _named(sources: Sequence[str]) -> dict[str, list[Path]]:
    """Name -> folders. Without a name of its own, a run is called as the end of its path that tells it from others."""
    given = [_name_and_folder(source) for source in sources]
    paths = {folder: folder.resolve().parts for name, folder in given if name is None}
    depth = 1
    while len({parts[-depth:] for parts in paths.values()}) < len(set(paths.values())):
        depth += 1
    named: dict[str, list[Path]] = {}
    for name, folder in given:
        named.setdefault(name or "/".join(paths[folder][-depth:]), []).append(folder)
    return named


def _name_and_folder(source: str) -> tuple[str | None, Path]:
    name, separator, folder = source.partition("=")
    if not separator or Path(source).exists():
        return None, Path(source)
    if not name or not folder:
        raise ArgumentError(f"{source} lacks a name or a folder; write NAME=FOLDER.")
    return name, Path(folder)
