"""The fixed teacher of a distillation, from any source: what is known of it before its weights are read, its weights,
and its tokens for crops.

Letters: I crops, C channels, H and W pixels, h and w rows and columns of patches, N = h * w, D width of the teacher.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from dinov3_hf.errors import ArgumentError
from dinov3_hf.evals.features import load_weights
from dinov3_hf.hub.architecture import WEIGHTS, network_summary, open_safetensors
from dinov3_hf.models.dinov3_pretraining.backbones import BACKBONES, WITHOUT_MASK_TOKEN, patch_side
from dinov3_hf.models.dinov3_pretraining.prototype_head import PrototypeHead
from dinov3_hf.models.image_channels import ChannelStatistics
from dinov3_hf.training.memory import blocks_of, set_forwards
from dinov3_hf.training.model_source import locate_model, no_image_processor, read_fields, read_statistics
from dinov3_hf.training.teacher_folder import HEADS_FILE, read_head_shapes

_TIMM = "timm_wrapper"
_PROBE_SIZE = 256  # pixels; every ConvNet takes it


@dataclass(frozen=True)
class _Family:
    """How the outputs of a family of transformers are read. Its `last_hidden_state` is normalised.

    Args:
        has_cls: the first of its tokens is CLS; otherwise `pooler_output` takes that place.
        has_tokens: `last_hidden_state` is [prefix tokens, patches] (I, T, D), not a feature map (I, D, h, w).
        options: of its forward pass, for crops of any size.
    """

    has_cls: bool
    has_tokens: bool = True
    options: Mapping[str, Any] | None = None


_INTERPOLATE = {"interpolate_pos_encoding": True}
# A family whose last_hidden_state is not normalised (clip), or that shuffles its patches (vit_mae), has no place here.
_FAMILIES = {
    "deit": _Family(has_cls=True, options=_INTERPOLATE),
    "dinov2": _Family(has_cls=True),
    "dinov2_with_registers": _Family(has_cls=True),
    "vit": _Family(has_cls=True, options=_INTERPOLATE),
    "vit_msn": _Family(has_cls=True, options=_INTERPOLATE),
    "siglip_vision_model": _Family(has_cls=False, options=_INTERPOLATE),
    "convnext": _Family(has_cls=False, has_tokens=False),
    "convnextv2": _Family(has_cls=False, has_tokens=False),
    "regnet": _Family(has_cls=False, has_tokens=False),
    "resnet": _Family(has_cls=False, has_tokens=False),
}


@dataclass(frozen=True)
class TeacherDescription:
    """
    A teacher, looked at; no weights are read yet.

    Args:
        source: the model folder, or OWNER/NAME on the Hub.
        summary: one line for people.
        width: D.
        patch_size: side of a patch in pixels; None for a ConvNet.
        stride: pixels between two patches, or between two positions of a ConvNet's last feature map.
        num_channels: C of its images.
        statistics: what pixel values in [0, 1] are normalised with for it.
        heads: `dino_head` and `ibot_head` -> arguments of [`PrototypeHead`] beside `in_dim`; empty where the folder
            has no `heads.safetensors`.
        model_type: of its configuration.
        has_cls: the first of its tokens is CLS; otherwise its own pooling takes that place.
    """

    source: str
    summary: str
    width: int
    patch_size: int | None
    stride: int
    num_channels: int
    statistics: ChannelStatistics
    heads: dict[str, dict[str, Any]]
    model_type: str
    has_cls: bool

    def check_crop(self, size: int) -> None:
        """
        Raises:
            ValueError: the teacher does not take crops of `size` x `size` pixels.
        """
        if size < self.stride or size % self.stride:
            below = size // self.stride * self.stride
            nearest = f"{below} or {below + self.stride}" if below else f"{self.stride}"
            what = "patch size" if self.patch_size is not None else "stride"
            raise ValueError(
                f"crops of {size} pixels are no multiple of the {what} {self.stride} of the teacher {self.source}; "
                f"use {nearest}."
            )
        if self.model_type not in BACKBONES:
            _run_on_meta(self.source, size)


class TeacherTokens(NamedTuple):
    """What a teacher says of I crops, as the model gives it after its last norm, in the dtype of its weights.

    Attributes:
        cls: (I, D).
        patches: (I, h * w, D), row by row from the top left.
        grid: h, w.
    """

    cls: Tensor
    patches: Tensor
    grid: tuple[int, int]


class DistillationTeacher(nn.Module):
    """
    A teacher that never changes: no parameter asks for a gradient, and it stays in evaluation mode.

    Args:
        description: of `read_teacher`.
        backbone: with its weights.
        dino_head, ibot_head: with their weights, of a teacher that has them.
    """

    def __init__(
        self,
        description: TeacherDescription,
        backbone: PreTrainedModel,
        dino_head: PrototypeHead | None = None,
        ibot_head: PrototypeHead | None = None,
    ) -> None:
        super().__init__()
        self.description = description
        self.backbone = backbone
        self.dino_head = dino_head
        self.ibot_head = ibot_head
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode, in which there are no random draws."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, crops: Tensor) -> TeacherTokens:
        """
        Args:
            crops: (I, C, H, W), normalised with `description.statistics`; sides that `check_crop` accepts.
        """
        with torch.autocast(crops.device.type, enabled=False):
            return _tokens(self.backbone, crops.to(self.backbone.dtype), self.description)

    def blocks(self) -> list[nn.Module]:
        """Blocks of the backbone that can be sharded one at a time; none of families that are not this package's."""
        return list(blocks_of(self.backbone))


