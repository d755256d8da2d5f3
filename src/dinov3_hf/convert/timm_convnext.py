"""DINOv3 ConvNeXt: the format of timm <-> the file format of the Hugging Face Hub.

Functions of state dicts and settings; they neither read nor write files, and timm is not needed. The tensors are the
same on both sides; timm can also hold a classifier.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from dinov3_hf.convert.file_format import Converted, FileFormat, Tensors
from dinov3_hf.convert.key_map import KeyMap
from dinov3_hf.convert.timm_folder import architecture_of, config_fields, image_size_of, model_args_of, number_of
from dinov3_hf.models.dinov3_convnext.configuration_dinov3_convnext import (
    NATIVE_MODEL_TYPE,
    STOCK_MODEL_TYPE,
    DINOv3ConvNextConfig,
)
from dinov3_hf.models.dinov3_convnext.presets import PRESETS

# In the Hub's folder, the prefix of what only the way back to timm needs.
WAY_BACK = "timm."

# timm's name -> Hub name.
KEYS = KeyMap(
    [
        ("stem.{j}.{p}", "stages.0.downsample_layers.{j}.{p}"),
        ("stages.{i}.downsample.{j}.{p}", "stages.{i}.downsample_layers.{j}.{p}"),
        ("stages.{i}.blocks.{j}.conv_dw.{p}", "stages.{i}.layers.{j}.depthwise_conv.{p}"),
        ("stages.{i}.blocks.{j}.norm.{p}", "stages.{i}.layers.{j}.layer_norm.{p}"),
        ("stages.{i}.blocks.{j}.mlp.fc1.{p}", "stages.{i}.layers.{j}.pointwise_conv1.{p}"),
        ("stages.{i}.blocks.{j}.mlp.fc2.{p}", "stages.{i}.layers.{j}.pointwise_conv2.{p}"),
        ("stages.{i}.blocks.{j}.gamma", "stages.{i}.layers.{j}.gamma"),
        ("head.norm.{p}", "layer_norm.{p}"),
        ("head.fc.{p}", f"{WAY_BACK}head.fc.{{p}}"),  # a classifier
    ]
)

_NUM_STAGES = 4  # of every ConvNeXt of timm
_MODEL_ARGS_READ = {"dims", "depths", "in_chans", "ls_init_value"}


def recognises(names: Collection[str]) -> bool:
    """Whether these are parameters of a ConvNeXt of timm."""
    return {"stem.0.weight", "stages.0.blocks.0.conv_dw.weight", "head.norm.weight"} <= set(names)


def read_config(timm: Tensors) -> DINOv3ConvNextConfig:
    """
    The configuration of the network that the tensors are of.

    Raises:
        ValueError: The file is not whole.
    """
    return _config(timm, {}, 224)


def config_from_json(fields: Mapping[str, Any], timm: Tensors) -> DINOv3ConvNextConfig:
    """
    The configuration of a folder of timm.

    Args:
        fields: timm's `config.json`.
        timm: The tensors.

    Raises:
        ValueError: The architecture is not of this family, has an argument that our network has no counterpart of, or
            the tensors are not whole.
    """
    architecture_of(fields, PRESETS)
    return _config(timm, model_args_of(fields, _MODEL_ARGS_READ), image_size_of(fields))


def config_to_json(
    config: DINOv3ConvNextConfig, timm: Tensors, image_mean: Sequence[float], image_std: Sequence[float]
) -> dict[str, Any]:
    """
    timm's `config.json` of a network, with which `timm.create_model("local-dir:FOLDER", pretrained=True)` opens it.

    Args:
        config: The configuration.
        timm: The tensors of `from_hf`.
        image_mean, image_std: Statistics of the images, one number a channel.
    """
    name = architecture(config) or "convnext_tiny"
    args, usual = _model_args(config), _model_args(DINOv3ConvNextConfig.from_preset(name))
    return config_fields(
        architecture=name,
        model_args={argument: value for argument, value in args.items() if value != usual[argument]},
        num_features=config.hidden_size,
        num_classes=timm["head.fc.weight"].shape[0] if "head.fc.weight" in timm else 0,
        num_channels=config.num_channels,
        image_size=config.image_size,
        image_mean=image_mean,
        image_std=image_std,
        first_conv="stem.0",
        classifier="head.fc",
    )


def to_hf(timm: Tensors, config: DINOv3ConvNextConfig) -> Converted:
    """The Hub's state dict; see `FileFormat`. A classifier is kept for the way back."""
    converted = Converted({})
    for name, tensor in KEYS.apply(timm).items():
        (converted.extras if name.startswith(WAY_BACK) else converted.tensors)[name] = tensor
    return converted


