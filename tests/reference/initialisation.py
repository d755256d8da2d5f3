"""JSON files with statistics of every tensor of freshly initialised networks."""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dinov3_hf.convert import dinotxt, dinov3_convnext
from dinov3_hf.convert.dinov3_vit import config_from_native, state_dict_to_native
from dinov3_hf.convert.lazy_tensor import LazyTensor, read_all
from dinov3_hf.models.dinotxt.configuration_dinotxt import DinoTxtConfig
from dinov3_hf.models.dinotxt.modeling_dinotxt import DinoTxtModel
from dinov3_hf.models.dinov3_convnext.modeling_dinov3_convnext import DINOv3ConvNextModel
from dinov3_hf.models.dinov3_pretraining.configuration_dinov3_pretraining import DINOv3PreTrainingConfig
from dinov3_hf.models.dinov3_pretraining.modeling_dinov3_pretraining import DINOv3ForPreTraining
from dinov3_hf.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTModel
from dinov3_hf.models.dinov3_vit.rope import RopeParameters, rope_periods

from .compare import Comparison
from .masking import STANDARD_ERRORS

# Not random: their statistics are exact.
BUFFERS = ("rope_embed.periods", "bias_mask")

Statistics = Mapping[str, Any]  # shape, and constant, or mean, std, min, max


def is_initialisation(content: Any) -> bool:
    """Whether a JSON file holds networks as mappings of tensor names to statistics."""
    return isinstance(content, dict) and any(_is_network(section) for section in content.values())


def check_initialisation(content: dict[str, Any], compare: Comparison) -> None:
    """Constants exactly, moments and extremes within the sampling error; sizes are read from the shapes."""
    torch.manual_seed(0)
    for section, statistics in content.items():
        if not _is_network(statistics):
            continue
        if "patch_embed.proj.weight" in statistics:
            tensors = _vit(statistics)
        elif "stages.0.0.dwconv.weight" in statistics:
            tensors = _convnext(statistics)
        elif any(name.endswith("running_mean") and name.startswith("mlp.") for name in statistics):
            compare.notes.append(f"declined: batch norm in the prototype head ({section})")
            continue
        elif "text_model.backbone.positional_embedding" in statistics:
            tensors = _dinotxt(statistics)
        elif "last_layer.weight" in statistics:
            tensors = _prototype_head(statistics)
        else:
            compare.notes.append(f"not in the package yet: {section} ({len(statistics)} tensors)")
            continue
        for name, recorded in statistics.items():
            label = f"{section}/{name}"
            if name in tensors:
                _compare_tensor(compare, label, tensors[name], recorded)
            else:
                compare.misses.append(f"{label}: not compared")


def _is_network(section: Any) -> bool:
    return isinstance(section, dict) and all(isinstance(v, dict) and "shape" in v for v in section.values())


def _vit(statistics: Mapping[str, Statistics]) -> dict[str, Tensor]:
    """A fresh ViT of the recorded sizes, under native names."""
    shapes = {name: entry["shape"] for name, entry in statistics.items()}
    width, channels, patch_size, _ = shapes["patch_embed.proj.weight"]
    head_dim = 4 * shapes["rope_embed.periods"][0]
    gated = "blocks.0.mlp.w1.weight" in shapes
    hidden = shapes["blocks.0.mlp.w1.weight" if gated else "blocks.0.mlp.fc1.weight"][0]
    layer_scale = statistics.get("blocks.0.ls1.gamma", {}).get("constant")
    config = config_from_native(
        {
            "embed_dim": width,
            "depth": len({match[1] for name in shapes if (match := re.match(r"blocks\.(\d+)\.", name))}),
            "num_heads": width // head_dim,
            "patch_size": patch_size,
            "in_chans": channels,
            "ffn_layer": "swiglu" if gated else "mlp",
            # The original takes 2/3 of the width of a SwiGLU, and the integer part; 0.5 keeps clear of rounding.
            "ffn_ratio": ((1.5 if gated else 1) * hidden + 0.5) / width,
            "ffn_bias": any(".mlp." in name and name.endswith("bias") for name in shapes),
            "proj_bias": "blocks.0.attn.proj.bias" in shapes,
            "qkv_bias": "blocks.0.attn.qkv.bias" in shapes,
            "mask_k_bias": "blocks.0.attn.qkv.bias_mask" in shapes,
            "layerscale_init": layer_scale,
            "norm_layer": "layernorm" if "norm.bias" in shapes else "rmsnorm",
            "n_storage_tokens": shapes["storage_tokens"][1] if "storage_tokens" in shapes else 0,
            "untie_cls_and_patch_norms": "cls_norm.weight" in shapes,
            "untie_global_and_local_cls_norm": "local_cls_norm.weight" in shapes,
            **_rope(statistics["rope_embed.periods"]),
        }
    )
    return state_dict_to_native(DINOv3ViTModel(config).state_dict(), config)


def _convnext(statistics: Mapping[str, Statistics]) -> dict[str, Tensor]:
    """A fresh ConvNeXt of the recorded sizes, under native names."""
    shapes = {name: LazyTensor.full(entry["shape"], 0, torch.float32) for name, entry in statistics.items()}
    config = dinov3_convnext.read_config(shapes)
    tensors = DINOv3ConvNextModel(config).state_dict()
    return read_all(dinov3_convnext.from_hf({n: LazyTensor.of(t) for n, t in tensors.items()}, config).tensors)


