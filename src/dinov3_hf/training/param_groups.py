"""Optimizer parameter groups: learning-rate and weight-decay multipliers by parameter name.

Rules of the published recipes, for names relative to a sub-module (backbone, dino_head, ibot_head), whether ours
(`layer.3.mlp.up_proj.weight`) or those of native checkpoints (`blocks.3.mlp.fc1.weight`):

    learning rate   decay^(N + 1 - l)   l = 0 for patch embedding, CLS, register and mask tokens; l = i + 1 for block i
                    1                   everything else (final norms, heads, any backbone without transformer blocks)
                    x patch_embed_lr_mult for the patch embedding
    weight decay    0                   biases, norms, LayerScale, Fourier features
                    1                   everything else, the tokens included
    rate            which learning rate of the schedules is multiplied
                    last_layer_lr   `last_layer` of a prototype head: 0 in the first steps
                    backbone_lr     in continued pre-training, the backbone apart from its patch embedding: 0 while
                                    fresh heads learn, then a ramp
                    lr              everything else

N is the number of transformer blocks. The norms inside a ConvNeXt's `downsample_layers` have no "norm" in their names,
so their weights are decayed, as in the published runs.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

from torch import nn
from torch.optim import AdamW
from transformers import TrainingArguments

_BLOCK = re.compile(r"(?:^|\.)(?:layer|blocks)\.(\d+)\.")
_TOKENS = ("cls_token", "register_tokens", "storage_tokens", "mask_token")
# The stem of a ConvNeXt stands in its place, but has no smaller rate in the published recipes.
_PATCH_EMBEDDING = ("patch_embeddings", "patch_embed.")
_STEM = ("stages.0.downsample_layers.", "downsample_layers.0.")
# LayerScale is `lambda1` in our files and `gamma` in native ones and in ConvNeXt.
_NOT_DECAYED = ("norm", "gamma", "lambda1", "fourier_w")

_FUSED = ("cuda", "cpu", "mps", "xpu")  # devices for which torch has AdamW as one kernel

Rate = Literal["lr", "last_layer_lr", "backbone_lr"]


class ParameterSettings(NamedTuple):
    """Which learning rate one parameter follows, and what the rate and the weight decay are multiplied with."""

    lr_multiplier: float
    weight_decay_multiplier: float
    rate: Rate


def count_blocks(names: Iterable[str]) -> int:
    """Number of transformer blocks among parameter names; 0 for a head or a ConvNeXt."""
    return len({match[1] for name in names if (match := _BLOCK.search(name))})


def is_first_layer(name: str) -> bool:
    """Whether a parameter of a backbone belongs to what reads the pixels: patch embedding, or stem of a ConvNeXt."""
    return any(part in name for part in _PATCH_EMBEDDING) or name.startswith(_STEM)


def parameter_settings(
    name: str,
    num_blocks: int,
    *,
    layerwise_lr_decay: float = 1.0,
    patch_embed_lr_mult: float = 1.0,
    rate: Rate = "lr",
) -> ParameterSettings:
    """Settings of one parameter.

    Args:
        name: parameter name relative to its sub-module, ours or native.
        num_blocks: number of transformer blocks of the sub-module (see [`count_blocks`]).
        layerwise_lr_decay: factor of the learning rate per block, counted down from the last.
        patch_embed_lr_mult: additional factor for the patch embedding.
        rate: of the sub-module; patch embeddings and stems keep `lr`, last layers `last_layer_lr`.
    """
    is_patch_embedding = any(part in name for part in _PATCH_EMBEDDING)
    if match := _BLOCK.search(name):
        exponent = num_blocks - int(match[1])
    elif is_patch_embedding or any(token in name for token in _TOKENS):
        exponent = num_blocks + 1
    else:
        exponent = 0
    lr_multiplier = layerwise_lr_decay**exponent
    if is_patch_embedding:
        lr_multiplier *= patch_embed_lr_mult
    is_decayed = not name.endswith("bias") and not any(part in name for part in _NOT_DECAYED)
    if "last_layer" in name:
        rate = "last_layer_lr"
    elif is_first_layer(name):
        rate = "lr"
    return ParameterSettings(lr_multiplier, 1.0 if is_decayed else 0.0, rate)


def parameter_groups(
    submodules: Mapping[str, nn.Module],
    *,
    layerwise_lr_decay: float = 1.0,
    patch_embed_lr_mult: float = 1.0,
    rates: Mapping[str, Rate] | None = None,
) -> list[dict[str, Any]]:
    """Optimizer groups of several sub-modules: one group for all parameters with the same settings.

    Few large groups keep a fused optimizer fast. Frozen parameters are left out. `lr` and `weight_decay` are set at
    every step by [`~training.recipe_scheduler.RecipeScheduler`].

    Args:
        submodules: for example `{"backbone": ..., "dino_head": ..., "ibot_head": ...}`; names are relative to each.
        layerwise_lr_decay: factor of the learning rate per block, counted down from the last.
        patch_embed_lr_mult: additional factor for the patch embedding.
        rates: for example `{"backbone": "backbone_lr"}`; sub-modules that are not named follow `lr`.

    Returns:
        Dictionaries with `params`, `lr_multiplier`, `weight_decay_multiplier` and `rate`, in the order in which their
        first parameter appears.
    """
    groups: dict[ParameterSettings, dict[str, Any]] = {}
    for submodule, module in submodules.items():
        named_parameters = dict(module.named_parameters())
        num_blocks = count_blocks(named_parameters)
        for name, parameter in named_parameters.items():
            if not parameter.requires_grad:
                continue
            settings = parameter_settings(
                name,
                num_blocks,
                layerwise_lr_decay=layerwise_lr_decay,
                patch_embed_lr_mult=patch_embed_lr_mult,
                rate=(rates or {}).get(submodule, "lr"),
            )
            group = groups.setdefault(settings, {"params": [], **settings._asdict()})
            group["params"].append(parameter)
    return list(groups.values())


def make_adamw(groups: list[dict[str, Any]], args: TrainingArguments) -> AdamW:
    """The optimizer of `parameter_groups`, with the betas and the epsilon of a recipe."""
    return AdamW(
        groups,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        fused=args.device.type in _FUSED,
    )
