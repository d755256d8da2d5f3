"""What the named models hold and compute for one image, for the command line to list.

Without torch, so that the command line can list all models at once; tests compare with the models themselves.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dinov3_hf.models.dinov3_convnext.presets import PRESETS as CONVNEXT_PRESETS
from dinov3_hf.models.dinov3_vit.presets import PRESETS as VIT_PRESETS
from dinov3_hf.plan.backbones import ConvNext, ViT

BYTES_OF_A_PARAMETER = {"float32": 4, "bfloat16": 2}
IMAGE_SIZES = (224, 512)


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
    return _cost("dinov3_vit", ViT(fields))


def convnext_cost(fields: Mapping[str, Any]) -> ModelCost:
    """Of a ConvNeXt with the given fields of `DINOv3ConvNextConfig`."""
    return _cost("dinov3_convnext", ConvNext(fields))


def _cost(family: str, backbone: ViT | ConvNext) -> ModelCost:
    flop = {side: backbone.flop(side).forward for side in IMAGE_SIZES}
    return ModelCost(family, backbone.num_parameters, flop)