def _rope(periods: Statistics) -> dict[str, Any]:
    """The arguments, in the order of how usual they are, that come closest to the recorded periods."""
    (count,) = periods["shape"]
    recorded = [periods.get("constant", periods.get(name)) for name in ("min", "mean", "max")]
    low, high = recorded[0], recorded[-1]
    base = float(f"{high ** (count / max(count - 1, 1)):.3g}")  # the longest period is base^((count - 1) / count)
    extremes = {"pos_embed_rope_min_period": low, "pos_embed_rope_max_period": high, "pos_embed_rope_base": None}
    candidates = [
        {**arguments, "pos_embed_rope_dtype": dtype}
        for arguments in ({"pos_embed_rope_base": 100.0}, {"pos_embed_rope_base": base}, extremes)
        for dtype in ("fp32", "bf16")
    ]

    def distance(arguments: dict[str, Any]) -> float:
        config = config_from_native({"embed_dim": 4 * count, "depth": 1, "num_heads": 1, **arguments})
        ours = rope_periods(RopeParameters.from_config(config)).double()
        errors = torch.stack([ours.min(), ours.mean(), ours.max()]) / torch.tensor(recorded) - 1
        return round(errors.abs().max().item(), 6)

    return min(candidates, key=distance)


def _prototype_head(statistics: Mapping[str, Statistics]) -> dict[str, Tensor]:
    """A fresh head of the recorded sizes, as pre-training makes it."""
    linear = [name for name in statistics if re.fullmatch(r"mlp(\.\d+)?\.weight", name)]
    num_prototypes, bottleneck_dim = statistics["last_layer.weight"]["shape"]
    hidden_dim, width = statistics[linear[0]]["shape"]
    head = {
        "num_prototypes": num_prototypes,
        "bottleneck_dim": bottleneck_dim,
        "hidden_dim": hidden_dim,
        "num_layers": len(linear),
        "mlp_bias": any(name.endswith("bias") for name in statistics),
    }
    backbone = {"hidden_size": width, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = DINOv3ForPreTraining(
        DINOv3PreTrainingConfig(backbone_config=backbone, dino_head=head, ibot_head={**head, "num_prototypes": 1})
    )
    return model.student.dino_head.state_dict()


def _dinotxt(statistics: Mapping[str, Statistics]) -> dict[str, Tensor]:
    """A fresh dino.txt of the recorded sizes, under native names; the backbone was not recorded."""
    shapes = {name: entry["shape"] for name, entry in statistics.items()}
    vocab_size, width = shapes["text_model.backbone.token_embedding.weight"]
    text = "text_model.backbone.blocks"
    vision = "visual_model.head.blocks"

    def num_blocks(prefix: str) -> int:
        return len({match[1] for name in shapes if (match := re.match(rf"{prefix}\.(\d+)\.", name))})

    vision_width = shapes["visual_model.head.ln_final.weight"][0]
    backbone = {"hidden_size": vision_width, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = DinoTxtConfig(
        text_config={
            "vocab_size": vocab_size,
            "max_position_embeddings": shapes["text_model.backbone.positional_embedding"][0],
            "hidden_size": width,
            "intermediate_size": shapes[f"{text}.0.feed_forward.fc1.weight"][0],
            "num_hidden_layers": num_blocks(text),
            "num_attention_heads": 1,
            "projection_dim": shapes["text_model.head.linear_projection.weight"][0],
            "bos_token_id": None,
            "eos_token_id": None,
        },
        vision_config={"backbone_config": backbone, "num_head_layers": num_blocks(vision)},
    )
    return dinotxt.state_dict_to_native(DinoTxtModel(config).state_dict(), config)


def _compare_tensor(compare: Comparison, label: str, ours: Tensor, recorded: Statistics) -> None:
    compare.check_pair(f"{label}/shape", torch.tensor(ours.shape), torch.tensor(recorded["shape"]))
    values = ours.double().flatten()
    if "constant" in recorded:
        compare.check_pair(label, values, torch.full_like(values, recorded["constant"]), rtol=1e-7)
        return
    std = values.std().item()
    errors = dict.fromkeys(("mean", "std", "min", "max"), 0.0) if label.endswith(BUFFERS) else _sampling_errors(values)
    ours = {"mean": values.mean().item(), "std": std, "min": values.min().item(), "max": values.max().item()}
    for name, value in ours.items():
        compare.check_pair(f"{label}/{name}", value, recorded[name], rtol=1e-6, atol=errors[name])


def _sampling_errors(values: Tensor) -> dict[str, float]:
    """Tolerances of statistics of two samples of this size; extremes as of a normal distribution."""
    count, std = len(values), values.std().item()
    mean = STANDARD_ERRORS * math.sqrt(2 / count) * std
    if std == 0:
        return dict.fromkeys(("mean", "std", "min", "max"), 0.0)  # ours is constant
    kurtosis = ((values - values.mean()) ** 4).mean().item() / std**4
    extremes = STANDARD_ERRORS * math.sqrt(2) * math.pi / math.sqrt(12 * math.log(count)) * std
    return {"mean": mean, "std": mean * math.sqrt((kurtosis - 1) / 4), "min": extremes, "max": extremes}
