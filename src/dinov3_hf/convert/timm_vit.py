"""DINOv3 ViT: the format of timm <-> the file format of the Hugging Face Hub.

Functions of state dicts and settings; they neither read nor write files, and timm is not needed. Beside their names,
tensors of timm differ by the fused `qkv` matrix. timm has no mask token, no key bias and no norm for local crops. It
has every released size twice: with biases of queries and values (`_qkvb`) and without, for those that were trained to
zero.

Letters: D width.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from dinov3_hf.convert.file_format import Converted, FileFormat, Tensors
from dinov3_hf.convert.key_map import KeyMap
from dinov3_hf.convert.lazy_tensor import LazyTensor, concatenate, same_bits
from dinov3_hf.convert.timm_folder import (
    WITH_BIASES,
    architecture_of,
    config_fields,
    image_size_of,
    model_args_of,
    number_of,
)
from dinov3_hf.models.dinov3_vit.configuration_dinov3_vit import (
    NATIVE_MODEL_TYPE,
    STOCK_MODEL_TYPE,
    DINOv3ViTConfig,
)
from dinov3_hf.models.dinov3_vit.modeling_dinov3_vit import EXTRAS_PREFIX
from dinov3_hf.models.dinov3_vit.presets import PRESETS
from dinov3_hf.models.dinov3_vit.rope import RopeParameters, rope_periods

# In the Hub's folder, the prefix of what only the way back to timm needs.
WAY_BACK = "timm."
# Tells a file of zero biases from one without, where both are the same network.
_HAS_BIASES = f"{WAY_BACK}blocks.0.attn.q_bias"

# timm's name, with qkv split into q, k and v -> Hub name.
_COMMON_KEYS: list[tuple[str, str | None]] = [
    ("cls_token", "embeddings.cls_token"),
    ("reg_token", "embeddings.register_tokens"),
    ("patch_embed.proj.{p}", "embeddings.patch_embeddings.{p}"),
    ("blocks.{i}.norm1.{p}", "layer.{i}.norm1.{p}"),
    ("blocks.{i}.attn.q.weight", "layer.{i}.attention.q_proj.weight"),
    ("blocks.{i}.attn.k.weight", "layer.{i}.attention.k_proj.weight"),
    ("blocks.{i}.attn.v.weight", "layer.{i}.attention.v_proj.weight"),
    ("blocks.{i}.attn.q_bias", "layer.{i}.attention.q_proj.bias"),
    ("blocks.{i}.attn.v_bias", "layer.{i}.attention.v_proj.bias"),
    ("blocks.{i}.attn.proj.{p}", "layer.{i}.attention.o_proj.{p}"),
    ("blocks.{i}.gamma_1", "layer.{i}.layer_scale1.lambda1"),
    ("blocks.{i}.norm2.{p}", "layer.{i}.norm2.{p}"),
    ("blocks.{i}.gamma_2", "layer.{i}.layer_scale2.lambda1"),
    ("norm.{p}", "norm.{p}"),
    ("head.{p}", f"{WAY_BACK}head.{{p}}"),  # a classifier
]
MLP_KEYS = KeyMap(
    [
        *_COMMON_KEYS,
        ("blocks.{i}.mlp.fc1.{p}", "layer.{i}.mlp.up_proj.{p}"),
        ("blocks.{i}.mlp.fc2.{p}", "layer.{i}.mlp.down_proj.{p}"),
    ]
)
SWIGLU_KEYS = KeyMap(
    [
        *_COMMON_KEYS,
        ("blocks.{i}.mlp.fc1_g.{p}", "layer.{i}.mlp.gate_proj.{p}"),
        ("blocks.{i}.mlp.fc1_x.{p}", "layer.{i}.mlp.up_proj.{p}"),
        ("blocks.{i}.mlp.fc2.{p}", "layer.{i}.mlp.down_proj.{p}"),
    ]
)

# timm's architecture, without `_qkvb` -> the preset of that size. The presets' order is that of preference.
_ARCHITECTURES = {
    "vit_small_patch16_dinov3": "vits16",
    "vit_small_plus_patch16_dinov3": "vits16plus",
    "vit_base_patch16_dinov3": "vitb16",
    "vit_large_patch16_dinov3": "vitl16",
    "vit_huge_plus_patch16_dinov3": "vith16plus",
    "vit_7b_patch16_dinov3": "vit7b16",
}
_WITHOUT_BIASED_VARIANT = "vit_7b_patch16_dinov3"
_SIZE_FIELDS = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "use_gated_mlp"),
    *("patch_size", "num_channels", "num_register_tokens"),
)
# Arguments of timm's class that say what the tensors say too, or that `config_from_json` reads.
_MODEL_ARGS_READ = {
    *("embed_dim", "depth", "num_heads", "patch_size", "in_chans", "mlp_ratio", "swiglu_mlp", "swiglu_align_to"),
    *("num_reg_tokens", "qkv_bias", "init_values", "rope_temperature"),
}
# What timm's networks of this family all have.
_REQUIRED = {
    "norm_type": "layernorm",
    "layer_norm_eps": 1e-5,
    "untie_cls_and_patch_norms": False,
    "proj_bias": True,
    "mlp_bias": True,
    "rope_min_period": None,
    "rope_normalize_coords": "separate",
    "rope_dtype": "float32",
}


def recognises(names: Collection[str]) -> bool:
    """Whether these are parameters of a DINOv3 ViT of timm: no position embedding, LayerScale under timm's names."""
    return (
        {"cls_token", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight"} <= set(names)
        and ("blocks.0.gamma_1" in names or "reg_token" in names)
        and "pos_embed" not in names
        and "rope_embed.periods" not in names
    )


def read_config(timm: Tensors) -> DINOv3ViTConfig:
    """
    The configuration of a bare file, whose tensors do not tell the number of heads: that of the released size.

    Raises:
        ValueError: The file is of no released size, or not whole.
    """
    return _config(timm, {}, None, 224)


def config_from_json(fields: Mapping[str, Any], timm: Tensors) -> DINOv3ViTConfig:
    """
    The configuration of a folder of timm.

    Args:
        fields: timm's `config.json`.
        timm: The tensors.

    Raises:
        ValueError: The architecture is not of this family, has an argument that our network has no counterpart of, or
            the tensors are not whole.
    """
    preset = _ARCHITECTURES[architecture_of(fields, _ARCHITECTURES)]
    return _config(timm, model_args_of(fields, _MODEL_ARGS_READ), preset, image_size_of(fields))


def config_to_json(
    config: DINOv3ViTConfig, timm: Tensors, image_mean: Sequence[float], image_std: Sequence[float]
) -> dict[str, Any]:
    """
    timm's `config.json` of a network, with which `timm.create_model("local-dir:FOLDER", pretrained=True)` opens it.

    Args:
        config: The configuration.
        timm: The tensors of `from_hf`.
        image_mean, image_std: Statistics of the images, one number a channel.
    """
    name = _architecture_name(config) or f"vit_small_{'plus_' if config.use_gated_mlp else ''}patch16_dinov3"
    biased = "blocks.0.attn.q_bias" in timm
    usual = _model_args(DINOv3ViTConfig.from_preset(_ARCHITECTURES[name]))
    usual["qkv_bias"] = biased and name != _WITHOUT_BIASED_VARIANT
    args = {**_model_args(config), "qkv_bias": biased}
    return config_fields(
        architecture=name + WITH_BIASES * usual["qkv_bias"],
        model_args={argument: value for argument, value in args.items() if value != usual[argument]},
        num_features=config.hidden_size,
        num_classes=timm["head.weight"].shape[0] if "head.weight" in timm else 0,
        num_channels=config.num_channels,
        image_size=config.image_size,
        image_mean=image_mean,
        image_std=image_std,
        first_conv="patch_embed.proj",
        classifier="head",
    )


def to_hf(timm: Tensors, config: DINOv3ViTConfig) -> Converted:
    """The Hub's state dict; see `FileFormat`. A classifier is kept for the way back."""
    split: dict[str, LazyTensor] = {}
    for name, tensor in timm.items():
        if name.endswith(".attn.qkv.weight"):  # (3D, D)
            split |= zip((name.replace(".qkv.", f".{part}.") for part in "qkv"), tensor.chunk(3), strict=True)
        else:
            split[name] = tensor
    converted = Converted({})
    for name, tensor in _keys(config).apply(split).items():
        (converted.extras if name.startswith(WAY_BACK) else converted.tensors)[name] = tensor

    def derive(name: str, shape: tuple[int, ...], reason: str) -> None:
        converted.tensors[name] = LazyTensor.full(shape, 0, timm["cls_token"].dtype)
        converted.derived[name] = reason

    width = config.hidden_size
    derive("embeddings.mask_token", (1, 1, width), "zeros, as before training: timm keeps none")
    if "reg_token" not in timm:
        derive("embeddings.register_tokens", (1, 0, width), "empty: the network has none")
    if config.query_bias and "blocks.0.attn.q_bias" not in timm:
        for name in _bias_names(config):
            derive(name, (width,), "zeros: timm has left them out of this architecture")
    elif _drops_zero_biases(config, converted.tensors):
        converted.extras[_HAS_BIASES] = timm["blocks.0.attn.q_bias"]
    return converted


def from_hf(ours: Tensors, config: DINOv3ViTConfig) -> Converted:
    """timm's state dict; see `FileFormat`."""
    _refuse_what_timm_cannot_compute(config)
    converted = Converted({})
    kept = dict(ours)

    def drop(name: str, reason: str) -> None:
        del kept[name]
        converted.dropped[name] = reason

    for name, tensor in ours.items():
        if name == "embeddings.mask_token":
            lost = "" if _is_zero(tensor) else "; its values are lost"
            drop(name, f"timm has none: it acts in training only{lost}")
        elif name.startswith(EXTRAS_PREFIX):
            drop(name, "timm has none: it acts in training only; its values are lost")
        elif name.endswith(".k_proj.bias"):
            if not _is_zero(tensor):
                raise ValueError(
                    f"{name} is not zero, and timm's networks have no key bias; keep this model as it is."
                )
            drop(name, "zero: timm has no key bias")
        elif 0 in tensor.shape:
            drop(name, "empty: the network has none")
    if _HAS_BIASES in kept:
        del kept[_HAS_BIASES]
    elif _drops_zero_biases(config, ours):
        for name in _bias_names(config):
            drop(name, "zero: timm leaves them out of this architecture")

    split = _keys(config).inverse().apply(kept)
    for name, tensor in split.items():
        if name.endswith(".attn.q.weight"):
            parts = [split[name.replace(".q.", f".{part}.")] for part in "qkv"]  # 3 x (D, D)
            converted.tensors[name.replace(".q.", ".qkv.")] = concatenate(parts)  # (3D, D)
        elif not name.endswith((".attn.k.weight", ".attn.v.weight")):
            converted.tensors[name] = tensor
    if config.rope_periods_dtype != "float32":
        converted.differences.append(
            f"RoPE periods: timm computes them in float32, this model rounds them to {config.rope_periods_dtype}, by "
            f"up to {_period_rounding(config):.2g} of their value"
        )
    return converted


def architecture(config: DINOv3ViTConfig) -> str | None:
    """timm's name of a released size, without `_qkvb`: `vit_small_patch16_dinov3`."""
    return _architecture_name(config)


def _keys(config: DINOv3ViTConfig) -> KeyMap:
    return SWIGLU_KEYS if config.use_gated_mlp else MLP_KEYS


def _bias_names(config: DINOv3ViTConfig) -> list[str]:
    return [f"layer.{i}.attention.{part}_proj.bias" for i in range(config.num_hidden_layers) for part in ("q", "v")]


def _architecture_name(config: DINOv3ViTConfig) -> str | None:
    for name, preset in _ARCHITECTURES.items():
        released = DINOv3ViTConfig.from_preset(preset)
        if all(config.__dict__[field] == released.__dict__[field] for field in _SIZE_FIELDS):
            return name
    return None


def _released_with_biases(config: DINOv3ViTConfig) -> bool:
    name = _architecture_name(config)
    return name is not None and DINOv3ViTConfig.from_preset(_ARCHITECTURES[name]).query_bias


def _drops_zero_biases(config: DINOv3ViTConfig, ours: Tensors) -> bool:
    """Whether the biases of queries and values are left out, as timm does with released weights."""
    return (
        config.query_bias
        and _released_with_biases(config)
        and all(_is_zero(ours[name]) for name in _bias_names(config))
    )


def _is_zero(tensor: LazyTensor) -> bool:
    return same_bits(tensor.read(), torch.zeros(tensor.shape, dtype=tensor.dtype))


def _period_rounding(config: DINOv3ViTConfig) -> float:
    parameters = RopeParameters.from_config(config)
    exact = rope_periods(parameters._replace(periods_dtype=torch.float32))
    return ((rope_periods(parameters) - exact) / exact).abs().max().item()


def _config(
    timm: Tensors, args: Mapping[str, Any], preset: str | None, image_size: int | list[int]
) -> DINOv3ViTConfig:
    """
    Args:
        timm: The tensors.
        args: Arguments of timm's class that differ from those of the preset.
        preset: The preset of the architecture that `config.json` names; `None` for a bare file.
        image_size: For information.
    """
    _, channels, *patch = _shape(timm, "patch_embed.proj.weight", 4)  # (D, C, p, p)
    gated = "blocks.0.mlp.fc1_g.weight" in timm
    biased = "blocks.0.attn.q_bias" in timm
    sizes: dict[str, Any] = {
        "patch_size": patch,
        "num_channels": channels,
        "hidden_size": _shape(timm, "cls_token", 3)[2],
        "intermediate_size": _shape(timm, f"blocks.0.mlp.fc1{'_g' if gated else ''}.weight", 2)[0],
        "num_hidden_layers": len([name for name in timm if name.endswith(".attn.qkv.weight")]),
        "use_gated_mlp": gated,
        "num_register_tokens": _shape(timm, "reg_token", 3)[1] if "reg_token" in timm else 0,
    }
    config = DINOv3ViTConfig(
        **sizes,
        num_attention_heads=args["num_heads"] if "num_heads" in args else _num_heads(preset, sizes),
        image_size=image_size,
        hidden_act="silu" if gated else "gelu",
        query_bias=biased,
        value_bias=biased,
        # Trained values do not tell where they began; None is a network without LayerScale.
        layerscale_value=number_of(args, "init_values", 1e-5) if "blocks.0.gamma_1" in timm else None,
        rope_theta=number_of(args, "rope_temperature", 100.0),
    )
    if not biased and _released_with_biases(config):
        config.query_bias = config.value_bias = True
    return config


def _num_heads(named: str | None, sizes: Mapping[str, Any]) -> int:
    """Heads of the preset `named`, or of the one with this width and depth.

    Raises:
        ValueError: There is none.
    """
    for preset in PRESETS if named is None else (named,):
        released = DINOv3ViTConfig.from_preset(preset)
        if named is not None or all(sizes[name] == released.__dict__[name] for name in _SIZE_FIELDS[:2]):
            return released.num_attention_heads
    raise ValueError(
        f"a timm file does not tell the number of heads, and {sizes['num_hidden_layers']} blocks of width "
        f"{sizes['hidden_size']} are no released size; give the folder with timm's config.json."
    )


def _model_args(config: DINOv3ViTConfig) -> dict[str, Any]:
    """Arguments of timm's class."""
    width, inner = config.hidden_size, config.intermediate_size
    # timm takes int(width * ratio), which can fall one short.
    ratio = inner / width if int(width * (inner / width)) == inner else (inner + 0.5) / width
    # Any alignment that the width inside the FFN has makes timm build the same network.
    alignment = next(step for step in (64, 8, 1) if inner % step == 0) if config.use_gated_mlp else 0
    return {
        "patch_size": config.patch_size,
        "in_chans": config.num_channels,
        "embed_dim": width,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "mlp_ratio": ratio,
        "swiglu_mlp": config.use_gated_mlp,
        "swiglu_align_to": alignment,
        "init_values": config.layerscale_value,
        "rope_temperature": config.rope_theta,
        "num_reg_tokens": config.num_register_tokens,
    }


def _refuse_what_timm_cannot_compute(config: DINOv3ViTConfig) -> None:
    fields = {**_REQUIRED, "hidden_act": "silu" if config.use_gated_mlp else "gelu", "value_bias": config.query_bias}
    for name, value in fields.items():
        if config.__dict__[name] != value:
            raise ValueError(
                f"timm has no DINOv3 ViT with {name} = {config.__dict__[name]!r} (always {value!r}); "
                "keep this model as it is."
            )


def _shape(timm: Tensors, name: str, ndim: int) -> tuple[int, ...]:
    if name not in timm:
        raise ValueError(f"the checkpoint has no {name}; check that it holds a whole ViT.")
    shape = timm[name].shape
    if len(shape) != ndim or 0 in shape:
        raise ValueError(f"{name} has the shape {shape}; a DINOv3 ViT has {ndim} axes there, none of them empty.")
    return shape


TIMM_VIT = FileFormat(
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
