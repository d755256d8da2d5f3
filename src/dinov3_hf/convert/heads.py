"""`heads.safetensors`: the DINO and iBOT prototype heads beside a backbone, their shapes in the metadata."""

import json
import re
from collections.abc import Mapping

from dinov3_hf.convert.lazy_tensor import LazyTensor
from dinov3_hf.convert.training_checkpoint import HEADS

HEADS_NAME = "heads.safetensors"
_LINEAR = re.compile(r"mlp(?:\.(\d+))?\.weight")


def head_shapes(heads: Mapping[str, LazyTensor]) -> dict[str, str]:
    """
    The settings of each head as metadata of `heads.safetensors`: name -> JSON of the arguments of `PrototypeHead`.

    Args:
        heads: `dino_head.mlp.0.weight`, ..., `ibot_head.last_layer.weight`.

    Raises:
        ValueError: A head is not whole.
    """
    metadata = {}
    for head in HEADS:
        parts = {name.removeprefix(f"{head}."): tensor for name, tensor in heads.items() if name.startswith(head)}
        if not parts:
            continue
        layers = {int(match[1] or 0): name for name in parts if (match := _LINEAR.fullmatch(name))}
        if not layers or any(len(parts[name].shape) != 2 for name in layers.values()):
            raise ValueError(f"{head} has no layers mlp.N.weight of two axes; check the checkpoint.")
        last = parts.get("last_layer.weight")
        if last is None or len(last.shape) != 2:
            raise ValueError(f"{head} has no last_layer.weight of two axes; check the checkpoint.")
        first_layer = layers[min(layers)]
        metadata[head] = json.dumps(
            {
                "num_prototypes": last.shape[0],
                "bottleneck_dim": last.shape[1],
                "hidden_dim": parts[first_layer].shape[0],
                "num_layers": len(layers),
                "mlp_bias": first_layer.replace("weight", "bias") in parts,
            }
        )
    return metadata
