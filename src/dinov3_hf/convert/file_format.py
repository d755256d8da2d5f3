"""What a converter says about one file format of one model family; the formats are listed in `formats.py`."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig

from dinov3_hf.convert.lazy_tensor import LazyTensor

Tensors = Mapping[str, LazyTensor]


@dataclass(frozen=True)
class Converted:
    """
    A state dict under other names; every name of both sides is accounted for.

    Args:
        tensors: The state dict.
        extras: On the way to the Hub's format, what belongs into `extras.safetensors`: tensors that act in training
            only under their names in our model, and tensors needed for an exact way back under `FORMAT.NAME`.
        derived: Target name -> how its values were made, for tensors that the source does not hold.
        dropped: Source name -> why the target does not hold it.
        differences: Lines that name a difference in what the two networks compute, and its size.
    """

    tensors: dict[str, LazyTensor]
    extras: dict[str, LazyTensor] = field(default_factory=dict)
    derived: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    differences: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class FileFormat:
    """
    A file format of one family, seen from the Hub's format ("hf").

    Args:
        name: `"native"` or `"timm"`.
        model_types: of the configurations that it can hold.
        recognises: Whether the names of a state dict (without the prefixes of a training checkpoint) are of this
            family and format.
        read_config: The configuration, from names, shapes and the few values that tell architectures apart. Raises
            `ValueError` with a remedy when the tensors contradict each other.
        to_hf: The Hub's state dict from this format's.
        from_hf: This format's state dict from the Hub's with its extras. Raises `ValueError` where the format has no
            such network.
        architecture: The format's own name of an architecture (`dinov3_vits16`, `vit_small_patch16_dinov3`), `None`
            for one that it has no name for.
        config_from_json: The configuration, from the `config.json` of the format's folder and the tensors. `None` is a
            format that is a single file of torch.
        config_to_json: That `config.json`, from the configuration, the format's tensors, and mean and standard
            deviation of each image channel.
    """

    name: str
    model_types: tuple[str, ...]
    recognises: Callable[[Collection[str]], bool]
    read_config: Callable[[Tensors], PreTrainedConfig]
    # `Any` is the configuration class of the family.
    to_hf: Callable[[Tensors, Any], Converted]
    from_hf: Callable[[Tensors, Any], Converted]
    architecture: Callable[[Any], str | None]
    config_from_json: Callable[[Mapping[str, Any], Tensors], PreTrainedConfig] | None = None
    config_to_json: Callable[[Any, Tensors, Sequence[float], Sequence[float]], dict[str, Any]] | None = None
