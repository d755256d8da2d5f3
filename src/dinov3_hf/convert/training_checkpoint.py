"""What stands around a backbone in a file: branches (teacher, student, ...), wrappers, heads, and all the rest."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dinov3_hf.convert.lazy_tensor import LazyTensor

# The network that a run is for comes first. In distillation that is the EMA of the student, as the teacher is fixed.
BRANCHES = ("model_ema", "teacher", "model", "student", "gram_teacher")
HEADS = ("dino_head", "ibot_head")
# Put around modules by DistributedDataParallel, torch.compile, FSDP and activation checkpointing.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_BRANCH = re.compile(rf"({'|'.join(BRANCHES)}|student\d+|state_dict)\.(.+)", re.DOTALL)


@dataclass
class Branch:
    """One network of a file, without prefixes, and the names of its tensors in the file."""

    full_names: list[str] = field(default_factory=list)
    backbone: dict[str, LazyTensor] = field(default_factory=dict)
    heads: dict[str, LazyTensor] = field(default_factory=dict)


@dataclass
class TrainingCheckpoint:
    """
    A file taken apart.

    Args:
        branches: Name -> network; a file of one network without a prefix has the branch "model".
        dropped: Name in the file -> why it belongs to no network.
    """

    branches: dict[str, Branch] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)


def take_apart(source: Path, content: Mapping[str, LazyTensor | None]) -> TrainingCheckpoint:
    """
    Sort the entries of a file by branch.

    Args:
        source: Where they come from, for messages.
        content: Full name -> tensor, `None` for what is no tensor.

    Raises:
        ValueError: Two entries have one name when wrappers are taken off.
    """
    checkpoint = TrainingCheckpoint()
    for full_name, tensor in content.items():
        branch_name, name = _branch_of(_WRAPPERS.sub("", full_name))
        head = name.partition(".")[0]
        if tensor is None:
            checkpoint.dropped[full_name] = "no tensor"
        elif head == "optimizer" or full_name.startswith("optimizer."):
            checkpoint.dropped[full_name] = "state of the optimizer"
        elif name in ("dino_loss.center", "ibot_patch_loss.center"):
            checkpoint.dropped[full_name] = "of a loss, unused"
        else:
            branch = checkpoint.branches.setdefault(branch_name, Branch())
            tensors, key = (branch.heads, name) if head in HEADS else (branch.backbone, name.removeprefix("backbone."))
            if key in tensors:
                raise ValueError(
                    f"{source}: {full_name} and another entry are both {key} of the {branch_name}; remove one."
                )
            tensors[key] = tensor
            branch.full_names.append(full_name)
    return checkpoint


def _branch_of(name: str) -> tuple[str, str]:
    """Branch and name within it: `model.teacher.backbone.norm.bias` -> teacher, `backbone.norm.bias`."""
    branch = "model"
    while (match := _BRANCH.fullmatch(name)) is not None:
        name = match[2]
        if match[1] not in ("model", "state_dict"):
            branch = match[1]
    return branch, name
