"""The backbones that can stand inside the training models: model type -> configuration and model class.

A backbone takes a list of crop groups (`pixel_values`, `bool_masked_pos`) and returns, per group, `pooler_output`
(normalised CLS token) and `last_hidden_state` ([prefix tokens, patches], normalised). A new family is one line below.
"""

import inspect
from typing import Any, ClassVar, get_origin

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from dinov3_hf.models.dinov3_convnext.configuration_dinov3_convnext import (
    DINOv3ConvNextConfig,
    DINOv3ConvNextNativeConfig,
)
from dinov3_hf.models.dinov3_convnext.modeling_dinov3_convnext import DINOv3ConvNextModel
from dinov3_hf.models.dinov3_vit.configuration_dinov3_vit import DINOv3ViTConfig, DINOv3ViTNativeConfig
from dinov3_hf.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTModel

BACKBONES: dict[str, tuple[type[PreTrainedConfig], type[PreTrainedModel]]] = {
    "dinov3_vit": (DINOv3ViTConfig, DINOv3ViTModel),
    "dinov3_vit_native": (DINOv3ViTNativeConfig, DINOv3ViTModel),
    "dinov3_convnext": (DINOv3ConvNextConfig, DINOv3ConvNextModel),
    "dinov3_convnext_native": (DINOv3ConvNextNativeConfig, DINOv3ConvNextModel),
}
# A backbone of these families ignores `bool_masked_pos`.
WITHOUT_MASK_TOKEN = ("dinov3_convnext", "dinov3_convnext_native")


def backbone_config_from_dict(config: dict[str, Any] | PreTrainedConfig | None) -> PreTrainedConfig:
    """Our configuration object for a `config.json` dictionary (or one already built, which is returned as it is)."""
    if isinstance(config, PreTrainedConfig):
        return config
    fields = dict(config or {})
    model_type = fields.pop("model_type", "dinov3_vit")
    if model_type not in BACKBONES:
        raise ValueError(
            f"backbone model_type {model_type!r} cannot be trained here; use one of {', '.join(BACKBONES)}."
        )
    config_class, _ = BACKBONES[model_type]
    return config_class(**fields)


def check_masks(config: PreTrainedConfig, ibot_weight: float, gram_tokens: str) -> None:
    """Raise ValueError for an objective with masked patches on a backbone that cannot hide patches from itself."""
    if config.model_type not in WITHOUT_MASK_TOKEN:
        return
    if ibot_weight > 0:
        raise ValueError(
            f"a {config.model_type} backbone has no mask token, which L_iBOT hides patches with: it would see what it "
            "has to predict; set ibot_weight: 0, or pre-train a dinov3_vit backbone."
        )
    if gram_tokens != "all":
        raise ValueError(
            f"gram_tokens {gram_tokens!r} tells masked patches from others, but a {config.model_type} backbone has no "
            "mask token; set gram_tokens: all."
        )


def patch_side(config: PreTrainedConfig) -> int:
    """Pixels between two patch tokens of a backbone, along each axis."""
    side: int = config.stride if config.model_type in WITHOUT_MASK_TOKEN else config.patch_size
    return side


def patch_grid(crops: Tensor, config: PreTrainedConfig) -> tuple[int, int]:
    """Rows and columns of the patch tokens of crops (..., H, W)."""
    height, width = crops.shape[-2:]
    return height // patch_side(config), width // patch_side(config)


def build_backbone(config: PreTrainedConfig) -> PreTrainedModel:
    """A freshly initialised backbone for `config`."""
    _, model_class = BACKBONES[config.model_type]
    return model_class(config)


def own_annotations(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """Public fields that a configuration class and its bases add to those of every `PreTrainedConfig`."""
    own_classes = [cls for cls in config_class.__mro__ if not issubclass(PreTrainedConfig, cls)]
    annotations: dict[str, Any] = {}
    for cls in reversed(own_classes):
        annotations |= inspect.get_annotations(cls)
    return {
        name: hint
        for name, hint in annotations.items()
        if not name.startswith("_") and get_origin(hint) is not ClassVar
    }
