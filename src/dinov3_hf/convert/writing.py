"""Checkpoints written in every format, one tensor at a time."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov3_hf.convert.checkpoint import Checkpoint
from dinov3_hf.convert.file_format import Converted, FileFormat
from dinov3_hf.convert.formats import FORMATS, format_of
from dinov3_hf.convert.hub_folder import CONFIG_NAME, WEIGHTS_NAME, write_hub_folder
from dinov3_hf.convert.lazy_tensor import LazyTensor
from dinov3_hf.convert.safetensors_file import write_safetensors
from dinov3_hf.convert.staging import refuse_existing, writing
from dinov3_hf.convert.torch_file import write_torch_file
from dinov3_hf.errors import ArgumentError
from dinov3_hf.hub.model_card import license_of, write_model_card

HUB = "hf"
TORCH_SUFFIXES = (".pth", ".pt")
MAX_SHARD_SIZE = 5 * 10**9  # bytes

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Written:
    """
    What `write_checkpoint` wrote.

    Args:
        architecture: The name that the format has for the architecture, if any.
        num_tensors: written, extras and heads included.
        num_bytes: of these tensors.
        derived, dropped, differences: As in `Converted`; on the way from the Hub's names to the format.
    """

    architecture: str | None
    num_tensors: int
    num_bytes: int
    derived: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    differences: list[str] = field(default_factory=list)


def write_checkpoint(
    checkpoint: Checkpoint,
    target: str | Path,
    to: str,
    max_shard_size: int = MAX_SHARD_SIZE,
    progress: Progress = lambda num_bytes: None,
) -> Written:
    """
    Write a checkpoint in another format, or in its own. It gets its name when all of it is written and found finite.

    Args:
        checkpoint: Of `read_checkpoint`.
        target: New: a folder for `"hf"` and `"timm"`, a file `*.pth` or `*.pt` for `"native"`.
        to: `"hf"`, `"native"` or `"timm"`.
        max_shard_size: of a safetensors file of a Hub folder, in bytes.
        progress: is told the bytes of each tensor when it is read for writing.

    Raises:
        ArgumentError: `to` is no format, or `target` has not its suffix.
        FileExistsError: `target` is there already.
        ValueError: The format has no such network, or a weight is not finite.
        OSError: There is no room, or writing failed. Nothing is left of `target`.
    """
    target = Path(target)
    check_target(target, to)
    try:
        return _write(checkpoint, target, to, max_shard_size, progress)
    except ValueError as error:
        raise ValueError(f"{checkpoint.source}: {error}") from error


def check_target(target: Path, to: str) -> None:
    """
    Refuse what could not be written, before anything is read.

    Args:
        target, to: As `write_checkpoint` has them.

    Raises:
        ArgumentError: `to` is no format, or `target` has not its suffix.
        FileExistsError: `target` is there already.
    """
    known = (HUB, *dict.fromkeys(each.name for each in FORMATS))
    if to not in known:
        raise ArgumentError(f"format {to!r} is not known; use one of {', '.join(known)}.")
    is_file = any(each.config_to_json is None for each in FORMATS if each.name == to)
    if is_file and target.suffix not in TORCH_SUFFIXES:
        raise ArgumentError(f"{target} is to be a file of torch; give it the suffix {' or '.join(TORCH_SUFFIXES)}.")
    refuse_existing(target)


def _write(checkpoint: Checkpoint, target: Path, to: str, max_shard_size: int, progress: Progress) -> Written:
    file_format = None if to == HUB else format_of(to, checkpoint.config)
    converted = Converted(checkpoint.tensors) if file_format is None else _convert(checkpoint, file_format)

    def checked(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
        return {name: _checked(name, tensor, progress) for name, tensor in tensors.items()}

    tensors = checked(converted.tensors)
    beside = {**checkpoint.extras, **checkpoint.heads} if file_format is None else {}
    with_heads = file_format is not None and file_format.config_to_json is None
    everything = [*tensors.values(), *(checkpoint.heads.values() if with_heads else beside.values())]
    num_bytes = sum(tensor.num_bytes for tensor in everything)
    with writing(target, num_bytes) as staged:
        if file_format is None:
            heads, extras = checked(checkpoint.heads), checked(checkpoint.extras)
            write_hub_folder(staged, checkpoint.config, tensors, extras, heads, checkpoint.statistics, max_shard_size)
            write_model_card(
                staged,
                title=target.name,
                license=license_of(checkpoint.source.name),
                provenance=f"Converted from {checkpoint.source.name} ({checkpoint.format}).",
            )
        elif file_format.config_to_json is None:
            write_torch_file(_native_content(tensors, checked(checkpoint.heads)), staged)
        else:
            fields = file_format.config_to_json(checkpoint.config, converted.tensors, *checkpoint.statistics)
            staged.mkdir()
            (staged / CONFIG_NAME).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
            write_safetensors(tensors, staged / WEIGHTS_NAME)  # timm reads no shards
    return Written(
        architecture=None if file_format is None else file_format.architecture(checkpoint.config),
        num_tensors=len(everything),
        num_bytes=num_bytes,
        derived=converted.derived,
        dropped=converted.dropped,
        differences=converted.differences,
    )


def _convert(checkpoint: Checkpoint, file_format: FileFormat) -> Converted:
    """The tensors of another format than the Hub's; extras and heads that have no place in it are dropped."""
    others = tuple(f"{each.name}." for each in FORMATS if each.name != file_format.name)
    extras = {name: tensor for name, tensor in checkpoint.extras.items() if not name.startswith(others)}
    converted = file_format.from_hf(checkpoint.tensors | extras, checkpoint.config)
    for name in checkpoint.extras.keys() - extras.keys():
        converted.dropped[name] = f"serves the way back to {name.partition('.')[0]} only"
    if file_format.config_to_json is not None:
        converted.dropped.update(dict.fromkeys(checkpoint.heads, f"{file_format.name} keeps no heads"))
    return converted


def _native_content(tensors: Mapping[str, LazyTensor], heads: Mapping[str, LazyTensor]) -> Mapping[str, Any]:
    """A plain state dict; with heads the layout of a training checkpoint, which continued training reads."""
    if not heads:
        return tensors
    return {"teacher": {**{f"backbone.{name}": tensor for name, tensor in tensors.items()}, **heads}}


def _checked(name: str, tensor: LazyTensor, progress: Progress) -> LazyTensor:
    """The same tensor; reading it makes sure that it is what was announced, and finite."""

    def read() -> Tensor:
        values = tensor.read()
        if tuple(values.shape) != tensor.shape or values.dtype != tensor.dtype:
            raise ValueError(f"{name} is not of the shape and dtype that the file announces; copy the file again.")
        # The extremes of a tensor with NaN are NaN; no copy of a large tensor is made.
        if values.numel() > 0 and values.dtype.is_floating_point:
            extremes = torch.stack(torch.aminmax(values))
            if not bool(torch.isfinite(extremes).all()):
                raise ValueError(
                    f"{name} holds NaN or infinite weights; convert an earlier or an undamaged checkpoint."
                )
        progress(tensor.num_bytes)
        return values

    return LazyTensor(tensor.shape, tensor.dtype, read)
