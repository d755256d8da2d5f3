"""`config.json` of a model folder of timm: what both families have in common."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

# The end of the names of ViTs that have biases of queries and values.
WITH_BIASES = "_qkvb"

# Arguments of timm's classes that act in training, on the classifier, or on nothing once the weights are loaded.
MODEL_ARGS_WITHOUT_EFFECT = {
    *("num_classes", "global_pool", "img_size", "dynamic_img_size", "head_init_scale"),
    *("drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"),
    *("rope_shift_coords", "rope_jitter_coords", "rope_rescale_coords"),
}


def architecture_of(fields: Mapping[str, Any], known: Iterable[str]) -> str:
    """
    The architecture that a `config.json` names, without `_qkvb`.

    Raises:
        ValueError: It is not one of `known`.
    """
    found = fields.get("architecture")
    name = found.removesuffix(WITH_BIASES) if isinstance(found, str) else None
    if name is None or name not in known:
        raise ValueError(f"timm's architecture {found!r} is not one of the DINOv3 models {', '.join(known)}.")
    return name


def model_args_of(fields: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """
    The arguments of timm's class that are written down in a `config.json`.

    Args:
        fields: The `config.json`.
        known: Arguments that the reader understands.

    Raises:
        ValueError: There is another one, which may change what the network computes.
    """
    written = fields.get("model_args") or {}
    if not isinstance(written, dict):
        raise ValueError("model_args of timm's config.json are no arguments by name; copy the file again.")
    args = {name: value for name, value in written.items() if value is not None}
    unknown = sorted(set(args) - set(known) - MODEL_ARGS_WITHOUT_EFFECT)
    if unknown:
        raise ValueError(
            f"model_args of timm's config.json have {unknown[0]} = {args[unknown[0]]!r}, which no DINOv3 network has; "
            "give a folder of a DINOv3 model."
        )
    return args


def number_of(args: Mapping[str, Any], name: str, otherwise: float) -> float:
    """
    A positive number among the arguments of timm's class.

    Raises:
        ValueError: It is none.
    """
    value = args.get(name, otherwise)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise ValueError(f"model_args of timm's config.json have {name} = {value!r}; it is a positive number.")
    return float(value)


def image_size_of(fields: Mapping[str, Any]) -> int | list[int]:
    """Side of the images, or height and width, in pixels, that the model is for; 224 where none is written down."""
    settings = fields.get("pretrained_cfg")
    size = settings.get("input_size") if isinstance(settings, dict) else None
    if not isinstance(size, list) or len(size) != 3 or not all(isinstance(side, int) and side > 0 for side in size):
        return 224
    return size[1] if size[1] == size[2] else size[1:]


def config_fields(
    architecture: str,
    model_args: Mapping[str, Any],
    num_features: int,
    num_classes: int,
    num_channels: int,
    image_size: int | Sequence[int],
    image_mean: Sequence[float],
    image_std: Sequence[float],
    first_conv: str,
    classifier: str,
) -> dict[str, Any]:
    """
    The fields that timm itself writes (`timm.models.save_for_hf`).

    Args:
        architecture: Name in timm's registry.
        model_args: Arguments in which the network differs from that architecture.
        num_features: Width of the features.
        num_classes: Classes of the classifier; 0 is none.
        num_channels: of the images.
        image_size: Side of the images, or height and width, in pixels.
        image_mean, image_std: One number a channel.
        first_conv, classifier: Names of the modules that timm adapts to other channels and classes.
    """
    sides = (image_size, image_size) if isinstance(image_size, int) else image_size
    return {
        "architecture": architecture,
        "num_classes": num_classes,
        "num_features": num_features,
        "global_pool": "avg",
        **({"model_args": dict(model_args)} if model_args else {}),
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": [num_channels, *sides],
            "fixed_input_size": False,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": list(image_mean),
            "std": list(image_std),
            "num_classes": num_classes,
            "pool_size": None,
            "first_conv": first_conv,
            "classifier": classifier,
        },
    }
