"""Tiny models of transformers around a DINOv3 backbone. Imports nothing of this package, for other processes."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CHMv2Config,
    CHMv2ForDepthEstimation,
    DPTConfig,
    DPTForDepthEstimation,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    PreTrainedConfig,
    PreTrainedModel,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

# Fields of the backbone's configuration.
VIT: dict[str, Any] = {
    "patch_size": 8,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_register_tokens": 2,
    "image_size": 64,
    "out_indices": [1, 2, 3, 4],
}
CONVNEXT: dict[str, Any] = {
    "hidden_sizes": [16, 16, 32, 32],
    "depths": [1, 1, 2, 1],
    "image_size": 64,
    "out_indices": [1, 2, 3, 4],
}


def upernet(backbone: PreTrainedConfig) -> PreTrainedModel:
    config = UperNetConfig(
        backbone_config=backbone, hidden_size=16, pool_scales=[1, 2], auxiliary_in_channels=32, auxiliary_channels=16
    )
    return UperNetForSemanticSegmentation(config)


def mask2former(backbone: PreTrainedConfig) -> PreTrainedModel:
    widths = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32}
    config = Mask2FormerConfig(
        backbone_config=backbone,
        **widths,
        encoder_feedforward_dim=32,
        dim_feedforward=32,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=4,
        num_queries=5,
    )
    return Mask2FormerForUniversalSegmentation(config)


def dpt(backbone: PreTrainedConfig) -> PreTrainedModel:
    config = DPTConfig(
        backbone_config=backbone, is_hybrid=False, neck_hidden_sizes=[16, 16, 32, 32], fusion_hidden_size=16
    )
    return DPTForDepthEstimation(config)


def chmv2(backbone: PreTrainedConfig) -> PreTrainedModel:
    config = CHMv2Config(
        backbone_config=backbone,
        patch_size=8,
        fusion_hidden_size=16,
        head_hidden_size=8,
        number_output_channels=8,
        post_process_channels=[16, 16, 16, 16],
    )
    return CHMv2ForDepthEstimation(config)


def backbone_of(model: PreTrainedModel) -> nn.Module:
    return model.model.pixel_level_module.encoder if "mask2former" in model.config.model_type else model.backbone


def prediction_of(model: PreTrainedModel, pixels: Tensor) -> Tensor:
    """The main output: logits or depth."""
    output = model(pixels)
    for name in ("logits", "masks_queries_logits", "predicted_depth"):
        if name in output:
            return output[name]
    raise ValueError(f"{type(model).__name__} predicts {', '.join(output)}; name one of these here.")


def pixels() -> Tensor:
    """Two images, not square."""
    return torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(4))
