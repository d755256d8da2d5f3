"""All file formats and architectures that the converter knows, beside the Hub's own format."""

from collections.abc import Collection

from transformers import PreTrainedConfig

from dinov3_hf.convert.dinov3_convnext import NATIVE_CONVNEXT
from dinov3_hf.convert.dinov3_vit import NATIVE_VIT
from dinov3_hf.convert.file_format import FileFormat
from dinov3_hf.convert.timm_convnext import TIMM_CONVNEXT
from dinov3_hf.convert.timm_vit import TIMM_VIT
from dinov3_hf.errors import ArgumentError, did_you_mean
from dinov3_hf.models.dinov3_convnext.configuration_dinov3_convnext import DINOv3ConvNextConfig
from dinov3_hf.models.dinov3_convnext.presets import PRESETS as CONVNEXT_PRESETS
from dinov3_hf.models.dinov3_vit.configuration_dinov3_vit import DINOv3ViTConfig
from dinov3_hf.models.dinov3_vit.presets import PRESETS as VIT_PRESETS

FORMATS: tuple[FileFormat, ...] = (NATIVE_VIT, NATIVE_CONVNEXT, TIMM_VIT, TIMM_CONVNEXT)
# Names of released architectures -> the configuration class whose `from_preset` takes them.
ARCHITECTURES: dict[str, type[DINOv3ViTConfig] | type[DINOv3ConvNextConfig]] = {
    **dict.fromkeys(VIT_PRESETS, DINOv3ViTConfig),
    **dict.fromkeys(CONVNEXT_PRESETS, DINOv3ConvNextConfig),
}


def architecture_config(name: str) -> PreTrainedConfig:
    """
    The configuration of a released architecture.

    Raises:
        ArgumentError: There is none of this name.
    """
    if name not in ARCHITECTURES:
        raise ArgumentError(f"architecture {name!r} is not known; {did_you_mean(name, ARCHITECTURES)}")
    return ARCHITECTURES[name].from_preset(name)


def recognise(names: Collection[str]) -> FileFormat | None:
    """The format of a state dict with these names."""
    return next((each for each in FORMATS if each.recognises(names)), None)


def format_of(name: str, config: PreTrainedConfig) -> FileFormat:
    """
    The format of this name for networks of this configuration.

    Raises:
        ValueError: There is none.
    """
    for each in FORMATS:
        if each.name == name and config.model_type in each.model_types:
            return each
    raise ValueError(f"there is no {name!r} format of {config.model_type} networks; convert to another format.")
