"""DINOv3 ViT: the original checkpoints ("native") <-> the file format of the Hugging Face Hub.

Functions of state dicts and settings; they neither read nor write files. Beside their names, native tensors differ by
the fused `qkv` projection, by the shape of the mask token and by two buffers that follow from the configuration.

Letters: D width, d width of a head.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dinov3_hf.convert.dinov3_vit_from_tensors import FLOAT32_ERROR, MAX_PERIOD_ERROR, read_config, recognises
from dinov3_hf.convert.file_format import Converted, FileFormat, Tensors
from dinov3_hf.convert.key_map import KeyMap
from dinov3_hf.convert.lazy_tensor import LazyTensor, concatenate, read_all, same_bits
from dinov3_hf.models.dinov3_vit.configuration_dinov3_vit import (
    NATIVE_MODEL_TYPE,
    STOCK_MODEL_TYPE,
    DINOv3ViTConfig,
)
from dinov3_hf.models.dinov3_vit.modeling_dinov3_vit import EXTRAS_NAME, EXTRAS_PREFIX
from dinov3_hf.models.dinov3_vit.presets import PRESETS
from dinov3_hf.models.dinov3_vit.rope import RopeParameters, rope_periods

# In the Hub's folder, the prefix of what only the way back needs.
WAY_BACK = "native."

# Native name, with qkv split into q, k and v -> Hub name.
_COMMON_KEYS: list[tuple[str, str | None]] = [
    ("cls_token", "embeddings.cls_token"),
    ("storage_tokens", "embeddings.register_tokens"),
    ("mask_token", "embeddings.mask_token"),
    ("patch_embed.proj.{p}", "embeddings.patch_embeddings.{p}"),
    ("rope_embed.periods", None),  # computed from the configuration
    ("blocks.{i}.norm1.{p}", "layer.{i}.norm1.{p}"),
    ("blocks.{i}.attn.q.{p}", "layer.{i}.attention.q_proj.{p}"),
    ("blocks.{i}.attn.k.{p}", "layer.{i}.attention.k_proj.{p}"),
    ("blocks.{i}.attn.v.{p}", "layer.{i}.attention.v_proj.{p}"),
    ("blocks.{i}.attn.qkv.bias_mask", None),  # a masked key bias is a network without key bias
    ("blocks.{i}.attn.proj.{p}", "layer.{i}.attention.o_proj.{p}"),
    ("blocks.{i}.ls1.gamma", "layer.{i}.layer_scale1.lambda1"),
    ("blocks.{i}.norm2.{p}", "layer.{i}.norm2.{p}"),
    ("blocks.{i}.ls2.gamma", "layer.{i}.layer_scale2.lambda1"),
    ("norm.{p}", "norm.{p}"),
    ("cls_norm.{p}", "cls_norm.{p}"),
    ("local_cls_norm.{p}", "local_cls_norm.{p}"),
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
        ("blocks.{i}.mlp.w1.{p}", "layer.{i}.mlp.gate_proj.{p}"),
        ("blocks.{i}.mlp.w2.{p}", "layer.{i}.mlp.up_proj.{p}"),
        ("blocks.{i}.mlp.w3.{p}", "layer.{i}.mlp.down_proj.{p}"),
    ]
)

# Native names of the norm layers. `layernormbf16` is a LayerNorm of another epsilon, not of another precision.
_NORMS = {"layernorm": ("layernorm", 1e-6), "layernormbf16": ("layernorm", 1e-5), "rmsnorm": ("rmsnorm", 1e-5)}
# The hidden width of a SwiGLU is rounded up to a multiple of this.
_SWIGLU_ALIGNMENT = {"swiglu": 8, "swiglu32": 32, "swiglu64": 64, "swiglu128": 128}
_ROPE_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}

# What the original takes for an argument that is not given; the sizes have no default here.
_NATIVE_DEFAULTS: dict[str, Any] = {
    "img_size": 224,
    "patch_size": 16,
    "in_chans": 3,
    "pos_embed_rope_base": 100.0,
    "pos_embed_rope_min_period": None,
    "pos_embed_rope_max_period": None,
    "pos_embed_rope_normalize_coords": "separate",
    "pos_embed_rope_shift_coords": None,
    "pos_embed_rope_jitter_coords": None,
    "pos_embed_rope_rescale_coords": None,
    "pos_embed_rope_dtype": "bf16",
    "ffn_ratio": 4.0,
    "qkv_bias": True,
    "drop_path_rate": 0.0,
    "layerscale_init": None,
    "norm_layer": "layernorm",
    "ffn_layer": "mlp",
    "ffn_bias": True,
    "proj_bias": True,
    "n_storage_tokens": 0,
    "mask_k_bias": False,
    "untie_cls_and_patch_norms": False,
    "untie_global_and_local_cls_norm": False,
}
_NATIVE_SIZES = ("embed_dim", "depth", "num_heads")

# Fields that tell released architectures apart from each other and from all others.
ARCHITECTURE_FIELDS = (
    *("patch_size", "num_channels", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("use_gated_mlp", "hidden_act", "query_bias", "key_bias", "value_bias", "proj_bias", "mlp_bias"),
    *("num_register_tokens", "norm_type", "untie_cls_and_patch_norms", "untie_global_and_local_cls_norm"),
    *("rope_theta", "rope_normalize_coords"),
)


def config_from_native(constructor: Mapping[str, Any]) -> DINOv3ViTConfig:
    """
    The configuration of a network given by the original's constructor arguments.

    Args:
        constructor: Native keyword arguments; `embed_dim`, `depth` and `num_heads` are required.

    Raises:
        ValueError: An argument is unknown, is missing, or has an unknown value.
    """
    unknown = sorted(set(constructor) - set(_NATIVE_DEFAULTS) - set(_NATIVE_SIZES))
    if unknown:
        raise ValueError(f"{unknown[0]!r} is not an argument of the original ViT; remove it.")
    missing = [name for name in _NATIVE_SIZES if name not in constructor]
    if missing:
        raise ValueError(f"the original ViT needs {missing[0]!r}; add it.")
    native = {**_NATIVE_DEFAULTS, **constructor}
    norm_type, eps = _look_up("norm_layer", native["norm_layer"], _NORMS)
    gated = native["ffn_layer"] != "mlp"
    return DINOv3ViTConfig(
        patch_size=native["patch_size"],
        image_size=native["img_size"],
        num_channels=native["in_chans"],
        hidden_size=native["embed_dim"],
        intermediate_size=_intermediate_size(native["embed_dim"], native["ffn_ratio"], native["ffn_layer"]),
        num_hidden_layers=native["depth"],
        num_attention_heads=native["num_heads"],
        use_gated_mlp=gated,
        hidden_act="silu" if gated else "gelu",
        query_bias=native["qkv_bias"],
        key_bias=native["qkv_bias"] and not native["mask_k_bias"],
        value_bias=native["qkv_bias"],
        proj_bias=native["proj_bias"],
        mlp_bias=native["ffn_bias"],
        layerscale_value=native["layerscale_init"] or None,  # 0 and None both mean a network without LayerScale
        drop_path_rate=native["drop_path_rate"],
        norm_type=norm_type,
        layer_norm_eps=eps,
        num_register_tokens=native["n_storage_tokens"],
        untie_cls_and_patch_norms=native["untie_cls_and_patch_norms"],
        untie_global_and_local_cls_norm=native["untie_global_and_local_cls_norm"],
        rope_theta=native["pos_embed_rope_base"],
        rope_min_period=native["pos_embed_rope_min_period"],
        rope_max_period=native["pos_embed_rope_max_period"],
        rope_normalize_coords=native["pos_embed_rope_normalize_coords"],
        rope_dtype=_look_up("pos_embed_rope_dtype", native["pos_embed_rope_dtype"], _ROPE_DTYPES),
        pos_embed_shift=native["pos_embed_rope_shift_coords"],
        pos_embed_jitter=native["pos_embed_rope_jitter_coords"],
        pos_embed_rescale=native["pos_embed_rope_rescale_coords"],
    )


def to_hf(native: Tensors, config: DINOv3ViTConfig) -> Converted:
    """
    The Hub's state dict; see `FileFormat`.

    What the configuration implies is dropped where the file holds exactly that, else kept for the way back: a masked
    key bias that is not zero, RoPE periods that are rounded.

    Raises:
        ValueError: A name does not belong to this network, the tokens are missing, or a value contradicts `config`.
    """
    missing = [name for name in ("cls_token", "mask_token") if name not in native]
    if missing:
        raise ValueError(f"the checkpoint has no {missing[0]}; check that it holds a whole ViT.")
    split: dict[str, LazyTensor] = {}
    for name, tensor in native.items():
        if name.endswith((".attn.qkv.weight", ".attn.qkv.bias")):  # (3D, D) or (3D,)
            parts = zip("qkv", tensor.chunk(3), strict=True)
            split |= {name.replace(".qkv.", f".{part}."): third for part, third in parts}
        else:
            split[name] = tensor
    converted = Converted({})
    for name in [name for name in split if name.endswith(".attn.qkv.bias_mask")]:
        _drop_masked_key_bias(name, split, config, converted)
    if "rope_embed.periods" in split:
        _drop_periods(split["rope_embed.periods"], config, converted)

    for name, tensor in _keys(config).apply(split).items():
        (converted.extras if name.startswith(EXTRAS_PREFIX) else converted.tensors)[name] = tensor
    tensors = converted.tensors
    tensors["embeddings.mask_token"] = tensors["embeddings.mask_token"].view(1, 1, config.hidden_size)
    if config.num_register_tokens == 0:
        tensors["embeddings.register_tokens"] = LazyTensor.full(
            (1, 0, config.hidden_size), 0, tensors["embeddings.cls_token"].dtype
        )
        converted.derived["embeddings.register_tokens"] = "empty: the network has none"
    if architecture(config) is None:
        converted.differences.append(
            "no released architecture: what a native file does not say is taken as in the released ones "
            f"(layer_norm_eps = {config.layer_norm_eps}, rope_normalize_coords = {config.rope_normalize_coords!r}, "
            f"rope_dtype = {config.rope_dtype!r}); mend config.json if it was trained otherwise"
        )
    return converted


def from_hf(ours: Tensors, config: DINOv3ViTConfig) -> Converted:
    """
    A native state dict, with its buffers; see `FileFormat`.

    A network without key bias becomes one with a masked key bias, whose masked third is zero unless
    `extras.safetensors` has another.

    Raises:
        ValueError: A name does not belong to this network, or the original has no such network.
    """
    if config.query_bias != config.value_bias or (config.key_bias and not config.query_bias):
        raise ValueError(
            "the original has a bias on queries and values together; set query_bias and value_bias alike."
        )
    extras = {name.removeprefix(WAY_BACK): tensor for name, tensor in ours.items() if name.startswith(WAY_BACK)}
    # Without register tokens their parameter is empty here, and absent there.
    kept = {name: tensor for name, tensor in ours.items() if not name.startswith(WAY_BACK) and 0 not in tensor.shape}
    empty = [name for name in ours if not name.startswith(WAY_BACK) and name not in kept]
    converted = Converted({}, dropped=dict.fromkeys(empty, "empty: the network has none"))
    if config.untie_global_and_local_cls_norm:
        for name in [name for name in kept if name.startswith("norm.")]:
            local_name = name.replace("norm.", EXTRAS_PREFIX)
            if local_name not in kept:
                kept[local_name] = kept[name]
                converted.derived[local_name] = "a copy of norm: it acts in training only"

    split = _keys(config).inverse().apply(kept)
    for name, tensor in split.items():
        if ".attn.q." in name:
            _fuse_qkv(name, split, extras, config, converted)
        elif ".attn.k." not in name and ".attn.v." not in name:
            converted.tensors[name] = tensor
    converted.tensors["mask_token"] = converted.tensors["mask_token"].view(1, config.hidden_size)
    _add_periods(extras, config, converted)
    unknown = sorted(set(extras))
    if unknown:
        raise ValueError(f"{WAY_BACK}{unknown[0]} in {EXTRAS_NAME} belongs to no tensor of this network; remove it.")
    converted.differences.extend(_unsaid(config))
    return converted


def state_dict_from_native(native: Mapping[str, Tensor], config: DINOv3ViTConfig) -> dict[str, Tensor]:
    """
    The state dict of our model from a native one; dtypes stay as they are.

    Args:
        native: The native state dict, buffers included or not.
        config: The configuration of the network, as of `config_from_native`.

    Raises:
        ValueError: As `to_hf`.
    """
    converted = to_hf({name: LazyTensor.of(tensor) for name, tensor in native.items()}, config)
    acting = {name: tensor for name, tensor in converted.extras.items() if name.startswith(EXTRAS_PREFIX)}
    # Cloned, because thirds of one matrix share its memory.
    return {name: tensor.read().clone() for name, tensor in (converted.tensors | acting).items()}


def state_dict_to_native(ours: Mapping[str, Tensor], config: DINOv3ViTConfig) -> dict[str, Tensor]:
    """
    A native state dict, with its buffers, from that of our model; dtypes stay as they are.

    Raises:
        ValueError: As `from_hf`.
    """
    return read_all(from_hf({name: LazyTensor.of(tensor) for name, tensor in ours.items()}, config).tensors)


def architecture(config: DINOv3ViTConfig) -> str | None:
    """The original's name of a released architecture: `dinov3_vits16`."""
    for preset in PRESETS:
        released = DINOv3ViTConfig.from_preset(preset)
        if all(released.__dict__[name] == config.__dict__[name] for name in ARCHITECTURE_FIELDS):
            return f"dinov3_{preset}"
    return None


