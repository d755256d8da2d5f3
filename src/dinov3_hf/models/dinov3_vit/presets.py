"""The released ViT sizes: name -> fields of `DINOv3ViTConfig` that differ from its defaults.

No imports, so that the command line can list the names without loading torch. Depth, width, heads and FFN of the
released models; LayerScale starts at 1e-5, as in their training.
"""

from typing import Any

_RELEASED: dict[str, Any] = {
    "layerscale_value": 1e-5,
    "num_register_tokens": 4,
    "pos_embed_rescale": 2.0,
}
_SWIGLU: dict[str, Any] = {"use_gated_mlp": True, "hidden_act": "silu"}


def _size(
    hidden_size: int, num_hidden_layers: int, num_attention_heads: int, intermediate_size: int
) -> dict[str, Any]:
    return {
        **_RELEASED,
        "hidden_size": hidden_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads,
        "intermediate_size": intermediate_size,
    }


_VIT_L = _size(1024, 24, 16, 4096)
_VIT_7B: dict[str, Any] = {
    **_size(4096, 40, 32, 8192),
    **_SWIGLU,
    "query_bias": False,
    "value_bias": False,
    "untie_global_and_local_cls_norm": True,
}

PRESETS: dict[str, dict[str, Any]] = {
    "vits16": _size(384, 12, 6, 1536),
    "vits16plus": {**_size(384, 12, 6, 1536), **_SWIGLU},
    "vitb16": _size(768, 12, 12, 3072),
    "vitl16": _VIT_L,
    "vitl16plus": {**_VIT_L, **_SWIGLU},
    "vith16plus": {**_size(1280, 32, 20, 5120), **_SWIGLU},
    "vit7b16": _VIT_7B,
    # Trained on satellite images, whose statistics are `IMAGE_STATISTICS["satellite"]`.
    "vitl16_sat493m": {**_VIT_L, "untie_global_and_local_cls_norm": True},
    "vit7b16_sat493m": _VIT_7B,
}
