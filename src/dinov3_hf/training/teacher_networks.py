"""Image networks that can teach: DINOv3's own, and families of transformers and timm whose outputs are known here.

Letters: I crops, C channels, T tokens, N = h * w patches, D width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel

from dinov3_hf.evals.features import load_weights
from dinov3_hf.hub.architecture import WEIGHTS, network_summary
from dinov3_hf.models.dinov3_pretraining.backbones import BACKBONES, WITHOUT_MASK_TOKEN, patch_side
from dinov3_hf.training.model_source import read_fields

_TIMM = "timm_wrapper"
_PROBE_SIZE = 256  # pixels; a multiple of every stride


@dataclass(frozen=True)
class _Family:
    """How the outputs of a family of transformers are read.

    Args:
        has_tokens: `last_hidden_state` is [prefix tokens, patches] (I, T, D); otherwise a feature map (I, D, h, w).
        has_cls: the first token is CLS; otherwise `pooler_output` takes its place.
        options: with which its forward pass takes crops of any size.
    """

    has_tokens: bool = True
    has_cls: bool = True
    options: Mapping[str, Any] | None = None


_INTERPOLATE = {"interpolate_pos_encoding": True}
# Not here: families whose tokens are not normalised (clip, which timm normalises) or not in their places (vit_mae).
_FAMILIES = {
    "deit": _Family(options=_INTERPOLATE),
    "dinov2": _Family(),
    "dinov2_with_registers": _Family(),
    "vit": _Family(options=_INTERPOLATE),
    "vit_msn": _Family(options=_INTERPOLATE),
    "siglip_vision_model": _Family(has_cls=False, options=_INTERPOLATE),
    "convnext": _Family(has_tokens=False, has_cls=False),
    "convnextv2": _Family(has_tokens=False, has_cls=False),
    "regnet": _Family(has_tokens=False, has_cls=False),
    "resnet": _Family(has_tokens=False, has_cls=False),
}


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


@dataclass(frozen=True)
class TeacherNetwork:
    """
    A network in a folder or on the Hub; no weights are read yet.

    Args:
        source: the model folder, or OWNER/NAME on the Hub.
        summary: one line for people.
        model_type: of its configuration.
        width: D.
        patch_size: side of a patch in pixels; None for a ConvNet.
        stride: pixels between two patches, or between two positions of a ConvNet's last feature map.
        num_channels: C of its images.
        has_cls: the first of its tokens is CLS; otherwise its own pooling takes that place.
    """

    source: str
    summary: str
    model_type: str
    width: int
    patch_size: int | None
    stride: int
    num_channels: int
    has_cls: bool

    def check_crop(self, size: int) -> None:
        """
        Raises:
            ValueError: the network does not take crops of `size` x `size` pixels.
        """
        if size < self.stride or size % self.stride:
            below = size // self.stride * self.stride
            nearest = f"{below} or {below + self.stride}" if below else f"{self.stride}"
            what = "stride" if self.patch_size is None else "patch size"
            raise ValueError(
                f"crops of {size} pixels are no multiple of the {what} {self.stride} of the teacher {self.source}; "
                f"use {nearest}."
            )
        if self.model_type not in BACKBONES:  # whose positions are made for any size
            _outputs_on_meta(self.source, size)

    def load(self, dtype: torch.dtype, attn_implementation: str) -> PreTrainedModel:
        """
        The network with its weights, in evaluation mode on the CPU.

        Args:
            dtype: into which each tensor is read.
            attn_implementation: of a ViT of transformers; timm chooses by itself.

        Raises:
            FileNotFoundError: there are no weights in safetensors.
            ValueError: they cannot be read, or are not those that the configuration asks for.
        """
        options: dict[str, Any] = {"config": network_config(self.source), "dtype": dtype, "use_safetensors": True}
        if self.patch_size is not None and self.model_type != _TIMM:
            options["attn_implementation"] = attn_implementation
        backbone: PreTrainedModel
        model_class = BACKBONES[self.model_type][1] if self.model_type in BACKBONES else AutoModel
        try:
            backbone, fresh = load_weights(model_class, self.source, **options)
        except OSError as error:
            reason = str(error).splitlines()[0]
            raise FileNotFoundError(
                f"weights of the model {self.source} cannot be had as safetensors: {reason}"
            ) from error
        # The pooler of a family with CLS is not asked.
        lacking = [name for name in fresh if not (self.has_cls and name.startswith("pooler."))]
        if lacking:
            raise ValueError(
                f"the weights of the model {self.source} lack {min(lacking)}, which its config.json asks for; give "
                "a folder in which both are of the same model."
            )
        return backbone

    def tokens(self, backbone: PreTrainedModel, crops: Tensor) -> TeacherTokens:
        """
        CLS and patches of crops.

        Args:
            backbone: of `load`.
            crops: (I, C, H, W), normalised, of the dtype of its weights.
        """
        output = backbone(pixel_values=crops, **_options(self.model_type))
        features = output.last_hidden_state  # (I, T, D) or (I, D, h, w)
        if features.ndim == 4:
            patches, grid = features.flatten(2).transpose(1, 2), tuple(features.shape[2:])  # (I, N, D)
        else:
            grid = (crops.shape[-2] // self.stride, crops.shape[-1] // self.stride)
            patches = features[:, -grid[0] * grid[1] :]  # (I, N, D)
        cls = features[:, 0] if self.has_cls else output.pooler_output.flatten(1)  # (I, D)
        return TeacherTokens(cls, patches, grid)


def read_network(source: str) -> TeacherNetwork:
    """
    Look at a network: at its `config.json`, and at what it gives when it runs without weights.

    Args:
        source: a model folder, or OWNER/NAME on the Hub.

    Raises:
        FileNotFoundError: there is no such repository, or a folder lacks weights.
        ValueError: it is damaged, of an unknown family, or its weights are a pickle.
    """
    config = network_config(source)
    _check_weights(source)
    if config.model_type in BACKBONES:
        return _of_ours(source, config)
    return _of_timm(source) if config.model_type == _TIMM else _of_transformers(source)


# `Any`: what a configuration has depends on its family.
def network_config(source: str) -> Any:
    """
    The configuration of the image network, for crops of any size.

    Raises:
        FileNotFoundError: there is no such repository.
        ValueError: it is damaged, or of an unknown family.
    """
    fields = read_fields(source, source, "model")
    model_type = fields.get("model_type")
    if model_type in BACKBONES:
        return BACKBONES[model_type][0].from_dict(fields)
    if model_type == _TIMM:
        return _timm_config(source, fields)
    of_two_towers = "vision_config" in fields and f"{model_type}_vision_model" in _FAMILIES
    if model_type not in _FAMILIES and not of_two_towers:
        raise ValueError(
            f"model {source} is a {model_type!r} model, whose outputs are not known here; use timm's version of it, "
            f"or a model of {', '.join([*BACKBONES, *_FAMILIES])}."
        )
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    return config.vision_config if of_two_towers else config


def _timm_config(source: str, fields: dict[str, Any]) -> Any:
    if find_spec("timm") is None:
        raise ValueError(f"model {source} is a model of timm, which is not installed; pip install timm.")
    from transformers import TimmWrapperConfig

    config = TimmWrapperConfig.from_dict(fields)
    config.do_pooling = True
    if _is_timm_vit(_on_meta(config)):
        config.model_args = {**(config.model_args or {}), "dynamic_img_size": True}
    return config


def _is_timm_vit(network: PreTrainedModel) -> bool:
    from timm.models import Eva, VisionTransformer

    return isinstance(network.timm_model, Eva | VisionTransformer)


def _of_ours(source: str, config: Any) -> TeacherNetwork:
    is_convnext = config.model_type in WITHOUT_MASK_TOKEN
    return TeacherNetwork(
        source=source,
        summary=network_summary(config),
        model_type=config.model_type,
        width=config.hidden_sizes[-1] if is_convnext else config.hidden_size,
        patch_size=None if is_convnext else patch_side(config),
        stride=patch_side(config),
        num_channels=config.num_channels,
        has_cls=True,  # of a ConvNeXt the pooled feature, which stands before the positions
    )


def _of_transformers(source: str) -> TeacherNetwork:
    network = _network_on_meta(source)
    config: Any = network.config
    family = _FAMILIES[config.model_type]
    name = f"{config.model_type} of transformers"
    if family.has_tokens:
        return _vit(source, name, network, config.hidden_size, config.patch_size, family.has_cls)
    return _convnet(source, name, network, _PROBE_SIZE)


def _of_timm(source: str) -> TeacherNetwork:
    network = _network_on_meta(source)
    model: Any = network.timm_model
    name = f"{network.config.architecture} of timm"
    if _is_timm_vit(network):
        has_cls = model.cls_token is not None
        return _vit(source, name, network, model.num_features, model.patch_embed.patch_size, has_cls)
    return _convnet(source, name, network, model.pretrained_cfg["input_size"][-1])


def _vit(
    source: str, name: str, network: PreTrainedModel, width: int, side: int | tuple[int, int], has_cls: bool
) -> TeacherNetwork:
    sides = {side} if isinstance(side, int) else set(side)
    if len(sides) != 1:
        raise ValueError(f"the patches of the model {source} are {side} pixels, not square; use another model.")
    patch_size = sides.pop()
    return TeacherNetwork(
        source=source,
        summary=f"{name}, {width} wide, with patches of {patch_size} px",
        model_type=network.config.model_type,
        width=width,
        patch_size=patch_size,
        stride=patch_size,
        num_channels=_num_channels(network),
        has_cls=has_cls,
    )


def _convnet(source: str, name: str, network: PreTrainedModel, trained_size: int) -> TeacherNetwork:
    size = _PROBE_SIZE
    try:
        output = _outputs_on_meta(source, size)
    except ValueError:  # some have positions for the size that they were trained with
        size = trained_size
        output = _outputs_on_meta(source, size)
    features, pooled = output.last_hidden_state, output.pooler_output.flatten(1)  # (1, D, h, w), (1, D)
    if features.ndim != 4 or pooled.shape != features.shape[:2] or size % features.shape[2]:
        raise ValueError(
            f"the model {source} ({name}) makes features {tuple(features.shape[1:])} and pools them to "
            f"{tuple(pooled.shape[1:])}, which is neither a ViT nor a ConvNet as they are known here; use another "
            "model."
        )
    stride = size // features.shape[2]
    return TeacherNetwork(
        source=source,
        summary=f"{name}, {features.shape[1]} wide, with a stride of {stride} px",
        model_type=network.config.model_type,
        width=features.shape[1],
        patch_size=None,
        stride=stride,
        num_channels=_num_channels(network),
        has_cls=False,
    )


def _num_channels(network: PreTrainedModel) -> int:
    return next(module for module in network.modules() if isinstance(module, nn.Conv2d)).in_channels


def _options(model_type: str) -> Mapping[str, Any]:
    family = _FAMILIES.get(model_type)
    return {} if family is None or family.options is None else family.options


def _on_meta(config: Any) -> PreTrainedModel:
    with torch.device("meta"):
        network: PreTrainedModel = AutoModel.from_config(config)
    network.eval()
    return network


@lru_cache(maxsize=2)
def _network_on_meta(source: str) -> PreTrainedModel:
    return _on_meta(network_config(source))


@torch.no_grad()
def _outputs_on_meta(source: str, size: int) -> Any:
    """Shapes of what a network gives for crops of `size` pixels, if it takes them."""
    network = _network_on_meta(source)
    crops = torch.empty(1, _num_channels(network), size, size, device="meta")
    try:
        return network(pixel_values=crops, **_options(network.config.model_type))
    except (AssertionError, RuntimeError, ValueError) as error:
        reason = (str(error).splitlines() or ["its positions are made for another size"])[0].rstrip(".")
        raise ValueError(
            f"the teacher {source} does not take crops of {size} pixels: {reason}; use the size that it was trained "
            "with, or another model."
        ) from error


def _check_weights(source: str) -> None:
    folder = Path(source)
    if not folder.is_dir() or any(folder.glob(WEIGHTS)):
        return
    if any(folder.glob("pytorch_model*.bin")):
        raise ValueError(
            f"the model {source} has its weights in pytorch_model.bin, a pickle, which may run code and is not "
            "read; save it with save_pretrained, which writes safetensors."
        )
    raise FileNotFoundError(f"the model {source} has no weights (model.safetensors); copy or download them again.")
