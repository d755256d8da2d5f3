"""Which folder is meant, whether it is a whole model, and which of its files go to the Hub."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import AutoModel
from transformers.utils import logging as transformers_logging

from dinov3_hf.hub.architecture import WEIGHTS, open_safetensors, read_architecture

CONFIG = "config.json"
TEACHER = "teacher"
# What is uploaded, by suffix: weights, configurations, texts, the code of model types of our own, pictures of a card.
# Pickles (.bin, .pt, .pth, .pkl) are not: they run code when they are opened, and hold the state of a training run.
PUBLISHED_SUFFIXES = (".safetensors", ".json", ".md", ".txt", ".py", ".png", ".jpg", ".jpeg", ".gif", ".webp", ".svg")
PUBLISHED_NAMES = ("LICENSE", "NOTICE")
# State of a training run that has such a suffix nevertheless.
_STATE = ("trainer_state.json", "train_data.json", "manifest.json")
# Only checkpoints have one of these.
_CHECKPOINT_MARKS = ("optimizer.pt", "scheduler.pt", "trainer_state.json")


def find_model_folder(folder: Path) -> Path:
    """
    The model folder that is meant by `folder`: itself, or `teacher/` in the output folder of a run.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is a checkpoint, whose training state is not for publishing.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder; name one that has a {CONFIG}.")
    teacher = folder / TEACHER
    if (teacher / CONFIG).is_file():
        if folder.resolve().name.startswith("checkpoint-"):
            raise ValueError(f"{folder} is a checkpoint with the state of a training run; push its model, {teacher}.")
        return teacher
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder} has no {CONFIG}; name a folder written by save_pretrained.")
    for name in _CHECKPOINT_MARKS:
        if (folder / name).exists():
            raise ValueError(
                f"{folder} holds {name}, the state of a training run; save the model alone with save_pretrained."
            )
    return folder


def check_model_folder(folder: Path) -> None:
    """
    Check that a model opens in full, from the headers of its files: no weights are read.

    Raises:
        FileNotFoundError: there are no weights in safetensors.
        ValueError: a file is damaged, the weights do not fit the configuration, or it is no DINOv3 backbone.
    """
    read_architecture(folder)
    weights = sorted(folder.glob(WEIGHTS))
    if not weights:
        raise FileNotFoundError(f"{folder} has no weights in model.safetensors; save the model with save_pretrained.")
    for path in folder.glob("*.safetensors"):
        with open_safetensors(path):
            pass
    with _quiet_transformers():  # its table of missing names, of which we name the first, and its progress bar
        _, found = AutoModel.from_pretrained(
            folder, device_map="meta", output_loading_info=True, ignore_mismatched_sizes=True
        )
    for kind, names in (
        ("lack", found["missing_keys"]),
        ("have another shape than config.json says in", {name for name, *_ in found["mismatched_keys"]}),
        ("have besides what config.json describes", found["unexpected_keys"]),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"the weights in {folder} {kind} {min(names)}{more}; save the model again.")


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    verbosity, has_bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if has_bars:
            transformers_logging.enable_progress_bar()


def files_to_push(folder: Path) -> tuple[list[Path], list[Path]]:
    """
    The files of a model folder that go up, and what stays: sub-folders, hidden files, pickles, training state.

    Args:
        folder: a model folder.
    """
    entries = sorted(path for path in folder.iterdir())
    chosen = [
        path
        for path in entries
        if path.is_file()
        and not path.name.startswith(".")
        and (path.suffix.lower() in PUBLISHED_SUFFIXES or path.name in PUBLISHED_NAMES)
        and path.name not in _STATE
    ]
    return chosen, [path for path in entries if path not in chosen]
