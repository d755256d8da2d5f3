"""The consolidated output of a run: the teacher as an ordinary model folder."""

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from transformers import DINOv3ViTImageProcessor

from dinov3_hf.hub.model_card import write_model_card
from dinov3_hf.models.dinov3_pretraining.modeling_dinov3_pretraining import SSLNetwork
from dinov3_hf.models.dinov3_vit.image_processing import build_image_processor
from dinov3_hf.training.ssl_config import SSLConfig

HEADS = ("dino_head", "ibot_head")


def save_teacher_folder(teacher: SSLNetwork, args: SSLConfig, folder: Path, facts: Mapping[str, object]) -> None:
    """
    Write backbone, image processor, prototype heads and model card.

    Args:
        teacher: the EMA teacher, whole (not sharded).
        args: the recipe, for image size and statistics and for the shapes of the heads.
        folder: created when absent.
        facts: rows of the model card.
    """
    teacher.backbone.save_pretrained(folder)
    image_processor(args).save_pretrained(folder)
    heads = {
        f"{head}.{name}": tensor.contiguous()
        for head in HEADS
        for name, tensor in teacher.get_submodule(head).state_dict().items()
    }
    shapes = {"dino_head": json.dumps(args.dino_head), "ibot_head": json.dumps(args.ibot_head)}
    save_file(heads, folder / "heads.safetensors", metadata={"format": "pt", **shapes})
    config = teacher.backbone.config
    write_model_card(
        folder,
        title=args.run_name or Path(args.output_dir or folder).name,
        architecture=(
            f"ViT with {config.num_hidden_layers} blocks of width {config.hidden_size} "
            f"and patches of {config.patch_size} px"
        ),
        num_parameters=sum(parameter.numel() for parameter in teacher.backbone.parameters()),
        num_registers=config.num_register_tokens,
        facts=facts,
    )


def image_processor(args: SSLConfig) -> DINOv3ViTImageProcessor:
    """What prepares images for a network that the recipe `args` trains."""
    return build_image_processor(
        image_size=args.global_crop_size, image_mean=list(args.image_mean), image_std=list(args.image_std)
    )