def _keys(config: DINOv3ViTConfig) -> KeyMap:
    return SWIGLU_KEYS if config.use_gated_mlp else MLP_KEYS


def _drop_masked_key_bias(
    name: str, split: dict[str, LazyTensor], config: DINOv3ViTConfig, converted: Converted
) -> None:
    """Take the key bias that the mask `name` cancels, and the mask, out of `split`; keep what cannot be derived."""
    if config.key_bias:
        raise ValueError(f"{name} cancels the key bias, which the architecture has; check the architecture.")
    key_name = name.replace(".qkv.bias_mask", ".k.bias")
    if key_name not in split:
        raise ValueError(f"{name} has no bias to mask; check that the checkpoint is whole.")
    key_bias, mask = split.pop(key_name), split[name].read()
    expected = _bias_mask(config, key_bias.dtype)
    if mask.shape != expected.shape:
        raise ValueError(f"{name} has {mask.numel()} values instead of {len(expected)}; check the architecture.")
    if not torch.equal(mask.to(expected.dtype), expected):
        raise ValueError(
            f"{name} is not ones, zeros and ones for queries, keys and values; NaN there means weights that were "
            "never initialised."
        )
    if not same_bits(key_bias.read(), torch.zeros(key_bias.shape, dtype=key_bias.dtype)):
        converted.extras[f"{WAY_BACK}{key_name}"] = key_bias
    if mask.dtype != expected.dtype:
        converted.extras[f"{WAY_BACK}{name}"] = split[name]
    else:
        converted.dropped[name] = "a masked key bias is a network without key bias"


