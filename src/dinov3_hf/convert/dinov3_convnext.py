"""DINOv3 ConvNeXt: the original checkpoints ("native") <-> the file format of the Hugging Face Hub.

The tensors are the same under other names; a native file has the final norm under two.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

from dinov3_hf.convert.file_format import Converted, FileFormat, Tensors
from dinov3_hf.convert.key_map import KeyMap
from dinov3_hf.convert.lazy_tensor import same_bits
from dinov3_hf.models.dinov3_convnext.configuration_dinov3_convnext import (
    NATIVE_MODEL_TYPE,
    STOCK_MODEL_TYPE,
    DINOv3ConvNextConfig,
)
from dinov3_hf.models.dinov3_convnext.presets import PRESETS

# Native name -> Hub name.
KEYS = KeyMap(
    [
        ("downsample_layers.{i}.{j}.{p}", "stages.{i}.downsample_layers.{j}.{p}"),
        ("stages.{i}.{j}.dwconv.{p}", "stages.{i}.layers.{j}.depthwise_conv.{p}"),
        ("stages.{i}.{j}.norm.{p}", "stages.{i}.layers.{j}.layer_norm.{p}"),
        ("stages.{i}.{j}.pwconv1.{p}", "stages.{i}.layers.{j}.pointwise_conv1.{p}"),
        ("stages.{i}.{j}.pwconv2.{p}", "stages.{i}.layers.{j}.pointwise_conv2.{p}"),
        ("stages.{i}.{j}.gamma", "stages.{i}.layers.{j}.gamma"),
        ("norm.{p}", "layer_norm.{p}"),
        ("norms.3.{p}", None),  # the second name of `norm`
    ]
)
_ALIASES = {f"norms.3.{parameter}": f"norm.{parameter}" for parameter in ("weight", "bias")}

# The original has four stages.
NUM_STAGES = 4
_BLOCK = re.compile(r"stages\.(\d+)\.(\d+)\.")

# Native argument -> field, and what the original takes for an argument that is not given.
_ARGUMENTS = {
    "in_chans": ("num_channels", 3),
    "depths": ("depths", [3, 3, 9, 3]),
    "dims": ("hidden_sizes", [96, 192, 384, 768]),
    "drop_path_rate": ("drop_path_rate", 0.0),
    "layer_scale_init_value": ("layer_scale_init_value", 1e-6),
    "patch_size": ("patch_size", None),
}


def config_from_native(constructor: Mapping[str, Any]) -> DINOv3ConvNextConfig:
    """
    The configuration of a network given by the original's constructor arguments.

    Args:
        constructor: Native keyword arguments.

    Raises:
        ValueError: An argument is unknown.
    """
    unknown = sorted(set(constructor) - set(_ARGUMENTS))
    if unknown:
        raise ValueError(f"{unknown[0]!r} is not an argument of the original ConvNeXt; remove it.")
    fields = {field: constructor.get(argument, default) for argument, (field, default) in _ARGUMENTS.items()}
    # There 0 and None both mean a network without LayerScale.
    return DINOv3ConvNextConfig(**{**fields, "layer_scale_init_value": fields["layer_scale_init_value"] or None})


def recognises(names: Collection[str]) -> bool:
    """Whether these are parameters of a native ConvNeXt; one of timm has `stem.0.weight`."""
    return "downsample_layers.0.0.weight" in names and "stages.0.0.dwconv.weight" in names


def read_config(native: Tensors) -> DINOv3ConvNextConfig:
    """
    The configuration of the network that the tensors are of; what they do not tell is as in the released models.

    Raises:
        ValueError: A stage or a block is missing.
    """
    depths, hidden_sizes = [], []
    for stage in range(NUM_STAGES):
        blocks = {int(found[2]) for name in native if (found := _BLOCK.match(name)) and int(found[1]) == stage}
        for block in range(max(blocks, default=0) + 1):
            if block not in blocks:
                raise ValueError(f"the checkpoint has no stages.{stage}.{block}; check that it is whole.")
        depths.append(len(blocks))
        hidden_sizes.append(_shape(native, f"stages.{stage}.0.dwconv.weight")[0])
    return DINOv3ConvNextConfig(
        num_channels=_shape(native, "downsample_layers.0.0.weight")[1],
        hidden_sizes=hidden_sizes,
        depths=depths,
        # Trained values do not tell where they began.
        layer_scale_init_value=1e-6 if "stages.0.0.gamma" in native else None,
    )


def to_hf(native: Tensors, config: DINOv3ConvNextConfig) -> Converted:
    """
    The Hub's state dict; see `FileFormat`.

    Raises:
        ValueError: A name does not belong to a ConvNeXt, or the two copies of the final norm differ.
    """
    dropped = {}
    for alias, name in _ALIASES.items():
        if alias not in native:
            continue
        if name not in native or not same_bits(native[alias].read(), native[name].read()):
            raise ValueError(f"{alias} and {name} are not equal, but name one tensor; check that the file is whole.")
        dropped[alias] = f"the same tensor as {name}"
    return Converted(KEYS.apply(native), dropped=dropped)


def from_hf(ours: Tensors, config: DINOv3ConvNextConfig) -> Converted:
    """
    A native state dict; see `FileFormat`.

    Raises:
        ValueError: A name does not belong to a ConvNeXt, or the original has no such network.
    """
    if config.num_stages != NUM_STAGES or config.hidden_act != "gelu":
        raise ValueError(
            f"a ConvNeXt of {config.num_stages} stages with {config.hidden_act} has no native form; "
            f"the original has {NUM_STAGES} stages with gelu."
        )
    native = KEYS.inverse().apply(ours)
    aliases = {alias: name for alias, name in _ALIASES.items() if name in native}
    return Converted(
        native | {alias: native[name] for alias, name in aliases.items()},
        derived={alias: f"the same tensor as {name}" for alias, name in aliases.items()},
        differences=_unsaid(config),
    )


def architecture(config: DINOv3ConvNextConfig) -> str | None:
    """The original's name of a released architecture: `dinov3_convnext_tiny`."""
    for preset, sizes in PRESETS.items():
        released = DINOv3ConvNextConfig(**sizes)
        names = ("num_channels", "hidden_act", "layer_norm_eps", *sizes)
        has_layer_scale = config.layer_scale_init_value is not None
        if has_layer_scale and all(config.__dict__[name] == released.__dict__[name] for name in names):
            return f"dinov3_{preset}"
    return None


def _unsaid(config: DINOv3ConvNextConfig) -> list[str]:
    """Settings that act on features and have no place in a native file, unless they are those of released models."""
    released = DINOv3ConvNextConfig()
    return [
        f"{name} = {config.__dict__[name]} has no place in a native file: tell who reads it"
        for name in ("layer_norm_eps", "patch_size")
        if config.__dict__[name] != released.__dict__[name]
    ]


def _shape(native: Tensors, name: str) -> tuple[int, ...]:
    if name not in native:
        raise ValueError(f"the checkpoint has no {name}; check that it holds a whole ConvNeXt.")
    shape = native[name].shape
    if len(shape) != 4 or 0 in shape:
        raise ValueError(f"{name} has the shape {shape}; a DINOv3 ConvNeXt has 4 axes there, none of them empty.")
    return shape


NATIVE_CONVNEXT = FileFormat(
    name="native",
    model_types=(STOCK_MODEL_TYPE, NATIVE_MODEL_TYPE),
    recognises=recognises,
    read_config=read_config,
    to_hf=to_hf,
    from_hf=from_hf,
    architecture=architecture,
)
