"""Tiny networks with every option, and their random weights and images."""

from typing import Any

import torch
from torch import Tensor, nn

from dinov3_hf.models.dinov3_vit.configuration_dinov3_vit import DINOv3ViTConfig
from dinov3_hf.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTModel

TINY: dict[str, Any] = {
    "patch_size": 4,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_register_tokens": 2,
    "image_size": 16,
}
SWIGLU: dict[str, Any] = {"use_gated_mlp": True, "hidden_act": "silu"}

# What the class of transformers can represent.
STOCK_VARIANTS: dict[str, dict[str, Any]] = {
    "mlp": {},
    "no_registers": {"num_register_tokens": 0},
    "swiglu_without_qkv_bias": {**SWIGLU, "query_bias": False, "value_bias": False},
    "swiglu_of_odd_width": {**SWIGLU, "intermediate_size": 43},
    "key_bias": {"key_bias": True},
    "few_biases": {"proj_bias": False, "mlp_bias": False, "query_bias": False},
    "layer_norm_eps": {"layer_norm_eps": 1e-6},
    "rope_theta": {"rope_theta": 20.0},
    "one_channel": {"num_channels": 1},
    "local_cls_norm": {"untie_global_and_local_cls_norm": True},
    "training_options": {
        "drop_path_rate": 0.3,
        "pos_embed_shift": 0.1,
        "pos_embed_jitter": 1.2,
        "rope_augmentation_per_block": False,
        "layerscale_value": 1e-5,
    },
}
# What it cannot.
NATIVE_VARIANTS: dict[str, dict[str, Any]] = {
    "rmsnorm": {"norm_type": "rmsnorm"},
    "no_layer_scale": {"layerscale_value": None},
    "cls_norm": {"untie_cls_and_patch_norms": True},
    "both_norms": {"untie_cls_and_patch_norms": True, "untie_global_and_local_cls_norm": True},
    "rope_periods": {"rope_theta": None, "rope_min_period": 0.5, "rope_max_period": 30.0},
    "rope_max_coords": {"rope_normalize_coords": "max"},
    "rope_min_coords": {"rope_normalize_coords": "min"},
    "rope_bfloat16": {"rope_dtype": "bfloat16"},
    "class_token_in_maps": {"reshape_hidden_states": False, "class_token_in_feature_maps": True},
    "rmsnorm_swiglu_no_layer_scale": {**SWIGLU, "norm_type": "rmsnorm", "layerscale_value": None},
}
ALL_VARIANTS = {**STOCK_VARIANTS, **NATIVE_VARIANTS}


def tiny_config(**fields: Any) -> DINOv3ViTConfig:
    return DINOv3ViTConfig(**{**TINY, **fields})


def tiny_model(**fields: Any) -> DINOv3ViTModel:
    """In eval mode, with random weights of which each one matters."""
    return randomize(DINOv3ViTModel(tiny_config(**fields))).eval()


@torch.no_grad()
def randomize(model: nn.Module) -> nn.Module:
    """Fill parameters so that none is without effect: norms around 1, LayerScale around 0.6, the rest around 0."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        centre = 0.6 if "lambda1" in name else 1.0 if "norm" in name and name.endswith("weight") else 0.0
        spread = 0.5 if "token" in name else parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1
        parameter.copy_(centre + spread * torch.randn(parameter.shape, generator=generator))
    return model


def images(batch: int = 2, height: int = 16, width: int = 12, channels: int = 3) -> Tensor:
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(1))


def random_mask(batch: int = 2, num_patches: int = 12) -> Tensor:
    return torch.rand(batch, num_patches, generator=torch.Generator().manual_seed(2)) < 0.4
