"""Checkpoints of every format, read into one form: the Hub's names, with values that are read when they are needed."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from dinov3_hf.convert.file_format import FileFormat, Tensors
from dinov3_hf.convert.formats import FORMATS, architecture_config, format_of, recognise
from dinov3_hf.convert.hub_folder import CONFIG_NAME, read_hub_folder, read_json, read_weights
from dinov3_hf.convert.image_statistics import ImageStatistics
from dinov3_hf.convert.lazy_tensor import LazyTensor, main_dtype
from dinov3_hf.convert.safetensors_file import read_safetensors
from dinov3_hf.convert.torch_file import read_torch_file
from dinov3_hf.convert.training_checkpoint import BRANCHES, Branch, take_apart
from dinov3_hf.models.dinov3_pretraining.backbones import BACKBONES


@dataclass(frozen=True)
class Checkpoint:
    """
    A network in a file or folder.

    Args:
        source: Where it is.
        format: `"hf"`, `"native"` or `"timm"`.
        config: Our configuration of the network.
        tensors: Its parameters under the Hub's names.
        statistics: Of the images that it was trained on.
        extras: What `extras.safetensors` holds, or shall hold.
        heads: `dino_head.*` and `ibot_head.*`.
        architecture: The name that the source's format, or else the native one, has for the architecture, if any.
        branch: The branch of a training checkpoint that was taken; `None` for a file of one network.
        num_source_tensors: Tensors in the file or folder.
        derived, dropped, differences: As in `Converted`; on the way from the source to this form.
    """

    source: Path
    format: str
    config: PreTrainedConfig
    tensors: dict[str, LazyTensor]
    statistics: ImageStatistics
    extras: dict[str, LazyTensor] = field(default_factory=dict)
    heads: dict[str, LazyTensor] = field(default_factory=dict)
    architecture: str | None = None
    branch: str | None = None
    num_source_tensors: int = 0
    derived: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    differences: list[str] = field(default_factory=list)

    @property
    def num_parameters(self) -> int:
        """Of the backbone, without what acts in training only."""
        return sum(tensor.numel for tensor in self.tensors.values())

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of most parameters."""
        return main_dtype(self.tensors)


def read_checkpoint(source: str | Path, architecture: str | None = None, branch: str | None = None) -> Checkpoint:
    """
    Recognise what is at `source`. Nothing but headers and small tensors is read yet.

    Args:
        source: A file of torch or safetensors, or a folder with a `config.json` of transformers or timm.
        architecture: A preset (`vits16`, ...) that the network is of; by default read from the file.
        branch: Of a training checkpoint; by default `model_ema` if there is one, else the teacher.

    Raises:
        ArgumentError: There is no such architecture.
        ValueError: The file is damaged, holds code, is of another architecture, or is not whole.
        OSError: It cannot be read.
    """
    source = Path(source)
    if source.is_dir() and not (source / CONFIG_NAME).exists():
        raise FileNotFoundError(f"{source} has no {CONFIG_NAME}; give a folder of transformers or timm, or a file.")
    given = None if architecture is None else architecture_config(architecture)
    if not source.is_dir():
        checkpoint = _from_state_dict(source, _read_file(source), None, given, architecture, branch)
    elif "model_type" not in (fields := read_json(source / CONFIG_NAME)):  # a folder of timm
        checkpoint = _from_state_dict(source, read_weights(source), fields, given, architecture, branch)
    else:
        checkpoint = _from_hub_folder(source, given, architecture, branch)
    check_parameters(checkpoint)
    return checkpoint


def load_model(checkpoint: Checkpoint) -> PreTrainedModel:
    """The model with the values of the checkpoint, in their dtypes, in eval mode."""
    model = _meta_model(checkpoint)
    state = {name: tensor.read().clone() for name, tensor in checkpoint.tensors.items()}
    for name in model.state_dict().keys() - state.keys():
        # What acts in training only; where the source has none, a copy of the norm that acts otherwise.
        found = checkpoint.extras.get(name) or checkpoint.tensors[name.removeprefix("local_cls_")]
        state[name] = found.read().clone()
    model.load_state_dict(state, assign=True)
    model.eval()
    return model


def check_parameters(checkpoint: Checkpoint) -> None:
    """
    Compare names and shapes with those of the model that the configuration describes.

    Raises:
        ValueError: A parameter is missing, has another shape, is no floating-point number, or is unknown.
    """
    model = _meta_model(checkpoint)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    acting = {name: tensor for name, tensor in checkpoint.extras.items() if name in expected}
    found = checkpoint.tensors | acting
    training_only = {name for name in expected if name.startswith("local_cls_norm.")} - acting.keys()
    for problem, names in (
        ("has no", [name for name in expected if name not in found and name not in training_only]),
        ("has the unknown", [name for name in found if name not in expected]),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(
                f"{checkpoint.source} {problem} parameter {names[0]}{more}; check that it is a whole backbone of the "
                "right architecture."
            )
    for name, tensor in found.items():
        if tensor.shape != expected[name]:
            raise ValueError(
                f"{checkpoint.source}: {name} has the shape {tensor.shape}, where the architecture has "
                f"{expected[name]}; check the architecture."
            )
        if not tensor.dtype.is_floating_point:
            raise ValueError(f"{checkpoint.source}: {name} has the dtype {tensor.dtype}, which no weights have.")


def _meta_model(checkpoint: Checkpoint) -> PreTrainedModel:
    config = checkpoint.config
    _, model_class = BACKBONES[config.model_type]
    try:
        with torch.device("meta"):
            model: PreTrainedModel = model_class(config)
    except Exception as error:  # sizes that no tensor can have raise whatever the layer raises
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"{checkpoint.source}: the configuration describes no network ({reason}).") from error
    return model


