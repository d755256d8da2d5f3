"""The fixed teacher of a distillation, from any source.

Letters: I crops, C channels, H and W pixels, D width of the teacher.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.constants import HF_HUB_OFFLINE
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from torch import Tensor, nn
from transformers import PreTrainedModel

from dinov3_hf.errors import ArgumentError
from dinov3_hf.hub.architecture import open_safetensors
from dinov3_hf.models.dinov3_pretraining.backbones import BACKBONES
from dinov3_hf.models.dinov3_pretraining.prototype_head import PrototypeHead
from dinov3_hf.models.image_channels import ChannelStatistics
from dinov3_hf.training.memory import blocks_of, set_forwards
from dinov3_hf.training.model_source import locate_model, read_statistics
from dinov3_hf.training.teacher_folder import HEADS_FILE, read_head_shapes
from dinov3_hf.training.teacher_networks import TeacherNetwork, TeacherTokens, read_network


@dataclass(frozen=True)
class TeacherDescription(TeacherNetwork):
    """
    A teacher, looked at; no weights are read yet.

    Args:
        statistics: what pixel values in [0, 1] are normalised with for it.
        heads: `dino_head` and `ibot_head` -> arguments of [`PrototypeHead`] beside `in_dim`; empty where there is no
            `heads.safetensors`.
    """

    statistics: ChannelStatistics
    heads: dict[str, dict[str, Any]]


class DistillationTeacher(nn.Module):
    """
    A teacher that never changes: no parameter asks for a gradient, and it stays in evaluation mode.

    Args:
        description: of `read_teacher`.
        backbone: with its weights.
        dino_head, ibot_head: with their weights, of a teacher that has them.
    """

    def __init__(
        self,
        description: TeacherDescription,
        backbone: PreTrainedModel,
        dino_head: PrototypeHead | None = None,
        ibot_head: PrototypeHead | None = None,
    ) -> None:
        super().__init__()
        self.description = description
        self.backbone = backbone
        self.dino_head = dino_head
        self.ibot_head = ibot_head
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode, in which there are no random draws."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, crops: Tensor) -> TeacherTokens:
        """
        CLS and patches, in the dtype of the weights, whatever autocast says.

        Args:
            crops: (I, C, H, W), normalised with `description.statistics`, of sides that `check_crop` accepts.
        """
        with torch.autocast(crops.device.type, enabled=False):
            return self.description.tokens(self.backbone, crops.to(self.backbone.dtype))

    def blocks(self) -> list[nn.Module]:
        """Blocks of the backbone that can be sharded one at a time; none of families that are not this package's."""
        return list(blocks_of(self.backbone))


def load_teacher(
    description: TeacherDescription, *, bf16: bool, attn_implementation: str = "sdpa", compiled: bool = False
) -> DistillationTeacher:
    """
    Read the weights of a teacher, backbone and heads, on the CPU.

    Args:
        description: of `read_teacher`.
        bf16: keep the weights, and compute, in bfloat16; otherwise in float32.
        attn_implementation: of a ViT of transformers; timm chooses by itself.
        compiled: by `torch.compile`, this package's backbones block by block, others as a whole.

    Raises:
        FileNotFoundError: there are no weights in safetensors.
        ValueError: they cannot be read, or are not those that the configuration asks for.
    """
    dtype = torch.bfloat16 if bf16 else torch.float32
    backbone = description.load(dtype, attn_implementation)
    teacher = DistillationTeacher(description, backbone, **_load_heads(description, dtype))
    if compiled and description.model_type in BACKBONES:
        set_forwards(backbone, "none", compiled)
    elif compiled:
        backbone.compile()
    return teacher


@lru_cache(maxsize=8)
def read_teacher(source: str | None) -> TeacherDescription:
    """
    Look at a teacher without reading its weights.

    Args:
        source: a model folder, with prototype heads (`heads.safetensors`) or without; the output folder of a run or a
            checkpoint-N, for its teacher; or OWNER/NAME on the Hub. A DINOv3 ViT or ConvNeXt, one of timm or of the
            families of transformers in `teacher_networks`.

    Raises:
        ArgumentError: None was given.
        FileNotFoundError: there is no such model, or it lacks weights in safetensors or an image processor.
        ValueError: it is a file, of another family, or damaged; heads or image statistics do not fit it.
    """
    if source is None:
        raise ArgumentError("teacher is not set; name the model to distil, for example --teacher OWNER/NAME.")
    located = locate_model(source, "teacher")
    network = read_network(located)
    statistics = read_statistics(located)
    for name, values in statistics._asdict().items():
        if len(values) != network.num_channels:
            raise ValueError(
                f"image_{name} of the teacher {located} has {len(values)} values, but its network takes images of "
                f"{network.num_channels} channels; give its image processor one value a channel."
            )
    heads = _read_heads(located, network.width) if network.model_type in BACKBONES else {}
    return TeacherDescription(**vars(network), statistics=statistics, heads=heads)


def _heads_file(source: str) -> Path | None:
    if Path(source).is_dir():
        path = Path(source) / HEADS_FILE
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(source, HEADS_FILE))
    except LocalEntryNotFoundError as error:  # the Hub was not asked
        if HF_HUB_OFFLINE:
            return None
        raise FileNotFoundError(
            f"whether the teacher {source} has prototype heads is not known, the Hub cannot be reached; try again, or "
            "set HF_HUB_OFFLINE=1 to go by what has been downloaded."
        ) from error
    except EntryNotFoundError:
        return None


def _read_heads(source: str, width: int) -> dict[str, dict[str, Any]]:
    """Arguments of the heads beside a backbone, which are found to fit it."""
    path = _heads_file(source)
    if path is None:
        return {}
    shapes = read_head_shapes(path)
    if "dino_head" not in shapes:
        raise ValueError(f"{path} holds no DINO head; remove it to distil features, or save the teacher again.")
    with open_safetensors(path) as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  (no mapping)
    for head, arguments in shapes.items():
        for name, wanted in _empty_head(width, arguments).state_dict(prefix=f"{head}.").items():
            if found.get(name) != tuple(wanted.shape):
                raise ValueError(
                    f"{path} does not fit the backbone beside it, which is {width} wide: {name} is "
                    f"{found.get(name, 'missing')}, not {tuple(wanted.shape)}; give a folder in which both are of the "
                    "same run."
                )
    return shapes


def _load_heads(description: TeacherDescription, dtype: torch.dtype) -> dict[str, PrototypeHead]:
    path = _heads_file(description.source) if description.heads else None
    if path is None:
        return {}
    heads = {}
    with open_safetensors(path) as file:
        for name, arguments in description.heads.items():
            head = heads[name] = _empty_head(description.width, arguments)
            tensors = {key: file.get_tensor(f"{name}.{key}").to(dtype) for key in head.state_dict()}
            head.load_state_dict(tensors, assign=True)
    return heads


def _empty_head(width: int, arguments: Mapping[str, Any]) -> PrototypeHead:
    with torch.device("meta"):
        return PrototypeHead(width, **arguments)
