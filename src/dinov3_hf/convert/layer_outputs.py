"""Networks of dinov3_hf, transformers and timm, called alike: images in, the outputs of every layer out.

Legend: B images, C channels, H x W pixels, N tokens of an image (prefix tokens and patches), D width, h x w positions
of a feature map. A layer has the name that it has in a file of the Hub.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DINOv3ConvNextModel, DINOv3ViTModel

from dinov3_hf.convert.checkpoint import Checkpoint, load_model
from dinov3_hf.models.dinov3_convnext.configuration_dinov3_convnext import DINOv3ConvNextConfig

Outputs = dict[str, Tensor]  # layer -> (B, N, D), (B, D, h, w) or, "pooled", (B, D)
Network = Callable[[Tensor], Outputs]  # images (B, C, H, W) -> outputs


def open_ours(checkpoint: Checkpoint, dtype: torch.dtype) -> Network:
    """Our model with the values of a checkpoint of any format."""
    model: Any = load_model(checkpoint)
    return _of_hub_model(model.to(dtype))


def open_transformers(checkpoint: Checkpoint, dtype: torch.dtype) -> Network:
    """The model of transformers, which reads the folder itself."""
    is_convnext = isinstance(checkpoint.config, DINOv3ConvNextConfig)
    model_class: Any = DINOv3ConvNextModel if is_convnext else DINOv3ViTModel
    return _of_hub_model(model_class.from_pretrained(checkpoint.source, dtype=dtype).eval())


def open_timm(folder: Path, dtype: torch.dtype) -> Network:
    """The model of timm, which reads the folder itself; a classifier is left out."""
    import timm

    model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval().to(dtype)
    return _of_timm_vit(model) if isinstance(model, timm.models.Eva) else _of_timm_convnext(model)


def _of_hub_model(model: Any) -> Network:
    """A model of ours or of transformers, which return the same fields."""

    def network(pixels: Tensor) -> Outputs:
        output = model(pixels, output_hidden_states=True)
        if model.config.model_type.startswith("dinov3_convnext"):
            return _of_convnext(output.hidden_states[1:], output.last_hidden_state, output.pooler_output)
        return _of_vit(output.hidden_states, output.last_hidden_state, output.pooler_output)

    return network


def _of_timm_vit(model: Any) -> Network:
    def network(pixels: Tensor) -> Outputs:
        states: list[Tensor] = []
        hook = model.blocks[0].register_forward_pre_hook(lambda _, arguments: states.append(arguments[0]))
        tokens, blocks = model.forward_intermediates(pixels, output_fmt="NLC", return_prefix_tokens=True)
        hook.remove()
        states += [torch.cat((prefix, patches), dim=1) for patches, prefix in blocks]  # (B, N, D)
        return _of_vit(states, tokens, model.pool(tokens, "token"))

    return network


def _of_timm_convnext(model: Any) -> Network:
    def network(pixels: Tensor) -> Outputs:
        features, stages = model.forward_intermediates(pixels)  # (B, D, h, w), 4 of them
        pooled = model.forward_head(features, pre_logits=True)  # (B, D)
        positions = model.head.norm(features).flatten(2).transpose(1, 2)  # (B, h * w, D)
        return _of_convnext(stages, torch.cat((pooled[:, None], positions), dim=1), pooled)

    return network


def _of_vit(states: Iterable[Tensor], tokens: Tensor, pooled: Tensor) -> Outputs:
    embeddings, *blocks = states
    layers = {f"layer.{index}": block for index, block in enumerate(blocks)}
    return {"embeddings": embeddings, **layers, "norm": tokens, "pooled": pooled}


def _of_convnext(stages: Iterable[Tensor], tokens: Tensor, pooled: Tensor) -> Outputs:
    layers = {f"stages.{index}": features for index, features in enumerate(stages)}
    return {**layers, "layer_norm": tokens, "pooled": pooled}
