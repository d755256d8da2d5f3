"""The trained model that continued pre-training starts from: what its folder says, before any weights are read."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor, PreTrainedConfig

from dinov3_hf.errors import ArgumentError
from dinov3_hf.hub.architecture import read_json
from dinov3_hf.models.dinov3_pretraining.backbones import BACKBONES, WITHOUT_MASK_TOKEN, patch_side
from dinov3_hf.models.image_channels import ChannelStatistics

_TEACHER = "teacher"
_FILES = (".pth", ".pt", ".safetensors", ".bin")


@dataclass(frozen=True)
class StartingModel:
    """A DINOv3 ViT or ConvNeXt in a folder or on the Hub.

    Attributes:
        source: the model folder, or OWNER/NAME.
        config: of the backbone.
        statistics: of the images that it was trained on.
    """

    source: str
    config: PreTrainedConfig
    statistics: ChannelStatistics

    @property
    def has_mask_token(self) -> bool:
        return self.config.model_type not in WITHOUT_MASK_TOKEN

    @property
    def patch_side(self) -> int:
        return patch_side(self.config)

    @property
    def image_size(self) -> int:
        """Side in pixels of the images that it was trained on; of several sides the shorter."""
        size = self.config.image_size
        return size if isinstance(size, int) else min(size)


@lru_cache(maxsize=8)
def read_starting_model(model: str | None) -> StartingModel:
    """
    Look at a model without reading its weights.

    Args:
        model: a model folder, the output folder of a run, or OWNER/NAME on the Hub.

    Raises:
        ArgumentError: None was given.
        FileNotFoundError: there is no such model.
        ValueError: it is in another format, of another family, or damaged.
    """
    if model is None:
        raise ArgumentError("model is not set; name the model to start from, for example --model OWNER/NAME.")
    source = _source(model)
    try:
        fields, _ = PreTrainedConfig.get_config_dict(source)
    except OSError as error:
        if Path(source).is_dir():
            raise ValueError(f"{source}/config.json cannot be read; copy or download the folder again.") from error
        raise FileNotFoundError(
            f"there is no model folder {model}, and as a Hub repository it fails: {str(error).splitlines()[0]}"
        ) from error
    model_type = fields.get("model_type")
    if model_type is None and "architecture" in fields:
        raise ValueError(f"model {model} is in timm's format; {_convert(model)}.")
    if model_type not in BACKBONES:
        raise ValueError(
            f"model {model} is a {model_type!r} model; continued pre-training takes a DINOv3 ViT or ConvNeXt "
            f"({', '.join(BACKBONES)})."
        )
    config_class, _ = BACKBONES[model_type]
    return StartingModel(source, config_class.from_dict(fields), _statistics(source))


def _source(model: str) -> str:
    path = Path(model).expanduser()
    if path.is_file() or path.suffix in _FILES:
        if not path.is_file():
            raise FileNotFoundError(f"there is no model {model}; name a model folder, or OWNER/NAME on the Hub.")
        raise ValueError(f"model {model} is a file; {_convert(model)}.")
    if path.is_dir():
        for folder in (path, path / _TEACHER):
            if (folder / "config.json").is_file() and not _is_checkpoint(folder):
                return str(folder)
        raise FileNotFoundError(
            f"{model} holds no config.json; name a model folder, such as {model}/teacher of a run."
        )
    if model.count("/") != 1 or model.startswith((".", "/", "~")) or path.parent.is_dir():
        raise FileNotFoundError(f"there is no model folder {model}; name one that exists, or OWNER/NAME on the Hub.")
    return model


def _is_checkpoint(folder: Path) -> bool:
    return bool(read_json(folder / "config.json").get("model_type") == "dinov3_pretraining")


def _convert(model: str) -> str:
    folder = Path(model).name.split(".")[0] + "_hf"
    return f"convert it first, dinov3-hf convert {model} {folder} --to hf, and give --model {folder}"


def _statistics(source: str) -> ChannelStatistics:
    try:
        processor: Any = AutoImageProcessor.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{source} has no image processor (preprocessor_config.json), which says how its images are normalised; "
            "copy the one of the original model into it."
        ) from error
    return ChannelStatistics(tuple(processor.image_mean), tuple(processor.image_std))