def load_teacher(
    description: TeacherDescription, *, bf16: bool, attn_implementation: str = "sdpa", compiled: bool = False
) -> DistillationTeacher:
    """
    Read the weights of a teacher, backbone and heads, on the CPU.

    Args:
        description: of `read_teacher`.
        bf16: keep the weights, and compute, in bfloat16; otherwise in float32.
        attn_implementation: of a ViT of transformers; timm chooses by itself.
        compiled: by `torch.compile`, this package's backbones block by block, others as a whole.

    Raises:
        FileNotFoundError: there are no weights in safetensors.
        ValueError: they cannot be read, or are not those that the configuration asks for.
    """
    dtype = torch.bfloat16 if bf16 else torch.float32
    backbone = _load_backbone(description, dtype, attn_implementation)
    teacher = DistillationTeacher(description, backbone, **_load_heads(description, dtype))
    if compiled and description.model_type in BACKBONES:
        set_forwards(backbone, "none", compiled)
    elif compiled:
        backbone.compile()
    return teacher


@lru_cache(maxsize=8)
def read_teacher(source: str | None) -> TeacherDescription:
    """
    Look at a teacher without reading its weights.

    Args:
        source: a model folder, with prototype heads (`heads.safetensors`) or without; the output folder of a run or a
            checkpoint-N, for its teacher; or OWNER/NAME on the Hub. The network is a DINOv3 ViT or ConvNeXt, of one of
            the families of transformers in `_FAMILIES`, or a ViT or ConvNet of timm.

    Raises:
        ArgumentError: None was given.
        FileNotFoundError: there is no such model, or it lacks weights in safetensors or an image processor.
        ValueError: it is a file, of another family, or damaged; heads or image statistics do not fit it.
    """
    if source is None:
        raise ArgumentError("teacher is not set; name the model to distil, for example --teacher OWNER/NAME.")
    located = locate_model(source, "teacher")
    fields = read_fields(located, source, "teacher")
    _check_weights(located)
    config = _config(located, fields)
    describe = _describe_ours if config.model_type in BACKBONES else _describe_other
    description = describe(located, config)
    num_values = {len(values) for values in description.statistics}
    if num_values != {description.num_channels}:
        raise ValueError(
            f"the image processor of the teacher {located} has image_mean and image_std of "
            f"{' and '.join(map(str, sorted(num_values)))} values, and the network takes {description.num_channels} "
            "channels; give them one value a channel."
        )
    return description