def _fuse_qkv(
    q_name: str,
    split: Mapping[str, LazyTensor],
    extras: dict[str, LazyTensor],
    config: DINOv3ViTConfig,
    converted: Converted,
) -> None:
    name, key_name = q_name.replace(".q.", ".qkv."), q_name.replace(".q.", ".k.")
    query, value = split[q_name], split[q_name.replace(".q.", ".v.")]  # (D, D) or (D,)
    masked = name.endswith(".bias") and not config.key_bias
    if masked:
        key = extras.pop(key_name, LazyTensor.full(query.shape, 0, query.dtype))  # what the mask hides
        if (key.shape, key.dtype) != (query.shape, query.dtype):
            raise ValueError(
                f"{WAY_BACK}{key_name} in {EXTRAS_NAME} is {key.dtype} of shape {key.shape}, and the bias of the "
                f"queries {query.dtype} of shape {query.shape}; remove it."
            )
    else:
        key = split[key_name]
    converted.tensors[name] = concatenate([query, key, value])  # (3D, D) or (3D,)
    if masked:
        mask_name, dtype = f"{name}_mask", query.dtype
        if mask_name in extras:
            mask = extras.pop(mask_name)
            if not torch.equal(mask.read().to(dtype), _bias_mask(config, dtype)):
                raise ValueError(f"{WAY_BACK}{mask_name} in {EXTRAS_NAME} is not ones, zeros and ones; remove it.")
            converted.tensors[mask_name] = mask
            return
        converted.tensors[mask_name] = LazyTensor((3 * config.hidden_size,), dtype, lambda: _bias_mask(config, dtype))
        converted.derived[mask_name] = "ones, zeros, ones: the network has no key bias"


