"""Which checkpoint a run continues from, and whether it belongs to the run."""

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dinov3_hf.recipes.pages import read_recipe
from dinov3_hf.training.checkpoints import checkpoints, problem
from dinov3_hf.training.recipe_config import RecipeConfig

logger = logging.getLogger(__name__)

LAST, AUTO = "last", "auto"
MAX_NAMED = 6  # differences of two recipes
RECIPE = "recipe.yaml"
DATA = "train_data.json"
# What they gave is in every checkpoint: a run goes on when the folder has moved or is gone.
READ_AT_THE_START = ("start_from", "start_with")


def starts_afresh(wanted: str | None, output_dir: Path) -> bool:
    """Whether a run with this `resume_from_checkpoint` begins at step 0."""
    return wanted is None or (wanted == AUTO and not checkpoints(output_dir))


def find_checkpoint(wanted: str | None, args: RecipeConfig, fingerprint: Mapping[str, Any]) -> Path | None:
    """
    Resolve `--resume_from_checkpoint`.

    Args:
        wanted: None to start afresh, "last" for the newest complete checkpoint of the run, "auto" for that or a fresh
            start if there is none, or a checkpoint folder.
        args: of the run.
        fingerprint: of the images to be trained on, plain values.

    Returns:
        The checkpoint folder, or None. Incomplete checkpoints that are passed over are named in a warning.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: it is incomplete, or belongs to another recipe or other images.
    """
    if wanted is None:
        return None
    output_dir = Path(args.output_dir or ".")
    if wanted == LAST:
        folder = newest_checkpoint(output_dir)
    elif wanted == AUTO:
        try:
            folder = newest_checkpoint(output_dir, remedy="starting afresh")
        except FileNotFoundError as error:
            if checkpoints(output_dir):
                logger.warning(error)
            return None
    else:
        folder = complete_checkpoint(Path(wanted))
    _check_recipe(folder, args, fingerprint)
    return folder


def save_fingerprint(folder: Path, fingerprint: Mapping[str, Any]) -> None:
    """Write down in a checkpoint which images it was trained on."""
    (folder / DATA).write_text(json.dumps(fingerprint, indent=1), encoding="utf-8")


class IntervalsOfThisRun(TrainerCallback):
    """Logs, evaluates and saves as often as the present recipe says; the Trainer would go on as the checkpoint did."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        state.compute_steps(args, state.max_steps)


def newest_checkpoint(
    output_dir: Path,
    purpose: str = "resume from",
    remedy: str = "leave out --resume_from_checkpoint to start afresh",
) -> Path:
    """
    The newest complete checkpoint of a run; incomplete ones that are passed over are named in a warning.

    Args:
        output_dir: of the run.
        purpose: what it is for, in messages.
        remedy: what to do where there is none.

    Raises:
        FileNotFoundError: there is none.
    """
    incomplete: list[str] = []
    for folder in reversed(checkpoints(output_dir)):
        why = problem(folder, checksums=True)
        if why is None:
            if incomplete:
                logger.warning("Ignored as incomplete: %s; going on from %s.", ", ".join(incomplete), folder.name)
            return folder
        incomplete.append(f"{folder.name} ({why})")
    if incomplete:
        raise FileNotFoundError(f"{output_dir} holds no complete checkpoint: {', '.join(incomplete)}; {remedy}.")
    raise FileNotFoundError(f"{output_dir} holds no checkpoint to {purpose}; {remedy}.")


def complete_checkpoint(folder: Path) -> Path:
    """
    `folder`, if it is a complete checkpoint.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is incomplete.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is no checkpoint: there is no such folder; name a checkpoint-N, last or auto."
        )
    why = problem(folder, checksums=True)
    if why is not None:
        raise ValueError(f"{folder} is no complete checkpoint: {why}; name another checkpoint-N, last or auto.")
    return folder


def _check_recipe(folder: Path, args: RecipeConfig, fingerprint: Mapping[str, Any]) -> None:
    saved, current = (args.result_fields(recipe) for recipe in (read_recipe(str(folder / RECIPE)), args.recipe()))
    data_file = folder / DATA
    if data_file.is_file():  # images, wherever they lie now
        saved["train_data"] = json.loads(data_file.read_text(encoding="utf-8"))
        current["train_data"] = fingerprint
    for name in READ_AT_THE_START:
        saved.pop(name, None)
        current.pop(name, None)
    differences = [
        f"{name} is {_short(there)} there and {_short(here)} here"
        for name, there, here in _differences(saved, current)
    ]
    changes = ", ".join(differences[:MAX_NAMED])
    if len(differences) > MAX_NAMED:
        changes += f", and {len(differences) - MAX_NAMED} more"
    if changes:
        raise ValueError(
            f"{folder} is a checkpoint of another recipe: {changes}; resume with the recipe that wrote it "
            f"({folder / RECIPE}), or start in another output_dir."
        )


def _differences(saved: Any, current: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Entries (dotted name, saved value, current value) in which two nested mappings differ."""
    if _are_mappings(saved) and _are_mappings(current) and len(saved) == len(current):
        saved, current = dict(enumerate(saved)), dict(enumerate(current))
    if isinstance(saved, Mapping) and isinstance(current, Mapping):
        for key in {**saved, **current}:
            yield from _differences(saved.get(key), current.get(key), f"{name}.{key}" if name else key)
    elif saved != current:
        yield name, saved, current


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:100]}..."


def _are_mappings(values: Any) -> bool:
    return isinstance(values, list) and bool(values) and all(isinstance(value, Mapping) for value in values)
