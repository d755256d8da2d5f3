"""Configuration of the DINOv3 vision transformer."""

from typing import Any

from transformers import PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin

from dinov3_hf.models.dinov3_vit.presets import PRESETS
from dinov3_hf.models.field_checks import check_drop_path_rate, check_integer, preset_fields
from dinov3_hf.models.native_variants import NativeVariantsConfigMixin

STOCK_MODEL_TYPE = "dinov3_vit"
NATIVE_MODEL_TYPE = "dinov3_vit_native"

NORM_TYPES = ("layernorm", "rmsnorm")
COORDINATE_NORMALIZATIONS = ("separate", "min", "max")
ROPE_DTYPES = ("float32", "bfloat16")

# The class of transformers refuses an integer in these fields.
_FLOAT_FIELDS = (
    *("attention_dropout", "initializer_range", "layer_norm_eps", "layerscale_value", "drop_path_rate", "rope_theta"),
    *("rope_min_period", "rope_max_period", "pos_embed_shift", "pos_embed_jitter", "pos_embed_rescale"),
)
_POSITIVE_FIELDS = (
    *("patch_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    "num_channels",
)


class DINOv3ViTConfig(NativeVariantsConfigMixin, BackboneConfigMixin, PreTrainedConfig):
    r"""
    Configuration of [`DINOv3ViTModel`] and [`DINOv3ViTBackbone`]. It has all fields of the configuration of the same
    name in transformers, with the same defaults, and the options of the original implementation.

    A network that transformers can represent is saved with `model_type` `dinov3_vit` and opens there; any other is
    saved as `dinov3_vit_native` (see `is_stock_representable`), with the code that opens it there.

    Args:
        patch_size (`int`, *optional*, defaults to 16):
            Side of a patch in pixels.
        hidden_size (`int`, *optional*, defaults to 384):
            Width.
        intermediate_size (`int`, *optional*, defaults to 1536):
            Width inside the FFN.
        num_hidden_layers (`int`, *optional*, defaults to 12):
            Number of blocks.
        num_attention_heads (`int`, *optional*, defaults to 6):
            Heads; the width of a head must be a multiple of 4 (two axes, pairs of values).
        hidden_act (`str`, *optional*, defaults to `"gelu"`):
            Activation of the FFN; `"silu"` with `use_gated_mlp` is SwiGLU.
        attention_dropout (`float`, *optional*, defaults to 0.0):
            Dropout of attention probabilities.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of freshly initialised matrices and tokens.
        layer_norm_eps (`float`, *optional*, defaults to 1e-5):
            Epsilon of every norm.
        rope_theta (`float`, *optional*, defaults to 100.0):
            Base period of the rotary embedding; `None` when the minimal and maximal period are given.
        image_size (`int` or `list[int]`, *optional*, defaults to 224):
            Size that the model was trained at, for information: any size is accepted.
        num_channels (`int`, *optional*, defaults to 3):
            Channels of the images.
        query_bias, key_bias, value_bias (`bool`, *optional*, default to `True`, `False`, `True`):
            Biases of the attention projections.
        proj_bias (`bool`, *optional*, defaults to `True`):
            Bias of the projection after attention.
        mlp_bias (`bool`, *optional*, defaults to `True`):
            Biases of the FFN.
        layerscale_value (`float`, *optional*, defaults to 1.0):
            Initial value of LayerScale; `None` is a network without LayerScale.
        drop_path_rate (`float`, *optional*, defaults to 0.0):
            Stochastic depth: this share of the images skips a branch, the same in every block.
        use_gated_mlp (`bool`, *optional*, defaults to `False`):
            Gated FFN (`gate_proj`, `up_proj`, `down_proj`).
        num_register_tokens (`int`, *optional*, defaults to 0):
            Register (storage) tokens between CLS and patches.
        pos_embed_shift (`float`, *optional*):
            In training, shift of the coordinates, uniform in [-s, s], one per axis.
        pos_embed_jitter (`float`, *optional*):
            In training, factor of the coordinates, log-uniform in [1/j, j], one per axis.
        pos_embed_rescale (`float`, *optional*, defaults to 2.0):
            In training, factor of the coordinates, log-uniform in [1/r, r], one for both axes.
        apply_layernorm (`bool`, *optional*, defaults to `True`):
            As a backbone: apply the final norm to every feature map.
        reshape_hidden_states (`bool`, *optional*, defaults to `True`):
            As a backbone: feature maps are (B, D, h, w), else (B, P, D).
        return_class_token (`bool`, *optional*, defaults to `False`):
            As a backbone: also return the CLS token of each feature map.
        class_token_in_feature_maps (`bool`, *optional*, defaults to `False`):
            As a backbone without `reshape_hidden_states`: CLS stands before the patches, (B, 1 + P, D), as
            `DPTForDepthEstimation` of transformers wants its feature maps.
        norm_type (`str`, *optional*, defaults to `"layernorm"`):
            `"layernorm"` or `"rmsnorm"`.
        untie_cls_and_patch_norms (`bool`, *optional*, defaults to `False`):
            A final norm of their own, `cls_norm`, for CLS and register tokens.
        untie_global_and_local_cls_norm (`bool`, *optional*, defaults to `False`):
            A final norm of their own, `local_cls_norm`, for CLS and register tokens of the second entry of a crop list
            in training. It plays no part afterwards and is saved in `extras.safetensors`.
        rope_normalize_coords (`str`, *optional*, defaults to `"separate"`):
            Coordinates are divided by each side's own length, or both by the shorter (`"min"`) or longer (`"max"`).
        rope_min_period, rope_max_period (`float`, *optional*):
            The other parametrisation of the periods: geometric from minimum to maximum.
        rope_dtype (`str`, *optional*, defaults to `"float32"`):
            `"float32"` or `"bfloat16"`, in which the rotation tables are computed and queries and keys are rotated.
        rope_periods_dtype (`str`, *optional*, defaults to `"float32"`):
            `"float32"`, or `"bfloat16"` for periods that are computed in bfloat16, as in the original's training;
            released files hold such periods, and the original uses them as they are.
        rope_augmentation_per_block (`bool`, *optional*, defaults to `True`):
            Whether each block draws its own shift, jitter and rescale, or all blocks share one draw per forward.
    """

    model_type = STOCK_MODEL_TYPE
    family = "DINOv3 ViT"
    stock_model_type = STOCK_MODEL_TYPE
    native_model_type = NATIVE_MODEL_TYPE
    hidden_field = "rope_theta"
    remote_code_module = "modeling_dinov3_vit"
    remote_code_classes = {
        "AutoConfig": "DINOv3ViTNativeConfig",
        "AutoModel": "DINOv3ViTNativeModel",
        "AutoBackbone": "DINOv3ViTNativeBackbone",
    }

    patch_size: int | list[int] | tuple[int, int] = 16
    hidden_size: int = 384
    intermediate_size: int = 1536
    num_hidden_layers: int = 12
    num_attention_heads: int = 6
    hidden_act: str = "gelu"
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-5
    rope_theta: float | None = 100.0
    image_size: int | list[int] | tuple[int, int] = 224
    num_channels: int = 3
    query_bias: bool = True
    key_bias: bool = False
    value_bias: bool = True
    proj_bias: bool = True
    mlp_bias: bool = True
    layerscale_value: float | None = 1.0
    drop_path_rate: float = 0.0
    use_gated_mlp: bool = False
    num_register_tokens: int = 0
    pos_embed_shift: float | None = None
    pos_embed_jitter: float | None = None
    pos_embed_rescale: float | None = 2.0
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None
    apply_layernorm: bool = True
    reshape_hidden_states: bool = True
    return_class_token: bool = False
    class_token_in_feature_maps: bool = False
    norm_type: str = "layernorm"
    untie_cls_and_patch_norms: bool = False
    untie_global_and_local_cls_norm: bool = False
    rope_normalize_coords: str = "separate"
    rope_min_period: float | None = None
    rope_max_period: float | None = None
    rope_dtype: str = "float32"
    rope_periods_dtype: str = "float32"
    rope_augmentation_per_block: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        self.restore_hidden_field(kwargs)
        self.validate_architecture()
        self.stage_names = ["stem", *(f"stage{i}" for i in range(1, self.num_hidden_layers + 1))]
        self.set_output_features_output_indices(
            out_indices=kwargs.pop("out_indices", None), out_features=kwargs.pop("out_features", None)
        )
        super().__post_init__(**kwargs)

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "DINOv3ViTConfig":
        """
        The configuration of a released size (see `presets.PRESETS`), ready for training from scratch.

        Args:
            name (`str`): `vits16`, `vits16plus`, `vitb16`, `vitl16`, `vitl16plus`, `vith16plus` or `vit7b16`.
            overrides: Fields that shall differ from the preset.

        Raises:
            ValueError: There is no such preset.
        """
        return cls(**{**preset_fields(name, PRESETS), **overrides})

    @property
    def is_stock_representable(self) -> bool:
        """
        Whether the classes of transformers compute the same function in eval mode from the same file.

        What acts in training only (RoPE augmentation, stochastic depth, the local CLS norm) does not count.
        """
        return (
            self.norm_type == "layernorm"
            and self.layerscale_value is not None
            and not self.untie_cls_and_patch_norms
            and self.rope_theta is not None
            and self.rope_normalize_coords == "separate"
            and self.rope_dtype == "float32"
            and self.rope_periods_dtype == "float32"
            and not self.class_token_in_feature_maps
        )

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches: CLS and registers."""
        return 1 + self.num_register_tokens

    def validate_architecture(self) -> None:
        """
        Check the fields; a pair of equal patch sides becomes one number, an integer in a real-valued field a float.

        Raises:
            ValueError: A field has a value that no network can have; the message names the remedy.
        """
        if isinstance(self.patch_size, (list, tuple)):
            if len(set(self.patch_size)) != 1:
                raise ValueError(f"patch_size {list(self.patch_size)} is not square; give one number.")
            self.patch_size = self.patch_size[0]
        for name in _FLOAT_FIELDS:
            if isinstance(self.__dict__[name], int):
                self.__dict__[name] = float(self.__dict__[name])
        for name in _POSITIVE_FIELDS:
            check_integer(name, self.__dict__[name], minimum=1)
        check_integer("num_register_tokens", self.num_register_tokens, minimum=0)

        heads = self.num_attention_heads
        if self.hidden_size % (4 * heads) != 0:
            nearest = max(round(self.hidden_size / (4 * heads)), 1) * 4 * heads
            raise ValueError(
                f"hidden_size {self.hidden_size} cannot be split into {heads} heads whose width is a multiple of 4, "
                f"as RoPE needs; use hidden_size {nearest} or another num_attention_heads."
            )
        check_drop_path_rate(self.drop_path_rate)

        periods = (self.rope_min_period, self.rope_max_period)
        if self.rope_theta is None and None in periods:
            raise ValueError(
                "the RoPE periods are not defined; give rope_theta, or rope_min_period and rope_max_period."
            )
        if self.rope_theta is not None and periods != (None, None):
            raise ValueError(
                "the RoPE periods are defined twice; with rope_min_period and rope_max_period set rope_theta=None."
            )

        if self.class_token_in_feature_maps and self.reshape_hidden_states:
            raise ValueError(
                "class_token_in_feature_maps finds no place in maps (B, D, h, w); set reshape_hidden_states=False."
            )

        for name, allowed in (
            ("norm_type", NORM_TYPES),
            ("rope_normalize_coords", COORDINATE_NORMALIZATIONS),
            ("rope_dtype", ROPE_DTYPES),
            ("rope_periods_dtype", ROPE_DTYPES),
        ):
            if self.__dict__[name] not in allowed:
                raise ValueError(f"{name} {self.__dict__[name]!r} is not known; use one of {', '.join(allowed)}.")
        for name in ("pos_embed_jitter", "pos_embed_rescale"):
            factor = self.__dict__[name]
            if factor is not None and factor < 1:
                raise ValueError(
                    f"{name} {factor} is below 1, but factors are drawn from [1/x, x]; use {1 / factor:g}."
                )


class DINOv3ViTNativeConfig(DINOv3ViTConfig):
    """The same configuration under the model type of networks that transformers cannot represent."""

    model_type = NATIVE_MODEL_TYPE