def _tokens(backbone: PreTrainedModel, crops: Tensor, description: TeacherDescription) -> TeacherTokens:
    family = _FAMILIES.get(description.model_type)
    options = {} if family is None or family.options is None else family.options
    output = backbone(pixel_values=crops, **options)
    features = output.last_hidden_state  # (I, T, D) or (I, D, h, w)
    if features.ndim == 4:
        grid = (features.shape[2], features.shape[3])
        return TeacherTokens(output.pooler_output.flatten(1), features.flatten(2).transpose(1, 2), grid)
    height, width = crops.shape[-2:]
    grid = (height // description.stride, width // description.stride)
    cls = features[:, 0] if description.has_cls else output.pooler_output  # (I, D)
    return TeacherTokens(cls, features[:, -grid[0] * grid[1] :], grid)


def _config(source: str, fields: dict[str, Any]) -> PreTrainedConfig:
    """The configuration of the image network, for crops of any size."""
    model_type = fields.get("model_type")
    if model_type in BACKBONES:
        return BACKBONES[model_type][0].from_dict(fields)
    if model_type == _TIMM:
        return _timm_config(source, fields)
    vision = fields.get("vision_config")
    if vision is not None and f"{model_type}_vision_model" in _FAMILIES:  # text and images, each with a tower
        return AutoConfig.from_pretrained(source, trust_remote_code=False).vision_config
    if model_type in _FAMILIES:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    raise ValueError(
        f"teacher {source} is a {model_type!r} model, whose tokens are not known here; use a model of "
        f"{', '.join([*BACKBONES, *_FAMILIES])}, or timm's version of it."
    )


def _timm_config(source: str, fields: dict[str, Any]) -> PreTrainedConfig:
    if find_spec("timm") is None:
        raise ValueError(f"teacher {source} is a model of timm, which is not installed; pip install timm.")
    from transformers import TimmWrapperConfig

    config = TimmWrapperConfig.from_dict(fields)
    config.do_pooling = True
    if _has_tokens(_on_meta(config)):
        config.model_args = {**(config.model_args or {}), "dynamic_img_size": True}
    return config


def _has_tokens(network: Any) -> bool:
    """Whether it is a ViT of timm."""
    from timm.models import Eva, VisionTransformer

    return isinstance(network.timm_model, Eva | VisionTransformer)


def _on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModel.from_config(config).eval()


def _describe_ours(source: str, config: PreTrainedConfig) -> TeacherDescription:
    is_convnext = config.model_type in WITHOUT_MASK_TOKEN
    width = config.hidden_sizes[-1] if is_convnext else config.hidden_size
    return TeacherDescription(
        source=source,
        summary=network_summary(config),
        width=width,
        patch_size=None if is_convnext else patch_side(config),
        stride=patch_side(config),
        num_channels=config.num_channels,
        statistics=read_statistics(source),
        heads=_read_heads(source, width),
        model_type=config.model_type,
        has_cls=True,  # of a ConvNeXt the pooled feature, which stands before the positions
    )


def _describe_other(source: str, config: PreTrainedConfig) -> TeacherDescription:
    network: Any = _on_meta(config)
    if config.model_type == _TIMM:
        name, library = config.architecture, "timm"
        is_vit = _has_tokens(network)
        has_cls = is_vit and network.timm_model.cls_token is not None
    else:
        name, library = config.model_type, "transformers"
        family = _FAMILIES[config.model_type]
        is_vit, has_cls = family.has_tokens, family.has_cls
    if is_vit:
        width = network.timm_model.num_features if library == "timm" else config.hidden_size
        side = network.timm_model.patch_embed.patch_size if library == "timm" else config.patch_size
        stride = side if isinstance(side, int) else side[0]
        if not isinstance(side, int) and len(set(side)) != 1:
            raise ValueError(
                f"the patches of the teacher {source} are {side}, which are not square; use another model."
            )
    else:
        width, stride = _map_of(source, network)
    return TeacherDescription(
        source=source,
        summary=f"{name} of {library}, width {width}, {'patches' if is_vit else 'stride'} of {stride} px",
        width=width,
        patch_size=stride if is_vit else None,
        stride=stride,
        num_channels=next(m for m in network.modules() if isinstance(m, nn.Conv2d)).in_channels,
        statistics=_timm_statistics(source, config) if library == "timm" else read_statistics(source),
        heads={},
        model_type=config.model_type,
        has_cls=has_cls,
    )


def _map_of(source: str, network: PreTrainedModel) -> tuple[int, int]:
    """Width and stride of the last feature map of a ConvNet."""
    output = _forward_on_meta(source, network, _PROBE_SIZE, {})
    features, pooled = output.last_hidden_state, output.pooler_output
    if features.ndim != 4 or pooled.flatten(1).shape[1] != features.shape[1]:
        raise ValueError(
            f"the teacher {source} gives features {tuple(features.shape[1:])} and pools them to "
            f"{tuple(pooled.shape[1:])}, which is neither a ViT nor a ConvNet of one width; use another model."
        )
    return features.shape[1], _PROBE_SIZE // features.shape[2]


def _timm_statistics(source: str, config: Any) -> ChannelStatistics:
    fields = config.to_dict()
    if "pretrained_cfg" not in fields:  # of a model that was made with transformers
        return read_statistics(source)
    of_images = fields["pretrained_cfg"]
    if not {"mean", "std"} <= of_images.keys():
        raise no_image_processor(source)
    return ChannelStatistics(tuple(of_images["mean"]), tuple(of_images["std"]))


@lru_cache(maxsize=2)
def _network_on_meta(source: str) -> PreTrainedModel:
    return _on_meta(_config(source, read_fields(source, source, "teacher")))


def _run_on_meta(source: str, size: int) -> None:
    """Let the library itself say whether it takes crops of `size` pixels."""
    network = _network_on_meta(source)
    family = _FAMILIES.get(network.config.model_type)
    _forward_on_meta(source, network, size, (family and family.options) or {})


@torch.no_grad()
def _forward_on_meta(source: str, network: PreTrainedModel, size: int, options: Mapping[str, Any]) -> Any:
    num_channels = next(m for m in network.modules() if isinstance(m, nn.Conv2d)).in_channels
    try:
        return network(pixel_values=torch.empty(1, num_channels, size, size, device="meta"), **options)
    except (AssertionError, RuntimeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ValueError(
            f"the teacher {source} does not take crops of {size} pixels ({reason}); use the size that it was trained "
            "with, or another model."
        ) from error


def _check_weights(source: str) -> None:
    folder = Path(source)
    if not folder.is_dir() or any(folder.glob(WEIGHTS)):
        return
    if any(folder.glob("pytorch_model*.bin")):
        raise ValueError(
            f"the teacher {source} has its weights in pytorch_model.bin, a pickle, which may run code and is not "
            "read; save it with save_pretrained, which writes safetensors."
        )
    raise FileNotFoundError(f"the teacher {source} has no weights (model.safetensors); copy or download them again.")


def _load_backbone(description: TeacherDescription, dtype: torch.dtype, attn_implementation: str) -> PreTrainedModel:
    source, model_type = description.source, description.model_type
    config = _config(source, read_fields(source, source, "teacher"))
    model_class = BACKBONES[model_type][1] if model_type in BACKBONES else AutoModel
    options: dict[str, Any] = {"config": config, "dtype": dtype, "use_safetensors": True}
    if description.patch_size is not None and model_type != _TIMM:
        options["attn_implementation"] = attn_implementation
    backbone, fresh = load_weights(model_class, source, **options)
    # The pooler of a family with CLS is not asked.
    lacking = [name for name in fresh if not (description.has_cls and name.startswith("pooler."))]
    if lacking:
        raise ValueError(
            f"the weights of the teacher {source} lack {min(lacking)}, which its config.json asks for; give a folder "
            "in which both are of the same model."
        )
    return backbone


def _heads_file(source: str) -> Path | None:
    if Path(source).is_dir():
        path = Path(source) / HEADS_FILE
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(source, HEADS_FILE))
    except EntryNotFoundError:
        return None


def _read_heads(source: str, width: int) -> dict[str, dict[str, Any]]:
    """Arguments of the heads beside a backbone, which are found to fit it."""
    path = _heads_file(source)
    if path is None:
        return {}
    shapes = read_head_shapes(path)
    if "dino_head" not in shapes:
        raise ValueError(f"{path} holds no DINO head; remove it to distil features, or save the teacher again.")
    with open_safetensors(path) as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  (no mapping)
    for head, arguments in shapes.items():
        for name, wanted in _empty_head(width, arguments).state_dict(prefix=f"{head}.").items():
            if found.get(name) != tuple(wanted.shape):
                raise ValueError(
                    f"{path} does not fit the backbone beside it, whose width is {width}: {name} is "
                    f"{found.get(name, 'missing')} there and must be {tuple(wanted.shape)}; give a folder in which "
                    "both are of the same run."
                )
    return shapes


def _load_heads(description: TeacherDescription, dtype: torch.dtype) -> dict[str, PrototypeHead]:
    path = _heads_file(description.source) if description.heads else None
    if path is None:
        return {}
    heads = {}
    with open_safetensors(path) as file:
        for name, arguments in description.heads.items():
            head = heads[name] = _empty_head(description.width, arguments)
            tensors = {key: file.get_tensor(f"{name}.{key}").to(dtype) for key in head.state_dict()}
            head.load_state_dict(tensors, assign=True)
    return heads


def _empty_head(width: int, arguments: Mapping[str, Any]) -> PrototypeHead:
    with torch.device("meta"):
        return PrototypeHead(width, **arguments)