def from_hf(ours: Tensors, config: DINOv3ConvNextConfig) -> Converted:
    """timm's state dict; see `FileFormat`."""
    for name, found, value in (
        ("layer_norm_eps", config.layer_norm_eps, 1e-6),
        ("hidden_act", config.hidden_act, "gelu"),
        ("stages", config.num_stages, _NUM_STAGES),
    ):
        if found != value:
            raise ValueError(
                f"timm has no DINOv3 ConvNeXt with {name} = {found!r} (always {value!r}); keep this model as it is."
            )
    converted = Converted(KEYS.inverse().apply(ours))
    if config.patch_size is not None:
        converted.differences.append(
            f"feature maps: timm leaves them at the strides of the stages, and does not resize them to patches of "
            f"{config.patch_size} pixels"
        )
    return converted


def architecture(config: DINOv3ConvNextConfig) -> str | None:
    """timm's name of a released size: `convnext_tiny`."""
    sizes = {"hidden_sizes": config.hidden_sizes, "depths": config.depths}
    return next((name for name, fields in PRESETS.items() if fields == sizes), None)


def _config(timm: Tensors, args: Mapping[str, Any], image_size: int | list[int]) -> DINOv3ConvNextConfig:
    first_blocks = [f"stages.{stage}.blocks.0.conv_dw.weight" for stage in range(_NUM_STAGES)]
    missing = [name for name in ("stem.0.weight", *first_blocks) if name not in timm]
    if missing:
        raise ValueError(f"the checkpoint has no {missing[0]}; check that it holds a whole ConvNeXt.")
    for name in ("stem.0.weight", *first_blocks):
        if len(timm[name].shape) != 4:
            raise ValueError(f"{name} has the shape {timm[name].shape}; a convolution has 4 axes.")
    stages = [name.split(".")[1] for name in timm if name.endswith(".conv_dw.weight")]
    has_layer_scale = "stages.0.blocks.0.gamma" in timm
    return DINOv3ConvNextConfig(
        num_channels=timm["stem.0.weight"].shape[1],
        hidden_sizes=[timm[name].shape[0] for name in first_blocks],
        depths=[stages.count(str(stage)) for stage in range(_NUM_STAGES)],
        image_size=image_size,
        # Trained values do not tell where they began; None is a network without LayerScale.
        layer_scale_init_value=number_of(args, "ls_init_value", 1e-6) if has_layer_scale else None,
    )


def _model_args(config: DINOv3ConvNextConfig) -> dict[str, Any]:
    """Arguments of timm's class."""
    return {
        "dims": config.hidden_sizes,
        "depths": config.depths,
        "in_chans": config.num_channels,
        "ls_init_value": config.layer_scale_init_value,
    }


TIMM_CONVNEXT = FileFormat(
    name="timm",
    model_types=(STOCK_MODEL_TYPE, NATIVE_MODEL_TYPE),
    recognises=recognises,
    read_config=read_config,
    to_hf=to_hf,
    from_hf=from_hf,
    architecture=architecture,
    config_from_json=config_from_json,
    config_to_json=config_to_json,
)
