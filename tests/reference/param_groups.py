"""JSON files with the optimizer settings of every parameter, by native name."""

from collections.abc import Iterable
from typing import Any

from dinov3_hf.convert.dinov3_vit import MLP_KEYS, SWIGLU_KEYS
from dinov3_hf.training.param_groups import count_blocks, parameter_settings

from .compare import Comparison, refuse_unknown

RTOL = 1e-12  # products of a few float64 numbers
# The last one is without effect in the original, whose names of a head's parameters do not say that it is a head's.
SETTINGS = ("lr_decay_rate", "patch_embed_lr_mult", "dino_head_wd_multiplier")


def is_param_groups(content: Any) -> bool:
    """Whether a JSON file holds networks with `settings` and per-parameter `groups`."""
    return isinstance(content, dict) and any(_is_network(entry) for entry in content.values())


def check_param_groups(content: dict[str, Any], compare: Comparison) -> None:
    """Multipliers and last-layer flag of every parameter, under its native name and, for a ViT, under ours."""
    for network, entry in content.items():
        if not _is_network(entry):
            continue
        settings, groups = entry["settings"], entry["groups"]
        refuse_unknown("settings", settings, SETTINGS)
        num_blocks = count_blocks(groups)
        for native_name, recorded in groups.items():
            for name in (native_name, *_our_names(native_name, groups)):
                ours = parameter_settings(
                    name,
                    num_blocks,
                    layerwise_lr_decay=settings["lr_decay_rate"],
                    patch_embed_lr_mult=settings["patch_embed_lr_mult"],
                )
                for field, value, expected in (
                    ("lr_multiplier", ours.lr_multiplier, recorded["lr_multiplier"]),
                    ("wd_multiplier", ours.weight_decay_multiplier, recorded["wd_multiplier"]),
                    ("is_last_layer", ours.rate == "last_layer_lr", recorded["is_last_layer"]),
                ):
                    compare.check_pair(f"{network}/{name}/{field}", value, expected, RTOL)


def _our_names(native_name: str, groups: Iterable[str]) -> list[str]:
    """Our parameters for a native one: one for most of a ViT's, three for its fused qkv, none for other networks."""
    if "patch_embed.proj.weight" not in groups:
        return []
    keys = SWIGLU_KEYS if "blocks.0.mlp.w1.weight" in groups else MLP_KEYS
    split = [native_name.replace(".qkv.", f".{part}.") for part in "qkv"] if ".qkv." in native_name else [native_name]
    return [ours for name in split if (ours := keys.rename(name)) is not None]


def _is_network(entry: Any) -> bool:
    return isinstance(entry, dict) and {"settings", "groups"} <= set(entry)
