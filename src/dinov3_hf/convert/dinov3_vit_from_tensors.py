"""DINOv3 ViT: what the names and shapes of a native checkpoint say about the network.

They say nothing of a norm's epsilon, of how RoPE coordinates are normalised and of what acts in training only; these
are taken as in the released models.

Letters: D width, d width of a head.
"""

import re
from collections.abc import Collection
from typing import Any

from torch import Tensor

from dinov3_hf.convert.file_format import Tensors
from dinov3_hf.models.dinov3_vit.configuration_dinov3_vit import DINOv3ViTConfig
from dinov3_hf.models.dinov3_vit.presets import PRESETS
from dinov3_hf.models.dinov3_vit.rope import RopeParameters, rope_periods

# Largest relative error of a period that was computed in bfloat16, whose exponents are rounded too, and in float32.
MAX_PERIOD_ERROR = 2**-5
FLOAT32_ERROR = 1e-5

_BLOCK = re.compile(r"blocks\.(\d+)\.")


def recognises(names: Collection[str]) -> bool:
    """Whether these are parameters of a native ViT; those of timm and of DINOv2 have no `rope_embed`, and registers of
    another name."""
    return (
        "blocks.0.norm1.weight" in names
        and "blocks.0.attn.qkv.weight" in names
        and "patch_embed.proj.weight" in names
        and "cls_token" in names
        and ("rope_embed.periods" in names or "storage_tokens" in names)
    )


def read_config(native: Tensors) -> DINOv3ViTConfig:
    """
    The configuration of the network that the tensors are of.

    Raises:
        ValueError: The tensors contradict each other, or do not tell the number of heads.
    """
    block = "blocks.0."
    _, channels, *patch = _shape(native, "patch_embed.proj.weight", 4)  # (D, C, p, p)
    width = _shape(native, "cls_token", 3)[2]  # (1, 1, D)
    gated = f"{block}mlp.w1.weight" in native
    fields: dict[str, Any] = {
        "patch_size": patch,
        "num_channels": channels,
        "hidden_size": width,
        "intermediate_size": _shape(native, f"{block}mlp.{'w1' if gated else 'fc1'}.weight", 2)[0],
        "num_hidden_layers": _num_blocks(native),
        "use_gated_mlp": gated,
        "hidden_act": "silu" if gated else "gelu",
        "query_bias": f"{block}attn.qkv.bias" in native,
        "key_bias": f"{block}attn.qkv.bias" in native and f"{block}attn.qkv.bias_mask" not in native,
        "value_bias": f"{block}attn.qkv.bias" in native,
        "proj_bias": f"{block}attn.proj.bias" in native,
        "mlp_bias": f"{block}mlp.{'w1' if gated else 'fc1'}.bias" in native,
        # Trained values do not tell where they began; None is a network without LayerScale.
        "layerscale_value": 1e-5 if f"{block}ls1.gamma" in native else None,
        "norm_type": "layernorm" if f"{block}norm1.bias" in native else "rmsnorm",
        "num_register_tokens": _shape(native, "storage_tokens", 3)[1] if "storage_tokens" in native else 0,
        "untie_cls_and_patch_norms": "cls_norm.weight" in native,
        "untie_global_and_local_cls_norm": "local_cls_norm.weight" in native,
    }
    if "rope_embed.periods" in native:
        _shape(native, "rope_embed.periods", 1)
        periods = native["rope_embed.periods"].read()  # (d/4,)
        num_heads, left = divmod(width, 4 * max(len(periods), 1))
        if left or num_heads == 0:
            raise ValueError(
                f"rope_embed.periods has {len(periods)} values, which fits no head of a network of width {width}."
            )
        return DINOv3ViTConfig(**fields, num_attention_heads=num_heads, **_rope_fields(periods))
    for preset in PRESETS.values():
        if all(preset[name] == fields[name] for name in ("hidden_size", "num_hidden_layers", "intermediate_size")):
            return DINOv3ViTConfig(**fields, num_attention_heads=preset["num_attention_heads"])
    raise ValueError(
        "the checkpoint has no rope_embed.periods, from which the number of heads follows, and is of no released "
        "size; name its architecture with --arch."
    )


def _num_blocks(native: Tensors) -> int:
    numbers = {int(match[1]) for name in native if (match := _BLOCK.match(name))}
    # One by one: the largest number can be any.
    missing = next((number for number in range(max(numbers)) if number not in numbers), None)
    if missing is not None:
        raise ValueError(f"the checkpoint has no block {missing} of {max(numbers) + 1}; it is not whole.")
    return len(numbers)


def _shape(native: Tensors, name: str, ndim: int) -> tuple[int, ...]:
    if name not in native:
        raise ValueError(f"the checkpoint has no {name}; check that it holds a whole ViT.")
    shape = native[name].shape
    if len(shape) != ndim or 0 in shape:
        raise ValueError(f"{name} has the shape {shape}; a DINOv3 ViT has {ndim} axes there, none of them empty.")
    return shape


def _rope_fields(periods: Tensor) -> dict[str, Any]:
    """The parametrisation of these periods, (d/4,): `rope_theta` where the first is 1, else minimum and maximum.

    Raises:
        ValueError: No parametrisation has such periods.
    """
    values = [float(value) for value in periods.float()]
    count, first, last = len(values), values[0], values[-1]
    candidates: list[dict[str, Any]] = [{"rope_theta": 100.0}]
    if count > 1 and 0 < first < float("inf") and 0 < last < float("inf"):
        theta = last ** (count / (count - 1))
        candidates += [{"rope_theta": float(f"{theta:.{digits}g}")} for digits in (1, 2, 3, 4, 5, 6)]
        candidates += [
            {
                "rope_theta": None,
                "rope_min_period": float(f"{first:.{digits}g}"),
                "rope_max_period": float(f"{last:.{digits}g}"),
            }
            for digits in (1, 2, 3, 4, 5, 6)
        ]
    # Periods in float32 tell a rounder number from its neighbours; those in bfloat16 only roughly.
    for tolerance in (FLOAT32_ERROR, 2**-8, MAX_PERIOD_ERROR):
        for fields in candidates:
            if _period_error(values, fields) < tolerance:
                return fields
    raise ValueError("rope_embed.periods are not geometric; check that the checkpoint is of a DINOv3 ViT.")


def _period_error(values: list[float], fields: dict[str, Any]) -> float:
    config = DINOv3ViTConfig(hidden_size=4 * len(values), num_attention_heads=1, **fields)
    computed = [float(value) for value in rope_periods(RopeParameters.from_config(config))]
    errors = [abs(found / expected - 1) for found, expected in zip(values, computed, strict=True)]
    return max(errors) if all(error == error for error in errors) else float("inf")
