"""What the commands that take a MODEL share. Imports torch; the commands import this module when they run."""

import torch
from transformers import BaseImageProcessor, PreTrainedModel
from transformers.utils import logging as transformers_logging

import dinov3_hf.auto  # noqa: F401  (registers our model types, which the command line leaves to those who need them)
from dinov3_hf.errors import ArgumentError
from dinov3_hf.evals.features import load_model


def open_model(source: str, device: str | None) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """The model and image processor of MODEL on `device`; `None` takes a GPU if there is one.

    Raises:
        ArgumentError: if torch knows no such device.
        FileNotFoundError: if there is no such model.
    """
    transformers_logging.disable_progress_bar()  # its "Loading weights" would stand between a command and its answer
    try:
        place = torch.device(device or default_device())
    except RuntimeError as error:
        raise ArgumentError(f"device {device!r} is none that torch knows; use cpu, cuda, cuda:1 or mps.") from error
    return load_model(source, place)


def default_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
