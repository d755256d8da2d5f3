"""The trained model that continued pre-training starts from: what its folder says, before any weights are read."""

from dataclasses import dataclass
from functools import lru_cache

from transformers import PreTrainedConfig

from dinov3_hf.errors import ArgumentError
from dinov3_hf.models.dinov3_pretraining.backbones import BACKBONES, WITHOUT_MASK_TOKEN, patch_side
from dinov3_hf.models.image_channels import ChannelStatistics
from dinov3_hf.training.model_source import how_to_convert, locate_model, read_fields, read_statistics


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
    source = locate_model(model, "model")
    fields = read_fields(source, model, "model")
    model_type = fields.get("model_type")
    if "architecture" in fields:
        raise ValueError(f"model {model} is in timm's format; {how_to_convert(model, 'model')}.")
    if model_type not in BACKBONES:
        raise ValueError(
            f"model {model} is a {model_type!r} model; continued pre-training takes a DINOv3 ViT or ConvNeXt "
            f"({', '.join(BACKBONES)})."
        )
    config_class, _ = BACKBONES[model_type]
    return StartingModel(source, config_class.from_dict(fields), read_statistics(source))
