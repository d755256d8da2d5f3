"""DINOv3 ViT: the original checkpoints ("native") <-> the file format of the Hugging Face Hub.

Functions of state dicts and settings; they neither read nor write files. Beside their names, native tensors differ by
the fused `qkv` projection, by the shape of the mask token and by two buffers that follow from the configuration.

Letters: D width, R register tokens.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dinov3_hf.convert.key_map import KeyMap
from dinov3_hf.models.dinov3_vit.configuration_dinov3_vit import DINOv3ViTConfig
from dinov3_hf.models.dinov3_vit.rope import RopeParameters, rope_periods

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


def state_dict_from_native(native: Mapping[str, Tensor], config: DINOv3ViTConfig) -> dict[str, Tensor]:
    """
    Our state dict from a native one; dtypes stay as they are.

    Args:
        native: The native state dict, buffers included or not.
        config: The configuration of the network, as of `config_from_native`.

    Raises:
        ValueError: A name does not belong to this network, or the tokens are missing.
    """
    missing = [name for name in ("cls_token", "mask_token") if name not in native]
    if missing:
        raise ValueError(f"the checkpoint has no {missing[0]}; check that it holds a whole ViT.")
    split: dict[str, Tensor] = {}
    for name, tensor in native.items():
        if ".attn.qkv.bias_mask" not in name and ".attn.qkv." in name:  # (3D, D) or (3D,)
            split.update(_split_qkv(name, tensor, config))
        else:
            split[name] = tensor
    ours = _keys(config).apply(split)
    ours["embeddings.mask_token"] = ours["embeddings.mask_token"][None]  # (1, 1, D)
    if config.num_register_tokens == 0:
        ours["embeddings.register_tokens"] = ours["embeddings.cls_token"].new_empty(1, 0, config.hidden_size)
    return ours


def state_dict_to_native(ours: Mapping[str, Tensor], config: DINOv3ViTConfig) -> dict[str, Tensor]:
    """
    A native state dict, with its buffers, from ours; dtypes stay as they are.

    A network without key bias becomes one with a masked key bias, whose masked third is zero.

    Raises:
        ValueError: A name does not belong to this network, or the original has no such network.
    """
    if config.query_bias != config.value_bias or (config.key_bias and not config.query_bias):
        raise ValueError(
            "the original has a bias on queries and values together; set query_bias and value_bias alike."
        )
    kept = {name: tensor for name, tensor in ours.items() if tensor.numel() > 0}  # no register tokens: no parameter
    split = _keys(config).inverse().apply(kept)
    native: dict[str, Tensor] = {}
    for name, tensor in split.items():
        if ".attn.q." in name:
            native.update(_fuse_qkv(name, split, config))
        elif ".attn.k." not in name and ".attn.v." not in name:
            native[name] = tensor
    native["mask_token"] = native["mask_token"][0]  # (1, D)
    native["rope_embed.periods"] = rope_periods(RopeParameters.from_config(config))
    return native


def _keys(config: DINOv3ViTConfig) -> KeyMap:
    return SWIGLU_KEYS if config.use_gated_mlp else MLP_KEYS


def _split_qkv(name: str, tensor: Tensor, config: DINOv3ViTConfig) -> dict[str, Tensor]:
    parts = {name.replace(".qkv.", f".{part}."): third for part, third in zip("qkv", tensor.chunk(3), strict=True)}
    if name.endswith(".bias") and not config.key_bias:
        del parts[name.replace(".qkv.", ".k.")]
    return {part: third.clone() for part, third in parts.items()}


def _fuse_qkv(q_name: str, split: Mapping[str, Tensor], config: DINOv3ViTConfig) -> dict[str, Tensor]:
    name = q_name.replace(".q.", ".qkv.")
    query, value = split[q_name], split[q_name.replace(".q.", ".v.")]  # (D, D) or (D,)
    masked = name.endswith(".bias") and not config.key_bias
    key = torch.zeros_like(query) if masked else split[q_name.replace(".q.", ".k.")]
    fused = {name: torch.cat((query, key, value))}  # (3D, D) or (3D,)
    if masked:
        ones = torch.ones_like(query)
        fused[f"{name}_mask"] = torch.cat((ones, torch.zeros_like(ones), ones))  # (3D,)
    return fused


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
