"""The consolidated output of a run: the teacher as an ordinary model folder."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers import DINOv3ViTImageProcessor

from dinov3_hf.hub.architecture import open_safetensors
from dinov3_hf.models.dinov3_vit.image_processing import build_image_processor
from dinov3_hf.training.lora import merged_backbone
from dinov3_hf.training.ssl_config import SSLConfig

HEADS_FILE = "heads.safetensors"
PROTOTYPE_HEADS = ("dino_head", "ibot_head")


def save_teacher_folder(teacher: Any, args: SSLConfig, folder: Path) -> None:
    """
    Write backbone, image processor and prototype heads. Low-rank adapters are merged into the weights.

    Args:
        teacher: the EMA teacher, or the moving average of a student of a distillation, whole (not sharded).
        args: the recipe, for image size and statistics and for the shapes of the heads.
        folder: created when absent.
    """
    merged_backbone(teacher.backbone).save_pretrained(folder)
    image_processor(args).save_pretrained(folder)
    heads = {name: part for name, part in teacher.named_children() if name in PROTOTYPE_HEADS}
    if not heads:
        return
    tensors = {
        f"{head}.{name}": tensor.contiguous()
        for head, part in heads.items()
        for name, tensor in part.state_dict().items()
    }
    shapes = {head: json.dumps(args.__dict__[head]) for head in heads}
    save_file(tensors, folder / HEADS_FILE, metadata={"format": "pt", **shapes})


def read_head_shapes(path: Path) -> dict[str, dict[str, Any]]:
    """
    The heads in a `heads.safetensors`: `dino_head` and `ibot_head` -> arguments of [`PrototypeHead`] beside `in_dim`.

    Raises:
        ValueError: the file is damaged.
    """
    with open_safetensors(path) as file:
        metadata = file.metadata() or {}
    return {head: json.loads(metadata[head]) for head in PROTOTYPE_HEADS if head in metadata}


def image_processor(args: SSLConfig) -> DINOv3ViTImageProcessor:
    """What prepares images for a network that the recipe `args` trains."""
    return build_image_processor(
        image_size=args.global_crop_size, image_mean=list(args.image_mean), image_std=list(args.image_std)
    )