def _bias_mask(config: DINOv3ViTConfig, dtype: torch.dtype) -> Tensor:
    return torch.tensor([1, 0, 1], dtype=dtype).repeat_interleave(config.hidden_size)  # (3D,)


def _drop_periods(periods: LazyTensor, config: DINOv3ViTConfig, converted: Converted) -> None:
    """Drop RoPE periods that are those of the configuration; keep others for the way back."""
    name, found = "rope_embed.periods", periods.read()  # (d/4,)
    computed = rope_periods(RopeParameters.from_config(config))
    if found.shape != computed.shape:
        raise ValueError(
            f"{name} has {len(found)} values, a head of width {config.head_dim} has {len(computed)}; "
            "check the architecture."
        )
    error = ((found.double() - computed.double()) / computed.double()).abs().max().item()
    if not error < MAX_PERIOD_ERROR:
        raise ValueError(f"{name} are not those of the architecture; check it.")
    if same_bits(found, computed):
        converted.dropped[name] = "follows from the configuration"
        return
    converted.extras[f"{WAY_BACK}{name}"] = periods
    if error > FLOAT32_ERROR:
        converted.differences.append(
            f"RoPE periods: the file's are rounded, by up to {error:.2g} of their value; the folder's model computes "
            'them in float32, and as rounded with rope_periods_dtype="bfloat16" (classes of dinov3_hf only)'
        )


