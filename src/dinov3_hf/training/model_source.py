"""A trained model by the name that a recipe gives it: where it lies, and what its files say without its weights."""

from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor, PreTrainedConfig

from dinov3_hf.hub.architecture import read_json
from dinov3_hf.models.image_channels import ChannelStatistics
from dinov3_hf.training.checkpoints import MANIFEST, checkpoints, problem

TEACHER = "teacher"
_FILES = (".pth", ".pt", ".safetensors", ".bin")


def locate_model(name: str, field: str) -> str:
    """
    The model folder, or OWNER/NAME on the Hub, that `name` stands for.

    Args:
        name: a model folder, the output folder of a run (its teacher, or that of its newest complete checkpoint), a
            checkpoint-N, or OWNER/NAME.
        field: of the recipe that has the name, for messages.

    Raises:
        FileNotFoundError: there is no such model.
        ValueError: it is a file, or an incomplete checkpoint.
    """
    path = Path(name).expanduser()
    if path.is_file() or path.suffix in _FILES:
        if not path.is_file():
            raise FileNotFoundError(f"there is no {field} {name}; name a model folder, or OWNER/NAME on the Hub.")
        raise ValueError(f"{field} {name} is a file; {how_to_convert(name, field)}.")
    if path.is_dir():
        return str(_model_folder(path, f"{field} {name}"))
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or path.parent.is_dir():
        raise FileNotFoundError(f"there is no {field} folder {name}; name one that exists, or OWNER/NAME on the Hub.")
    return name


def how_to_convert(name: str, field: str) -> str:
    """The remedy for a model in another format."""
    folder = Path(name).name.split(".")[0] + "_hf"
    return f"convert it first, dinov3-hf convert {name} {folder} --to hf, and give --{field} {folder}"


def read_fields(source: str, name: str, field: str) -> dict[str, Any]:
    """
    What `config.json` of a model says; a folder of timm has the model type "timm_wrapper".

    Args:
        source: of `locate_model`.
        name, field: as there.

    Raises:
        FileNotFoundError: there is no such repository.
        ValueError: the file is damaged.
    """
    try:
        fields, _ = PreTrainedConfig.get_config_dict(source)
    except OSError as error:
        if Path(source).is_dir():
            raise ValueError(f"{source}/config.json cannot be read; copy or download the folder again.") from error
        raise FileNotFoundError(
            f"there is no {field} folder {name}, and as a Hub repository it fails: {str(error).splitlines()[0]}"
        ) from error
    return fields


def read_statistics(source: str) -> ChannelStatistics:
    """
    What the images of a model are normalised with: its image processor says it, or the configuration of timm.

    Raises:
        FileNotFoundError: nothing says it.
    """
    fields, _ = PreTrainedConfig.get_config_dict(source)
    of_timm = fields.get("pretrained_cfg", {})
    if {"mean", "std"} <= of_timm.keys():
        return ChannelStatistics(tuple(of_timm["mean"]), tuple(of_timm["std"]))
    try:
        processor: Any = AutoImageProcessor.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{source} has no image processor (preprocessor_config.json), which says how its images are normalised; "
            "copy the one of the original model into it."
        ) from error
    return ChannelStatistics(tuple(processor.image_mean), tuple(processor.image_std))


def _model_folder(path: Path, what: str) -> Path:
    if (path / MANIFEST).is_file() or path in checkpoints(path.parent):
        if (why := problem(path)) is not None:
            raise ValueError(f"{what} is no complete checkpoint: {why}; name another one.")
    elif _is_model(path):
        return path
    whole = [folder for folder in reversed(checkpoints(path)) if problem(folder) is None]
    for holder in (path, *whole):
        if _is_model(holder / TEACHER):
            return holder / TEACHER
    models = sorted(folder for folder in path.iterdir() if folder.is_dir() and _is_model(folder))
    example = models[0] if models else f"{path / TEACHER} of a run"
    raise FileNotFoundError(f"{what} holds no config.json of a model; name a model folder, such as {example}.")


def _is_model(folder: Path) -> bool:
    """Whether it holds one network; a checkpoint holds several."""
    config = folder / "config.json"
    return config.is_file() and read_json(config).get("model_type") not in (
        "dinov3_pretraining",
        "dinov3_distillation",
    )
