"""Configuration of dino.txt: a text tower, a frozen backbone with a head, and the space that they share."""

import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from dinov3_hf.models.dinov3_pretraining.backbones import WITHOUT_MASK_TOKEN, backbone_config_from_dict
from dinov3_hf.models.dinov3_vit.presets import PRESETS
from dinov3_hf.models.field_checks import check_drop_path_rate, check_integer
from dinov3_hf.models.remote_code import RemoteCodeConfigMixin

POOLINGS = ("argmax", "last")
# The hidden width of the vision head's SwiGLU is rounded up to a multiple of this.
SWIGLU_ALIGNMENT = 64


class DinoTxtRemoteCode(RemoteCodeConfigMixin):
    """The code of all of dino.txt, whichever part of it is saved."""

    remote_code_module = "modeling_dinotxt"
    remote_code_beside = ("processing_dinotxt", "tokenization_dinotxt")


@strict
class DinoTxtTextConfig(DinoTxtRemoteCode, PreTrainedConfig):
    r"""
    Configuration of [`DinoTxtTextModel`]. The defaults are the released text tower.

    Args:
        vocab_size (`int`, *optional*, defaults to 49408):
            Entries of the token embedding.
        max_position_embeddings (`int`, *optional*, defaults to 77):
            Tokens of a text at most, the start and the end of it included.
        hidden_size (`int`, *optional*, defaults to 1280):
            Width.
        intermediate_size (`int`, *optional*, defaults to 5120):
            Width inside the FFN.
        num_hidden_layers (`int`, *optional*, defaults to 24):
            Number of blocks.
        num_attention_heads (`int`, *optional*, defaults to 20):
            Heads of each block.
        hidden_act (`str`, *optional*, defaults to `"gelu"`):
            Activation of the FFN.
        layer_norm_eps (`float`, *optional*, defaults to 1e-5):
            Epsilon of every norm.
        layerscale_value (`float`, *optional*):
            Initial value of LayerScale; `None` is a tower without LayerScale.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of freshly initialised token embeddings; positions have half of it.
        is_causal (`bool`, *optional*, defaults to `True`):
            Whether a token sees only the tokens before it.
        num_head_layers (`int`, *optional*, defaults to 0):
            Blocks after the tower's final norm, without LayerScale, with a final norm of their own.
        head_is_causal (`bool`, *optional*, defaults to `False`):
            The same of these blocks.
        head_intermediate_size (`int`, *optional*):
            Width inside their FFN; `None` is four times the width.
        pooling (`str`, *optional*, defaults to `"argmax"`):
            The token whose features are the text's: `"argmax"`, the first one of the highest id, which is the end of
            the text; `"last"`, the last one of the context, padding included.
        projection_dim (`int`, *optional*, defaults to 2048):
            Width of the shared space, which a linear map without bias leads to; `None` is no map.
    """

    model_type = "dinotxt_text"
    base_config_key = "text_config"
    remote_code_classes = {"AutoConfig": "DinoTxtTextConfig", "AutoModel": "DinoTxtTextModel"}

    vocab_size: int = 49408
    max_position_embeddings: int = 77
    hidden_size: int = 1280
    intermediate_size: int = 5120
    num_hidden_layers: int = 24
    num_attention_heads: int = 20
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    layerscale_value: float | None = None
    initializer_range: float = 0.02
    is_causal: bool = True
    num_head_layers: int = 0
    head_is_causal: bool = False
    head_intermediate_size: int | None = None
    pooling: str = "argmax"
    projection_dim: int | None = 2048
    pad_token_id: int | None = 0
    bos_token_id: int | None = 49406
    eos_token_id: int | None = 49407

    def __post_init__(self, **kwargs: Any) -> None:
        for name in ("vocab_size", "max_position_embeddings", "intermediate_size", "num_hidden_layers"):
            check_integer(name, self.__dict__[name], minimum=1)
        check_integer("num_head_layers", self.num_head_layers, minimum=0)
        check_heads(self.hidden_size, self.num_attention_heads)
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling {self.pooling!r} is not known; use one of {', '.join(POOLINGS)}.")
        if self.head_intermediate_size is None:
            self.head_intermediate_size = 4 * self.hidden_size
        super().__post_init__(**kwargs)

    @property
    def embed_dim(self) -> int:
        """Width of a text's embedding."""
        return self.hidden_size if self.projection_dim is None else self.projection_dim