def _add_periods(extras: dict[str, LazyTensor], config: DINOv3ViTConfig, converted: Converted) -> None:
    name = "rope_embed.periods"
    computed = rope_periods(RopeParameters.from_config(config))
    if name not in extras:
        converted.tensors[name] = LazyTensor.of(computed)
        converted.derived[name] = "computed from the configuration"
        return
    kept = extras.pop(name)
    values = kept.read().double()
    if values.shape != computed.shape or not torch.allclose(values, computed.double(), rtol=MAX_PERIOD_ERROR, atol=0):
        raise ValueError(
            f"{WAY_BACK}{name} in {EXTRAS_NAME} are not the RoPE periods that config.json describes; remove them."
        )
    converted.tensors[name] = kept


def _unsaid(config: DINOv3ViTConfig) -> list[str]:
    """Settings that act on features and have no place in a native file, unless they are those of released models."""
    released = DINOv3ViTConfig.from_preset("vits16")
    return [
        f"{name} = {config.__dict__[name]} has no place in a native file: tell who reads it"
        for name in ("layer_norm_eps", "rope_normalize_coords", "rope_dtype")
        if config.__dict__[name] != released.__dict__[name]
    ]


def _intermediate_size(embed_dim: int, ffn_ratio: float, ffn_layer: str) -> int:
    hidden = int(embed_dim * ffn_ratio)
    if ffn_layer == "mlp":
        return hidden
    alignment: int = _look_up("ffn_layer", ffn_layer, _SWIGLU_ALIGNMENT)
    return -(-int(hidden * 2 / 3) // alignment) * alignment  # rounded up


def _look_up(argument: str, value: str, known: Mapping[str, Any]) -> Any:
    if value not in known:
        choices = [*known, "mlp"] if argument == "ffn_layer" else known
        raise ValueError(f"{argument} {value!r} is not known; use one of {', '.join(choices)}.")
    return known[value]


NATIVE_VIT = FileFormat(
    name="native",
    model_types=(STOCK_MODEL_TYPE, NATIVE_MODEL_TYPE),
    recognises=recognises,
    read_config=read_config,
    to_hf=to_hf,
    from_hf=from_hf,
    architecture=architecture,
)
