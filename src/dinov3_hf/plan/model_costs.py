"""What a backbone holds and computes, by arithmetic on the fields of its configuration.

Without torch, so that the command line can list all models at once; tests compare with the models themselves. A
floating-point operation is one multiplication or one addition of a matrix product, an attention or a convolution,
as `torch.utils.flop_counter` counts them; what works element by element is left out.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from dinov3_hf.models.dinov3_convnext.presets import PRESETS as CONVNEXT_PRESETS
from dinov3_hf.models.dinov3_vit.presets import PRESETS as VIT_PRESETS

BYTES_OF_A_PARAMETER = {"float32": 4, "bfloat16": 2}
IMAGE_SIZES = (224, 512)

# Fields that a preset may leave out, with the defaults of the configurations.
_VIT_DEFAULTS: dict[str, Any] = {
    "patch_size": 16,
    "num_channels": 3,
    "num_register_tokens": 0,
    "use_gated_mlp": False,
    "query_bias": True,
    "key_bias": False,
    "value_bias": True,
    "proj_bias": True,
    "mlp_bias": True,
    "layerscale_value": 1.0,
    "norm_type": "layernorm",
    "untie_cls_and_patch_norms": False,
    "untie_global_and_local_cls_norm": False,
}
_CONVNEXT_DEFAULTS: dict[str, Any] = {
    "num_channels": 3,
    "hidden_sizes": (96, 192, 384, 768),
    "depths": (3, 3, 9, 3),
    "layer_scale_init_value": 1e-6,
}


@dataclass(frozen=True)
class ModelCost:
    """
    Args:
        family: Model type of the configuration.
        num_parameters: Of the backbone.
        flop: Image side in pixels -> floating-point operations of the forward of one square image.
    """

    family: str
    num_parameters: int
    flop: Mapping[int, int]

    def memory(self, dtype: str) -> int:
        """Bytes of the weights; activations come on top."""
        return self.num_parameters * BYTES_OF_A_PARAMETER[dtype]


def preset_costs() -> dict[str, ModelCost]:
    """Preset -> what it costs, smallest first in each family."""
    vits = {name: vit_cost(fields) for name, fields in VIT_PRESETS.items()}
    return vits | {name: convnext_cost(fields) for name, fields in CONVNEXT_PRESETS.items()}


def vit_cost(fields: Mapping[str, Any]) -> ModelCost:
    """Of a ViT with the given fields of `DINOv3ViTConfig`."""
    config = {**_VIT_DEFAULTS, **fields}
    return ModelCost("dinov3_vit", _vit_parameters(config), {side: _vit_flop(config, side) for side in IMAGE_SIZES})


def convnext_cost(fields: Mapping[str, Any]) -> ModelCost:
    """Of a ConvNeXt with the given fields of `DINOv3ConvNextConfig`."""
    config = {**_CONVNEXT_DEFAULTS, **fields}
    flop = {side: _convnext_flop(config, side) for side in IMAGE_SIZES}
    return ModelCost("dinov3_convnext", _convnext_parameters(config), flop)


def _vit_parameters(config: Mapping[str, Any]) -> int:
    D, F = config["hidden_size"], config["intermediate_size"]
    norm = D if config["norm_type"] == "rmsnorm" else 2 * D
    attention = 4 * D * D + D * sum(config[f"{name}_bias"] for name in ("query", "key", "value", "proj"))
    inner_matrices = 2 if config["use_gated_mlp"] else 1
    ffn = (inner_matrices + 1) * D * F + config["mlp_bias"] * (inner_matrices * F + D)
    layer_scale = 0 if config["layerscale_value"] is None else 2 * D
    patch_embedding = config["num_channels"] * config["patch_size"] ** 2 * D + D
    tokens = (2 + config["num_register_tokens"]) * D  # CLS, mask, registers
    final_norms = 1 + config["untie_cls_and_patch_norms"] + config["untie_global_and_local_cls_norm"]
    block = attention + ffn + layer_scale + 2 * norm
    return patch_embedding + tokens + config["num_hidden_layers"] * block + final_norms * norm


def _vit_flop(config: Mapping[str, Any], side: int) -> int:
    D, F = config["hidden_size"], config["intermediate_size"]
    P = (side // config["patch_size"]) ** 2
    N = 1 + config["num_register_tokens"] + P
    patch_embedding = 2 * P * D * config["num_channels"] * config["patch_size"] ** 2
    projections = 2 * N * D * (4 * D + (3 if config["use_gated_mlp"] else 2) * F)
    attention = 4 * N * N * D  # scores and their product with the values
    return patch_embedding + int(config["num_hidden_layers"]) * (projections + attention)


def _convnext_parameters(config: Mapping[str, Any]) -> int:
    widths = config["hidden_sizes"]
    layer_scale = 0 if config["layer_scale_init_value"] is None else 1
    # Depthwise 7 x 7 with bias, norm, two linear layers of 4 times the width, layer scale.
    blocks = sum(
        depth * (49 * C + C + 2 * C + 8 * C * C + 5 * C + layer_scale * C)
        for C, depth in zip(widths, config["depths"], strict=True)
    )
    stem = 16 * config["num_channels"] * widths[0] + widths[0] + 2 * widths[0]
    downsampling = sum(2 * C + 4 * C * wider + wider for C, wider in pairwise(widths))
    return stem + downsampling + blocks + 2 * widths[-1]


def _convnext_flop(config: Mapping[str, Any], side: int) -> int:
    widths = config["hidden_sizes"]
    cells = side // 4
    flop = 2 * cells**2 * 16 * config["num_channels"] * widths[0]
    for stage, (C, depth) in enumerate(zip(widths, config["depths"], strict=True)):
        if stage > 0:
            cells //= 2
            flop += 2 * cells**2 * 4 * widths[stage - 1] * C
        flop += depth * 2 * cells**2 * (49 * C + 8 * C * C)
    return int(flop)
