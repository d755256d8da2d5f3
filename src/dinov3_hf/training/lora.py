"""Low-rank adapters inside a backbone (LoRA, arXiv 2106.09685): few weights to train, none of them left in the end.

A layer y = W x + b becomes y = W x + b + (alpha / r) B A x, with A (r, in), B (out, r) and B = 0 at first. W and b
stay as they are. PEFT makes the layers; a merged backbone, with W + (alpha / r) B A in the place of W, knows nothing
of them.
"""

from importlib.util import find_spec

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dinov3_hf.errors import ArgumentError
from dinov3_hf.models.dinov3_pretraining.backbones import WITHOUT_MASK_TOKEN, build_backbone

# Queries, values and the MLP of a ViT; the pointwise layers of a ConvNeXt.
VIT_LAYERS = ("q_proj", "v_proj", "up_proj", "gate_proj", "down_proj")
CONVNEXT_LAYERS = ("pointwise_conv1", "pointwise_conv2")
_ADAPTER = "default"
_BASE, _MARK = ".base_layer.", ".lora_"


def check_peft() -> None:
    """Raise ArgumentError, naming the remedy, where PEFT is not installed."""
    if find_spec("peft") is None:
        raise ArgumentError("lora_rank needs PEFT, which is not installed; pip install 'dinov3-hf[peft]'.")


def add_adapters(backbone: PreTrainedModel, rank: int, alpha: int) -> None:
    """
    Put adapters into a backbone, in place: it computes what it did. Of its own weights only those of the first layer,
    which reads the pixels, and the adapters can still be trained.

    Args:
        backbone: a DINOv3 ViT or ConvNeXt.
        rank: r.
        alpha: what B A is multiplied with, times r.
    """
    from peft import LoraConfig, inject_adapter_in_model

    layers = CONVNEXT_LAYERS if backbone.config.model_type in WITHOUT_MASK_TOKEN else VIT_LAYERS
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(layers), lora_dropout=0.0, bias="none")
    inject_adapter_in_model(config, backbone, adapter_name=_ADAPTER)  # freezes everything but the adapters
    backbone.get_input_embeddings().requires_grad_(True)


def has_adapters(backbone: nn.Module) -> bool:
    """Whether `add_adapters` has been there."""
    return any(_MARK in name for name, _ in backbone.named_parameters())


@torch.no_grad()
def merged_backbone(backbone: PreTrainedModel) -> PreTrainedModel:
    """
    A backbone without adapters that computes the same, up to rounding: a new one, or `backbone` itself if it has none.
    """
    if not has_adapters(backbone):
        return backbone
    from peft.tuners.lora import Linear as AdaptedLinear

    weights: dict[str, Tensor] = {
        name.replace(_BASE, "."): tensor for name, tensor in backbone.state_dict().items() if _MARK not in name
    }
    for name, module in backbone.named_modules():
        if isinstance(module, AdaptedLinear):
            own = backbone.get_parameter(f"{name}.base_layer.weight")
            weights[f"{name}.weight"] = own + module.get_delta_weight(_ADAPTER)
    with torch.device("meta"):
        merged = build_backbone(backbone.config)
    merged.load_state_dict(weights, assign=True)
    return merged
