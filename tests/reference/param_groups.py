"""JSON files with the optimizer settings of every parameter, by native name."""

from typing import Any

from dinov3_hf.training.param_groups import count_blocks, parameter_settings

from .compare import Comparison

RTOL = 1e-12  # products of a few float64 numbers


def is_param_groups(content: Any) -> bool:
    """Whether a JSON file holds networks with `settings` and per-parameter `groups`."""
    return isinstance(content, dict) and any(_is_network(entry) for entry in content.values())


def check_param_groups(content: dict[str, Any], compare: Comparison) -> None:
    """Multipliers and last-layer flag of every parameter, under its native name and, for a ViT, under ours."""
    for network, entry in content.items():
        if not _is_network(entry):
            continue
        settings, groups = entry["settings"], entry["groups"]
        num_blocks = count_blocks(groups)
        for name, recorded in groups.items():
            ours = parameter_settings(
                name,
                num_blocks,
                layerwise_lr_decay=settings["lr_decay_rate"],
                patch_embed_lr_mult=settings["patch_embed_lr_mult"],
            )
            label = f"{network}/{name}"
            compare.check_pair(f"{label}/lr_multiplier", ours.lr_multiplier, recorded["lr_multiplier"], RTOL)
            compare.check_pair(f"{label}/wd_multiplier", ours.weight_decay_multiplier, recorded["wd_multiplier"], RTOL)
            compare.check_pair(f"{label}/is_last_layer", ours.is_last_layer, recorded["is_last_layer"])


def _is_network(entry: Any) -> bool:
    return isinstance(entry, dict) and {"settings", "groups"} <= set(entry)
