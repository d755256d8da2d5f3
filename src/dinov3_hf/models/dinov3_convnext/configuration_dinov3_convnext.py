"""Configuration of the DINOv3 ConvNeXt."""

from dataclasses import field
from typing import Any

from transformers import PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin

from dinov3_hf.models.dinov3_convnext.presets import PRESETS
from dinov3_hf.models.field_checks import check_drop_path_rate, check_integer, preset_fields
from dinov3_hf.models.native_variants import NativeVariantsConfigMixin

STOCK_MODEL_TYPE = "dinov3_convnext"
NATIVE_MODEL_TYPE = "dinov3_convnext_native"

# The class of transformers refuses an integer in these fields.
_FLOAT_FIELDS = ("initializer_range", "layer_norm_eps", "layer_scale_init_value", "drop_path_rate")
_STEM_STRIDE = 4


class DINOv3ConvNextConfig(NativeVariantsConfigMixin, BackboneConfigMixin, PreTrainedConfig):
    r"""
    Configuration of [`DINOv3ConvNextModel`] and [`DINOv3ConvNextBackbone`]. It has all fields of the configuration of
    the same name in transformers, with the same defaults, and the options of the original implementation.

    A network that transformers can represent is saved with `model_type` `dinov3_convnext` and opens there; any other
    is saved as `dinov3_convnext_native` (see `is_stock_representable`), with the code that opens it there.

    Args:
        num_channels (`int`, *optional*, defaults to 3):
            Channels of the images.
        hidden_sizes (`list[int]`, *optional*, defaults to `[96, 192, 384, 768]`):
            Width of each stage.
        depths (`list[int]`, *optional*, defaults to `[3, 3, 9, 3]`):
            Number of blocks of each stage.
        hidden_act (`str`, *optional*, defaults to `"gelu"`):
            Activation between the two pointwise layers of a block.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of freshly initialised matrices and convolutions.
        layer_norm_eps (`float`, *optional*, defaults to 1e-6):
            Epsilon of every norm.
        layer_scale_init_value (`float`, *optional*, defaults to 1e-6):
            Initial value of LayerScale; `None` is a network without LayerScale (the original's 0).
        drop_path_rate (`float`, *optional*, defaults to 0.0):
            Stochastic depth: in training an image skips the last block with this probability, the first with 0, the
            blocks between linearly.
        image_size (`int` or `list[int]`, *optional*, defaults to 224):
            Size that the model was trained at, for information: any size from `stride` pixels on is accepted.
        patch_size (`int`, *optional*):
            Resize the feature maps of the backbone and of `get_intermediate_layers` to the patch grid of a ViT with
            patches of this side, H // patch_size x W // patch_size. `None` leaves them at the strides of the stages.
    """

    model_type = STOCK_MODEL_TYPE
    family = "DINOv3 ConvNeXt"
    stock_model_type = STOCK_MODEL_TYPE
    native_model_type = NATIVE_MODEL_TYPE
    hidden_field = "layer_scale_init_value"
    remote_code_module = "modeling_dinov3_convnext"
    remote_code_classes = {
        "AutoConfig": "DINOv3ConvNextNativeConfig",
        "AutoModel": "DINOv3ConvNextNativeModel",
        "AutoBackbone": "DINOv3ConvNextNativeBackbone",
    }

    num_channels: int = 3
    hidden_sizes: list[int] = field(default_factory=lambda: [96, 192, 384, 768])
    depths: list[int] = field(default_factory=lambda: [3, 3, 9, 3])
    hidden_act: str = "gelu"
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-6
    layer_scale_init_value: float | None = 1e-6
    drop_path_rate: float = 0.0
    image_size: int | list[int] | tuple[int, int] = 224
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None
    patch_size: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.restore_hidden_field(kwargs)
        self.validate_architecture()
        self.stage_names = ["stem", *(f"stage{i}" for i in range(1, self.num_stages + 1))]
        self.set_output_features_output_indices(
            out_indices=kwargs.pop("out_indices", None), out_features=kwargs.pop("out_features", None)
        )
        super().__post_init__(**kwargs)

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "DINOv3ConvNextConfig":
        """
        The configuration of a released size (see `presets.PRESETS`), ready for training from scratch.

        Args:
            name (`str`): `convnext_tiny`, `convnext_small`, `convnext_base` or `convnext_large`.
            overrides: Fields that shall differ from the preset.

        Raises:
            ValueError: There is no such preset.
        """
        return cls(**{**preset_fields(name, PRESETS), **overrides})

    @property
    def is_stock_representable(self) -> bool:
        """Whether the classes of transformers return the same in eval mode from the same file."""
        return self.layer_scale_init_value is not None and self.patch_size is None

    @property
    def num_stages(self) -> int:
        """Stages, each of which halves the resolution of the one before."""
        return len(self.hidden_sizes)

    @property
    def hidden_size(self) -> int:
        """Width of the tokens that the model returns: that of the last stage."""
        return self.hidden_sizes[-1]

    @property
    def stride(self) -> int:
        """Pixels between two positions of the last feature map, along each axis."""
        return _STEM_STRIDE * 2 ** (self.num_stages - 1)

    def validate_architecture(self) -> None:
        """
        Check the fields; an integer in a real-valued field becomes a float.

        Raises:
            ValueError: A field has a value that no network can have; the message names the remedy.
        """
        for name in _FLOAT_FIELDS:
            if isinstance(self.__dict__[name], int):
                self.__dict__[name] = float(self.__dict__[name])
        check_integer("num_channels", self.num_channels, minimum=1)
        if self.patch_size is not None:
            check_integer("patch_size", self.patch_size, minimum=1)
        if not self.hidden_sizes or len(self.hidden_sizes) != len(self.depths):
            raise ValueError(
                f"hidden_sizes {self.hidden_sizes} and depths {self.depths} do not describe the same stages; "
                "give one number for each stage in both."
            )
        for name in ("hidden_sizes", "depths"):
            for index, value in enumerate(self.__dict__[name]):
                check_integer(f"{name}[{index}]", value, minimum=1)
        check_drop_path_rate(self.drop_path_rate)


class DINOv3ConvNextNativeConfig(DINOv3ConvNextConfig):
    """The same configuration under the model type of networks that transformers cannot represent."""

    model_type = NATIVE_MODEL_TYPE