def _from_hub_folder(
    source: Path, given: PreTrainedConfig | None, architecture: str | None, branch: str | None
) -> Checkpoint:
    if branch is not None:
        raise ValueError(f"{source} is one network without branches; leave out --branch {branch}.")
    folder = read_hub_folder(source)
    if given is not None and given.model_type != folder.config.model_type:
        raise ValueError(f"{source} is no {architecture}: it holds a {folder.config.model_type!r} model.")
    config = folder.config if given is None else given
    return Checkpoint(
        source=source,
        format="hf",
        config=config,
        tensors=folder.tensors,
        extras=folder.extras,
        heads=folder.heads,
        statistics=folder.statistics or ImageStatistics.of("web", config.num_channels),
        architecture=format_of("native", config).architecture(config),
        num_source_tensors=len(folder.tensors) + len(folder.extras) + len(folder.heads),
    )


def _read_file(source: Path) -> dict[str, LazyTensor | None]:
    if not source.exists():
        raise FileNotFoundError(
            f"{source} does not exist; give a file or a folder (`hf download NAME --local-dir FOLDER` fetches one "
            "from the Hub)."
        )
    if source.suffix == ".safetensors":
        return dict(read_safetensors(source))
    return read_torch_file(source)


def _from_state_dict(
    source: Path,
    content: Mapping[str, LazyTensor | None],
    fields: dict[str, Any] | None,
    given: PreTrainedConfig | None,
    architecture: str | None,
    branch: str | None,
) -> Checkpoint:
    parts = take_apart(source, content)
    recognised = {name: found for name, each in parts.branches.items() if (found := recognise(each.backbone))}
    chosen = _choose_branch(source, parts.branches, recognised, branch)
    network, found = parts.branches[chosen], recognised[chosen]
    dropped = parts.dropped | {
        full_name: f"branch {name}; the branch {chosen} was taken"
        for name, each in parts.branches.items()
        if name != chosen
        for full_name in each.full_names
    }
    if given is not None and given.model_type not in found.model_types:
        raise ValueError(f"{source} is no {architecture}: its parameters have the names of another family.")
    try:
        config = _config(found, network.backbone, fields) if given is None else given
        converted = found.to_hf(network.backbone, config)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{source}: {error}") from error
    name = found.architecture(config)
    is_satellite = "sat493m" in f"{architecture or name} {source.name}"
    image_fields = {} if fields is None else fields.get("pretrained_cfg", {})
    statistics = ImageStatistics.read(image_fields, "mean", "std") if isinstance(image_fields, dict) else None
    return Checkpoint(
        source=source,
        format=found.name,
        config=config,
        tensors=converted.tensors,
        extras=converted.extras,
        heads=network.heads,
        statistics=statistics or ImageStatistics.of("satellite" if is_satellite else "web", config.num_channels),
        architecture=name,
        branch=None if len(parts.branches) == 1 and chosen == "model" else chosen,
        num_source_tensors=sum(tensor is not None for tensor in content.values()),
        derived=converted.derived,
        dropped=dropped | converted.dropped,
        differences=converted.differences,
    )


def _config(found: FileFormat, tensors: Tensors, fields: dict[str, Any] | None) -> PreTrainedConfig:
    if fields is None:
        return found.read_config(tensors)
    if found.config_from_json is None:
        raise ValueError(f"{CONFIG_NAME} has no model_type; give the file of weights instead of the folder.")
    return found.config_from_json(fields, tensors)


def _choose_branch(
    source: Path, branches: Mapping[str, Branch], recognised: Mapping[str, FileFormat], wanted: str | None
) -> str:
    if wanted is not None and wanted not in recognised:
        raise ValueError(
            f"{source} has no backbone in a branch {wanted!r}; it has {', '.join(recognised) or 'none at all'}."
        )
    if wanted is not None:
        return wanted
    for name in (*BRANCHES, *recognised):
        if name in recognised:
            return name
    names = [name for branch in branches.values() for name in (*branch.heads, *branch.backbone)]
    if not names:
        raise ValueError(f"{source} holds no tensors; give a checkpoint of a DINOv3 backbone.")
    if not any(branch.backbone for branch in branches.values()):
        raise ValueError(f"{source} holds heads ({names[0]}, ...) and no backbone; give the backbone's file.")
    formats = ", ".join(dict.fromkeys(each.name for each in FORMATS))
    if (source.parent / CONFIG_NAME).is_file():
        raise ValueError(
            f"{source} does not say what it is; give its folder {source.parent}, which has a {CONFIG_NAME}."
        )
    raise ValueError(
        f"{source} is no DINOv3 backbone of a known format ({formats}, or a folder of the Hub): it has {len(names)} "
        f"tensors such as {names[0]}."
    )
