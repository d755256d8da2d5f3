"""Tiny networks with every option, and their random weights and images."""

from typing import Any

import torch
from torch import Tensor, nn

from dinov3_hf.models.dinov3_convnext.configuration_dinov3_convnext import DINOv3ConvNextConfig
from dinov3_hf.models.dinov3_convnext.modeling_dinov3_convnext import DINOv3ConvNextModel

TINY: dict[str, Any] = {"hidden_sizes": [8, 12, 16, 24], "depths": [1, 2, 1, 1], "image_size": 64}

# What the classes of transformers can represent.
STOCK_VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "layer_norm_eps": {"layer_norm_eps": 1e-3},
    "one_channel": {"num_channels": 1},
    "silu": {"hidden_act": "silu"},
    "three_stages": {"hidden_sizes": [8, 8, 16], "depths": [2, 1, 1]},
    "layer_scale_from_zero": {"layer_scale_init_value": 0.0},
    "training_options": {"drop_path_rate": 0.4, "layer_scale_init_value": 1e-3},
}
# What they cannot.
NATIVE_VARIANTS: dict[str, dict[str, Any]] = {
    "no_layer_scale": {"layer_scale_init_value": None},
    "patch_size": {"patch_size": 16},
    "patch_size_without_layer_scale": {"patch_size": 14, "layer_scale_init_value": None},
}
ALL_VARIANTS = {**STOCK_VARIANTS, **NATIVE_VARIANTS}


def tiny_config(**fields: Any) -> DINOv3ConvNextConfig:
    return DINOv3ConvNextConfig(**{**TINY, **fields})


def tiny_model(**fields: Any) -> DINOv3ConvNextModel:
    """In eval mode, with random weights of which each one matters."""
    return randomize(DINOv3ConvNextModel(tiny_config(**fields))).eval()


@torch.no_grad()
def randomize(model: nn.Module) -> nn.Module:
    """Fill parameters so that none is without effect: norms around 1, LayerScale around 0.6, the rest around 0."""
    generator = torch.Generator().manual_seed(0)
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        owner, _, kind = name.rpartition(".")
        is_norm = isinstance(modules[owner], nn.LayerNorm) and kind == "weight"
        centre = 0.6 if kind == "gamma" else 1.0 if is_norm else 0.0
        spread = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
        parameter.copy_(centre + spread * torch.randn(parameter.shape, generator=generator))
    return model


def images(batch: int = 2, height: int = 96, width: int = 64, channels: int = 3) -> Tensor:
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(1))
