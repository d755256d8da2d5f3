"""JSON files that list every tensor of a released network."""

from typing import Any

import torch
from torch import Tensor

from dinov3_hf.convert import dinotxt, dinov3_convnext, dinov3_vit
from dinov3_hf.convert.lazy_tensor import LazyTensor, read_all
from dinov3_hf.models.dinotxt.configuration_dinotxt import DinoTxtConfig
from dinov3_hf.models.dinotxt.modeling_dinotxt import DinoTxtModel
from dinov3_hf.models.dinov3_convnext.configuration_dinov3_convnext import DINOv3ConvNextConfig
from dinov3_hf.models.dinov3_convnext.modeling_dinov3_convnext import DINOv3ConvNextModel
from dinov3_hf.models.dinov3_convnext.presets import PRESETS as CONVNEXT_PRESETS
from dinov3_hf.models.dinov3_vit.configuration_dinov3_vit import DINOv3ViTConfig
from dinov3_hf.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTModel
from dinov3_hf.models.dinov3_vit.presets import PRESETS as VIT_PRESETS

from .compare import Comparison, NotInThePackageYet


def is_inventory(content: Any) -> bool:
    """Whether a JSON file holds a state dict as name -> [shape, dtype, parameter or buffer]."""
    return isinstance(content, dict) and {"model", "constructor_calls", "state_dict"} <= set(content)


def check_inventory(content: dict[str, Any], compare: Comparison) -> None:
    """Names, shapes and parameters of our network for the recorded constructor arguments."""
    classes = [call["class"] for call in content["constructor_calls"]]
    with_text = "text_model.backbone.positional_embedding" in content["state_dict"]
    if len(classes) != 1 or classes[0] not in NETWORKS or ("entries_with_prefix_omitted" in content and not with_text):
        raise NotInThePackageYet(f"inventory of {content['model']} ({content['what']})")
    config_from_native, native_tensors = NETWORKS[classes[0]]
    config = config_from_native(content["constructor_calls"][0]["kwargs"])
    ours = _dinotxt_tensors(config) if with_text else native_tensors(config)
    recorded = content["state_dict"]
    compare.check_pair("parameters_total", _num_parameters(ours), content["parameters_total"])
    if with_text:  # the backbone's have an inventory of their own
        prefix, count = (content["entries_with_prefix_omitted"][name] for name in ("prefix", "count"))
        others = {name: tensor for name, tensor in ours.items() if not name.startswith(prefix)}
        compare.check_pair("entries_with_prefix_omitted/count", len(ours) - len(others), count)
        compare.check_pair("n_entries", len(ours), content["n_entries"])
        ours = others
    compare.misses += [f"{name}: not recorded" for name in ours if name not in recorded]
    for name, (shape, _, _) in recorded.items():
        if name not in ours:
            compare.misses.append(f"{name}: not compared")
        else:
            compare.check_pair(f"{name}/shape", torch.tensor(ours[name].shape), torch.tensor(shape))


def is_summary(content: Any) -> bool:
    """Whether a JSON file holds network name -> how many parameters and state dict entries it has."""
    return isinstance(content, dict) and all(
        isinstance(entry, dict) and {"parameters", "state_dict_entries"} <= set(entry) for entry in content.values()
    )


def check_summary(content: dict[str, dict[str, Any]], compare: Comparison) -> None:
    """Parameters and entries of our presets."""
    for name, recorded in content.items():
        preset = name.removeprefix("dinov3_")
        if preset in VIT_PRESETS:
            ours = _vit_tensors(DINOv3ViTConfig.from_preset(preset))
        elif preset in CONVNEXT_PRESETS:
            ours = _convnext_tensors(DINOv3ConvNextConfig.from_preset(preset))
        elif name == dinotxt.RELEASED:
            ours = _dinotxt_tensors(DINOv3ViTConfig.from_preset("vitl16"))
        else:
            compare.notes.append(f"not in the package yet: {name} ({recorded['what']})")
            continue
        compare.check_pair(f"{name}/parameters", _num_parameters(ours), recorded["parameters"])
        compare.check_pair(f"{name}/state_dict_entries", len(ours), recorded["state_dict_entries"])


def _vit_tensors(config: DINOv3ViTConfig) -> dict[str, Tensor]:
    """The state dict of our network under native names, on the meta device: no memory is allocated."""
    with torch.device("meta"):
        return dinov3_vit.state_dict_to_native(DINOv3ViTModel(config).state_dict(), config)


def _convnext_tensors(config: DINOv3ConvNextConfig) -> dict[str, Tensor]:
    with torch.device("meta"):
        ours = DINOv3ConvNextModel(config).state_dict()
    tensors = {name: LazyTensor.of(tensor) for name, tensor in ours.items()}
    return read_all(dinov3_convnext.from_hf(tensors, config).tensors)


def _dinotxt_tensors(backbone: DINOv3ViTConfig) -> dict[str, Tensor]:
    """Of the released text tower and head around a backbone: our defaults."""
    config = DinoTxtConfig(vision_config={"backbone_config": backbone})
    with torch.device("meta"):
        return dinotxt.state_dict_to_native(DinoTxtModel(config).state_dict(), config)


def _num_parameters(native: dict[str, Tensor]) -> int:
    """Parameters of a state dict: no buffers, and a tensor with two names once."""
    buffers = ("rope_embed.periods", ".bias_mask")
    parameters = {id(tensor): tensor.numel() for name, tensor in native.items() if not name.endswith(buffers)}
    return sum(parameters.values())


# The original's class -> our configuration for its arguments, and native tensors for that.
NETWORKS = {
    "DinoVisionTransformer": (dinov3_vit.config_from_native, _vit_tensors),
    "ConvNeXt": (dinov3_convnext.config_from_native, _convnext_tensors),
}
