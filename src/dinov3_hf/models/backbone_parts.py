"""What the backbones of all families do alike."""

from collections.abc import Sequence

import torch
from torch import Tensor


def convert_patch_embedding_channels(weight: Tensor, num_channels: int) -> Tensor:
    """
    Patch embedding for another number of channels, by the rule of timm: one channel gets the sum over the old ones;
    several repeat the old ones in turn, scaled so that inputs of the same size give outputs of the same size.

    Args:
        weight: (D, C, p, p).
        num_channels: C'.

    Returns:
        (D, C', p, p) in the dtype of `weight`.
    """
    if num_channels < 1:
        raise ValueError(f"num_channels {num_channels} is not a number of image channels; give at least 1.")
    if num_channels == 1:
        return weight.sum(dim=1, keepdim=True, dtype=torch.float32).to(weight.dtype)
    before = weight.shape[1]
    repeated = weight[:, torch.arange(num_channels) % before].float()  # (D, C', p, p)
    return (repeated * (before / num_channels)).to(weight.dtype)


def layers_asked_for(n: int | Sequence[int], num_layers: int, name: str) -> list[int]:
    """
    The layers that the argument `n` of `get_intermediate_layers` names, in ascending order.

    Args:
        n: The last n layers, or layer indices.
        num_layers: Layers that the model has.
        name: What a layer is called, for the message.

    Raises:
        ValueError: `n` names none, or one that does not exist.
    """
    layers = list(range(num_layers))[-n:] if isinstance(n, int) else sorted(set(n))
    if not layers or not 0 <= layers[0] <= layers[-1] < num_layers or (isinstance(n, int) and not 0 < n <= num_layers):
        raise ValueError(f"n={n} does not name {name} of this model; it has {num_layers}, counted from 0.")
    return layers
