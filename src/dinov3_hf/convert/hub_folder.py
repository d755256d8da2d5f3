"""Model folders in the Hub's layout: `config.json`, `model*.safetensors`, and what may stand beside them."""

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from dinov3_hf.convert.heads import HEADS_NAME, head_shapes
from dinov3_hf.convert.image_statistics import ImageStatistics
from dinov3_hf.convert.lazy_tensor import LazyTensor, main_dtype
from dinov3_hf.convert.safetensors_file import read_safetensors, write_safetensors, write_shards
from dinov3_hf.models.dinov3_pretraining.backbones import BACKBONES
from dinov3_hf.models.dinov3_vit.image_processing import build_image_processor
from dinov3_hf.models.dinov3_vit.modeling_dinov3_vit import EXTRAS_NAME

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
PROCESSOR_NAME = "preprocessor_config.json"


@dataclass(frozen=True)
class HubFolder:
    """
    What a model folder holds.

    Args:
        config: Our configuration.
        tensors: The parameters.
        extras: Of `extras.safetensors`.
        heads: Of `heads.safetensors`.
        statistics: Of the image processor beside the weights, if there is one.
    """

    config: PreTrainedConfig
    tensors: dict[str, LazyTensor]
    extras: dict[str, LazyTensor]
    heads: dict[str, LazyTensor]
    statistics: ImageStatistics | None


def read_hub_folder(folder: Path) -> HubFolder:
    """
    Read a folder whose `config.json` has a `model_type`.

    Raises:
        ValueError: A file is damaged, or the model is no DINOv3 backbone.
        OSError: A file is missing or cannot be read.
    """
    tensors: dict[str, LazyTensor] = {}
    for full_name, tensor in read_weights(folder).items():
        # Some versions of transformers save the blocks of their classes as `model.layer.N`, `model.stages.N`.
        name = full_name.removeprefix("model.")
        if name in tensors:
            raise ValueError(f"{folder} holds {name} and model.{name}, which are one parameter; remove one of them.")
        tensors[name] = tensor
    extras = _read_beside(folder / EXTRAS_NAME)
    if twice := tensors.keys() & extras.keys():
        raise ValueError(
            f"{folder / EXTRAS_NAME} holds {min(twice)}, as the model's own files do; remove one of them."
        )
    return HubFolder(
        config=_read_config(folder / CONFIG_NAME, len(tensors)),
        tensors=tensors,
        extras=extras,
        heads=_read_beside(folder / HEADS_NAME),
        statistics=_read_statistics(folder / PROCESSOR_NAME),
    )


def write_hub_folder(
    folder: Path,
    config: PreTrainedConfig,
    tensors: Mapping[str, LazyTensor],
    extras: Mapping[str, LazyTensor],
    heads: Mapping[str, LazyTensor],
    statistics: ImageStatistics,
    max_shard_size: int,
) -> None:
    """
    Write a folder that transformers opens.

    Args:
        folder: New.
        config, tensors, extras, heads, statistics: As in `HubFolder`; values are read one tensor at a time.
        max_shard_size: of a file of weights, in bytes.
    """
    folder.mkdir()
    saved = copy.deepcopy(config)
    _, model_class = BACKBONES[saved.model_type]
    saved.architectures = [model_class.__name__]
    saved.dtype = main_dtype(tensors)
    saved.save_pretrained(folder)
    mean, std = statistics
    build_image_processor(image_mean=list(mean), image_std=list(std)).save_pretrained(folder)
    write_shards(tensors, folder, max_shard_size)
    if extras:
        write_safetensors(extras, folder / EXTRAS_NAME)
    if heads:
        write_safetensors(heads, folder / HEADS_NAME, head_shapes(heads))


def read_weights(folder: Path) -> dict[str, LazyTensor]:
    """
    The tensors of `model.safetensors`, or of the shards that its index names.

    Raises:
        ValueError: A file is damaged, or the index is not that of the shards.
        OSError: A file is missing or cannot be read.
    """
    index = folder / INDEX_NAME
    if not index.exists():
        if not (folder / WEIGHTS_NAME).exists():
            raise FileNotFoundError(f"{folder} has neither {WEIGHTS_NAME} nor {INDEX_NAME}; save it with safetensors.")
        return read_safetensors(folder / WEIGHTS_NAME)
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise ValueError(f"{index} has no weight_map of file names; copy it again.")
    tensors: dict[str, LazyTensor] = {}
    for name in sorted(set(files.values())):
        if Path(name).name != name:
            raise ValueError(f"{index} names {name}, which is not beside it; copy it again.")
        tensors |= read_safetensors(folder / name)
    if different := tensors.keys() ^ files.keys():
        raise ValueError(f"{index} and its shards do not agree about {min(different)}; copy them again.")
    return {name: tensors[name] for name in files}


def read_json(path: Path) -> dict[str, Any]:
    """
    The object in a JSON file.

    Raises:
        ValueError: There is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON file ({error}); copy it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__} and no JSON object; copy it again.")
    return content


def _read_config(path: Path, num_tensors: int) -> PreTrainedConfig:
    fields = read_json(path)
    model_type = fields.get("model_type")
    if not isinstance(model_type, str) or model_type not in BACKBONES:
        raise ValueError(f"{path} describes a {model_type!r} model; the types known are {', '.join(BACKBONES)}.")
    depths = fields.get("depths")
    for blocks in [fields.get("num_hidden_layers"), *(depths if isinstance(depths, list) else [])]:
        if isinstance(blocks, int) and blocks > num_tensors:  # naming the stages of a billion blocks takes the memory
            raise ValueError(f"{path} describes {blocks} blocks, for which there are too few tensors; copy it again.")
    config_class, _ = BACKBONES[model_type]
    try:
        config: PreTrainedConfig = config_class.from_pretrained(path.parent)
    except Exception as error:  # fields of wrong types raise whatever the first use of them raises
        raise ValueError(f"{path} describes no network ({' '.join(str(error).split())[:160]}).") from error
    return config


def _read_beside(path: Path) -> dict[str, LazyTensor]:
    return read_safetensors(path) if path.exists() else {}


def _read_statistics(path: Path) -> ImageStatistics | None:
    return ImageStatistics.read(read_json(path), "image_mean", "image_std") if path.exists() else None
