"""Which checkpoint a run continues from, and whether it belongs to the run."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.trainer_utils import get_last_checkpoint

from dinov3_hf.training.field_types import own_annotations


def find_checkpoint(wanted: str | None, output_dir: str, config: PreTrainedConfig) -> str | None:
    """
    Resolve `--resume_from_checkpoint`.

    Args:
        wanted: None to start afresh, "last" for the newest checkpoint of `output_dir`, or a checkpoint folder.
        output_dir: the run's folder.
        config: of the model to be trained.

    Returns:
        The checkpoint folder, or None.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: the checkpoint holds another architecture.
    """
    if wanted is None:
        return None
    if wanted == "last":
        folder = get_last_checkpoint(output_dir) if Path(output_dir).is_dir() else None
        if folder is None:
            raise FileNotFoundError(
                f"{output_dir} holds no checkpoint to resume from; leave out --resume_from_checkpoint to start afresh."
            )
    else:
        folder = wanted
    config_file = Path(folder) / "config.json"
    if not config_file.is_file():
        raise FileNotFoundError(
            f"{folder} is no checkpoint: it has no config.json; name a checkpoint-N folder, or use last."
        )
    fields, _ = type(config).get_config_dict(folder)
    found = fields.get("model_type")
    if found != config.model_type:
        raise ValueError(
            f"{folder} holds a {found} model, not a checkpoint of a run; name a checkpoint-N folder, or use last."
        )
    difference = _first_difference(type(config).from_dict(fields), config)
    if difference is not None:
        name, saved, current = difference
        raise ValueError(
            f"{folder} is a checkpoint of another architecture: {name} is {saved!r} there and {current!r} in this "
            "recipe; resume with the recipe that wrote it, or start in another output_dir."
        )
    return str(folder)


def _first_difference(saved: Any, current: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """The first entry (dotted name, saved value, current value) in which two configurations differ.

    Only fields of our own classes count: the Trainer and transformers set others as they go.
    """
    if isinstance(saved, PreTrainedConfig) and isinstance(current, PreTrainedConfig):
        names = own_annotations(type(current))
        saved, current = ({key: config.__dict__[key] for key in names} for config in (saved, current))
    if isinstance(saved, dict) and isinstance(current, dict):
        for key in sorted(saved.keys() | current.keys()):
            found = _first_difference(saved.get(key), current.get(key), f"{name}.{key}" if name else key)
            if found is not None:
                return found
        return None
    same = saved == (list(current) if isinstance(current, tuple) else current)  # JSON has lists only
    return None if same else (name, saved, current)
