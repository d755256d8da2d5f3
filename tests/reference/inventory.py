"""JSON files that list every tensor of a released network."""

from typing import Any

import torch

from dinov3_hf.convert.dinov3_vit import config_from_native, state_dict_to_native
from dinov3_hf.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTModel

from .compare import Comparison, NotInThePackageYet


def is_inventory(content: Any) -> bool:
    """Whether a JSON file holds a state dict as name -> [shape, dtype, parameter or buffer]."""
    return isinstance(content, dict) and {"model", "constructor_calls", "state_dict"} <= set(content)


def check_inventory(content: dict[str, Any], compare: Comparison) -> None:
    """Names and shapes of our network for the recorded constructor arguments; no memory is allocated."""
    classes = [call["class"] for call in content["constructor_calls"]]
    if classes != ["DinoVisionTransformer"] or "entries_with_prefix_omitted" in content:
        raise NotInThePackageYet(f"inventory of {content['model']} ({content['what']})")
    config = config_from_native(content["constructor_calls"][0]["kwargs"])
    with torch.device("meta"):
        ours = state_dict_to_native(DINOv3ViTModel(config).state_dict(), config)
    recorded = content["state_dict"]
    compare.misses += [f"{name}: not recorded" for name in ours if name not in recorded]
    for name, (shape, _, _) in recorded.items():
        if name not in ours:
            compare.misses.append(f"{name}: not compared")
        else:
            compare.check_pair(f"{name}/shape", torch.tensor(ours[name].shape), torch.tensor(shape))
