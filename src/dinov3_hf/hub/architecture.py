"""What the files of a model folder say of the network in it, without loading it."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from dinov3_hf.models.dinov3_convnext.configuration_dinov3_convnext import (
    DINOv3ConvNextConfig,
    DINOv3ConvNextNativeConfig,
)
from dinov3_hf.models.dinov3_vit.configuration_dinov3_vit import DINOv3ViTConfig, DINOv3ViTNativeConfig

WEIGHTS = "model*.safetensors"
_VIT = (DINOv3ViTConfig.model_type, DINOv3ViTNativeConfig.model_type)
_CONVNEXT = (DINOv3ConvNextConfig.model_type, DINOv3ConvNextNativeConfig.model_type)


@dataclass(frozen=True)
class Architecture:
    """
    A network in words.

    Attributes:
        summary: for example "ViT with 12 blocks of width 384 and patches of 16 px".
        details: further facts, name -> value.
        num_channels: of an image.
        pooled: what `pooler_output` is.
        tokens: what `last_hidden_state` holds.
        model_class: of this package.
        is_stock: whether plain transformers has the model type.
        has_remote_code: whether the folder carries the code of its class.
    """

    summary: str
    details: Mapping[str, object]
    num_channels: int
    pooled: str
    tokens: str
    model_class: str
    is_stock: bool
    has_remote_code: bool


def read_architecture(folder: Path) -> Architecture:
    """
    The network that `folder`/config.json describes.

    Raises:
        FileNotFoundError: there is no `config.json`.
        ValueError: it is damaged, or describes no DINOv3 backbone.
    """
    fields = read_json(folder / "config.json")
    model_type = fields.get("model_type")
    if model_type in _VIT:
        words = _vit(DINOv3ViTConfig.from_pretrained(folder))
    elif model_type in _CONVNEXT:
        words = _convnext(DINOv3ConvNextConfig.from_pretrained(folder))
    else:
        raise ValueError(
            f"{folder} holds a {model_type!r} model, not a DINOv3 backbone; publish it with its own push_to_hub."
        )
    return Architecture(
        **words,
        is_stock=model_type in (_VIT[0], _CONVNEXT[0]),
        has_remote_code="AutoModel" in fields.get("auto_map", {}),
    )


def network_summary(config: DINOv3ViTConfig | DINOv3ConvNextConfig) -> str:
    """The `summary` of the network that a configuration describes."""
    words = _vit(config) if isinstance(config, DINOv3ViTConfig) else _convnext(config)
    return str(words["summary"])


def read_json(path: Path) -> dict[str, Any]:
    """
    A JSON file of a model folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no JSON mapping.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); save the model again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no JSON mapping; save the model again.")
    return content


def count_parameters(folder: Path) -> tuple[int, str]:
    """
    Numbers in the weights of a folder, and the dtype that most of them have, as safetensors calls it: "F32", "BF16".

    Raises:
        ValueError: a file is damaged.
    """
    numbers: Counter[str] = Counter()
    for path in sorted(folder.glob(WEIGHTS)):
        with open_safetensors(path) as file:
            for name in file.keys():  # noqa: SIM118  (no mapping)
                tensor = file.get_slice(name)
                size = 1
                for length in tensor.get_shape():
                    size *= length
                numbers[tensor.get_dtype()] += size
    if not numbers:
        return 0, "none"
    return numbers.total(), numbers.most_common(1)[0][0]


def open_safetensors(path: Path) -> Any:
    """
    Open a safetensors file, reading its header only.

    Raises:
        ValueError: it is damaged.
    """
    try:
        return safe_open(path, framework="pt")
    except Exception as error:  # a type of the library's own that is no OSError or ValueError
        raise ValueError(f"{path} is no whole safetensors file ({error}); save the model again.") from error


def _vit(config: DINOv3ViTConfig) -> dict[str, Any]:
    gate = "gated, " if config.use_gated_mlp else ""
    registers = f" {config.num_register_tokens} register tokens," if config.num_register_tokens else ""
    return {
        "summary": f"ViT with {config.num_hidden_layers} blocks of width {config.hidden_size} "
        f"and patches of {config.patch_size} px",
        "details": {
            "attention heads": config.num_attention_heads,
            "FFN": f"{gate}{config.intermediate_size} wide",
            "register tokens": config.num_register_tokens,
            "channels": config.num_channels,
        },
        "num_channels": config.num_channels,
        "pooled": "the normalised CLS token",
        "tokens": f"[CLS,{registers} patches]",
        "model_class": "DINOv3ViTModel",
    }


def _convnext(config: DINOv3ConvNextConfig) -> dict[str, Any]:
    depths, widths = (", ".join(map(str, sizes)) for sizes in (config.depths, config.hidden_sizes))
    return {
        "summary": f"ConvNeXt with {len(config.depths)} stages",
        "details": {"blocks of each stage": depths, "widths": widths, "channels": config.num_channels},
        "num_channels": config.num_channels,
        "pooled": "the normalised mean of the last feature map",
        "tokens": "[that feature, patches]",
        "model_class": "DINOv3ConvNextModel",
    }