@strict
class DinoTxtVisionConfig(DinoTxtRemoteCode, PreTrainedConfig):
    r"""
    Configuration of [`DinoTxtVisionModel`]. The defaults are the head of the released ViT-L/16.

    Args:
        backbone_config (`dict` or `PreTrainedConfig`, *optional*):
            Configuration of the backbone; `None` is the released ViT-L/16. A `dict` may leave out `model_type`, which
            then is `dinov3_vit`.
        num_head_layers (`int`, *optional*, defaults to 2):
            Blocks after the backbone's final norm, on all of its tokens, without positions.
        num_attention_heads (`int`, *optional*):
            Heads of these blocks; `None` is as many as the backbone has, or one for every 64 channels of one that has
            none.
        intermediate_size (`int`, *optional*):
            Width inside their SwiGLU; `None` is 8/3 of the width, rounded up to a multiple of 64.
        layer_norm_eps (`float`, *optional*, defaults to 1e-5):
            Epsilon of the head's norms.
        layerscale_value (`float`, *optional*, defaults to 1e-5):
            Initial value of LayerScale in these blocks.
        drop_path_rate (`float`, *optional*, defaults to 0.3):
            Stochastic depth of these blocks: this share of the images skips a branch.
        use_class_token, use_patch_tokens (`bool`, *optional*, default to `True`):
            What an image's embedding consists of: CLS, the mean of the patches, or one after the other.
        projection_dim (`int`, *optional*):
            Width of the head's tokens, which a linear map without bias leads to; `None` is the backbone's width and
            no map. CLS and mean patch together have twice this width.
    """

    model_type = "dinotxt_vision"
    base_config_key = "vision_config"
    remote_code_classes = {"AutoConfig": "DinoTxtVisionConfig", "AutoModel": "DinoTxtVisionModel"}
    sub_configs = {"backbone_config": AutoConfig}  # the choice of attention reaches the backbone

    backbone_config: dict[str, Any] | PreTrainedConfig | None = None
    num_head_layers: int = 2
    num_attention_heads: int | None = None
    intermediate_size: int | None = None
    layer_norm_eps: float = 1e-5
    layerscale_value: float = 1e-5
    drop_path_rate: float = 0.3
    use_class_token: bool = True
    use_patch_tokens: bool = True
    projection_dim: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        given = PRESETS["vitl16"] if self.backbone_config is None else self.backbone_config
        self.backbone_config = backbone_config_from_dict(given)
        width = self.hidden_size
        if self.num_attention_heads is None:
            backbone = self.backbone_config
            self.num_attention_heads = max(width // 64, 1) if self.is_convolutional else backbone.num_attention_heads
        if self.intermediate_size is None:
            self.intermediate_size = -(-int(4 * width * 2 / 3) // SWIGLU_ALIGNMENT) * SWIGLU_ALIGNMENT
        check_integer("num_head_layers", self.num_head_layers, minimum=0)
        check_heads(width, self.num_attention_heads)
        check_drop_path_rate(self.drop_path_rate)
        if not self.use_class_token and not self.use_patch_tokens:
            raise ValueError("use_class_token and use_patch_tokens are both off: nothing is left; switch one on.")
        super().__post_init__(**kwargs)

    @property
    def hidden_size(self) -> int:
        """Width of the backbone."""
        width: int = self.backbone_config.hidden_size
        return width

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens of the backbone before the patches."""
        return 1 if self.is_convolutional else self.backbone_config.num_prefix_tokens

    @property
    def is_convolutional(self) -> bool:
        """Whether the backbone has neither register tokens nor heads."""
        return self.backbone_config.model_type in WITHOUT_MASK_TOKEN

    @property
    def token_dim(self) -> int:
        """Width of the head's tokens."""
        return self.hidden_size if self.projection_dim is None else self.projection_dim

    @property
    def embed_dim(self) -> int:
        """Width of an image's embedding."""
        return self.token_dim * (self.use_class_token + self.use_patch_tokens)


@strict
class DinoTxtConfig(DinoTxtRemoteCode, PreTrainedConfig):
    r"""
    Configuration of [`DinoTxtModel`].

    Args:
        text_config (`dict` or [`DinoTxtTextConfig`], *optional*):
            The text tower.
        vision_config (`dict` or [`DinoTxtVisionConfig`], *optional*):
            The backbone and its head. Its `embed_dim` has to be that of the text tower.
        logit_scale_init_value (`float`, *optional*, defaults to ln(1/0.07)):
            Initial logarithm of the factor of the similarities.
    """

    model_type = "dinotxt"
    remote_code_classes = {
        "AutoConfig": "DinoTxtConfig",
        "AutoModel": "DinoTxtModel",
        "AutoModelForZeroShotImageClassification": "DinoTxtModel",
        "AutoProcessor": "DinoTxtProcessor",
    }
    sub_configs = {"text_config": DinoTxtTextConfig, "vision_config": DinoTxtVisionConfig}

    text_config: dict[str, Any] | PreTrainedConfig | None = None
    vision_config: dict[str, Any] | PreTrainedConfig | None = None
    logit_scale_init_value: float = math.log(1 / 0.07)

    def __post_init__(self, **kwargs: Any) -> None:
        for name, config_class in self.sub_configs.items():
            given = self.__dict__[name]
            if not isinstance(given, config_class):
                fields = given.to_dict() if isinstance(given, PreTrainedConfig) else dict(given or {})
                self.__dict__[name] = config_class(**fields)
        if self.text_config.embed_dim != self.vision_config.embed_dim:
            raise ValueError(
                f"a text's embedding has {self.text_config.embed_dim} features and an image's "
                f"{self.vision_config.embed_dim}; set the projection_dim of text_config to "
                f"{self.vision_config.embed_dim}."
            )
        super().__post_init__(**kwargs)


def check_heads(width: int, heads: int) -> None:
    """Raise ValueError unless `width` can be split into `heads` parts."""
    check_integer("hidden_size", width, minimum=1)
    check_integer("num_attention_heads", heads, minimum=1)
    if width % heads != 0:
        nearest = max(round(width / heads), 1) * heads
        raise ValueError(
            f"hidden_size {width} cannot be split into {heads} heads; use hidden_size {nearest} or another "
            "num_attention_heads."
        )
