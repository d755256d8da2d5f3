"""A trained backbone for images of other channels: one for grey, several for multi-spectral images.

A network sees normalised pixels, z_c = (x_c - mean_c) / std_c. So what becomes of its first convolution depends on the
statistics of both kinds of images.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel


class ChannelStatistics(NamedTuple):
    """What pixels are normalised with: one value for each channel, of pixel values in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


def statistics_for(num_channels: int, before: ChannelStatistics) -> ChannelStatistics:
    """
    Statistics to begin with where nobody has measured them.

    Grey images get the mean over the old channels; of several channels each gets those of the old channel whose
    weights it gets, in turn.

    Args:
        num_channels: of the new images.
        before: statistics of the images that the network was trained on.
    """
    num_before = len(before.mean)
    if num_channels == 1:
        return ChannelStatistics((sum(before.mean) / num_before,), (sum(before.std) / num_before,))
    turns = [i % num_before for i in range(num_channels)]
    return ChannelStatistics(tuple(before.mean[i] for i in turns), tuple(before.std[i] for i in turns))


@torch.no_grad()
def change_channels(
    backbone: PreTrainedModel, num_channels: int, before: ChannelStatistics, after: ChannelStatistics
) -> None:
    r"""
    Let a trained ViT or ConvNeXt take images of another number of channels, in place.

    Grey, exactly: with kernels $W_c$ and bias $b$, the new kernel and bias

    $$ W = s \sum_c \frac{W_c}{s_c}, \qquad b' = b + \sum_{c, p} W_c(p) \, \frac{m - m_c}{s_c} $$

    make of a grey image x what the old ones made of the colour image (x, x, x), each normalised with its own
    statistics: $W * (x - m) / s + b' = \sum_c W_c * (x - m_c) / s_c + b$. The sum over p runs over the pixels of a
    kernel; patch embeddings and stems have no padding.

    Several channels, by the rule of timm: kernels repeat in turn, scaled by old / new number of channels. This is a
    place to start from; the new kernels have to be trained.

    Args:
        backbone: its first layer is changed, and `config.num_channels`.
        num_channels: of the new images; nothing is changed if it is the old number.
        before: statistics of the images that the network was trained on, with one value for each old channel.
        after: statistics of the new images, with one value for each new channel.
    """
    network: Any = backbone
    convolution = network.get_input_embeddings()
    if num_channels == convolution.in_channels:
        return
    if num_channels == 1:
        dtype = convolution.weight.dtype
        kernels = convolution.weight.double() / _column(before.std)  # (D, C, p, p), of pixels instead of z
        shift = (kernels * (after.mean[0] - _column(before.mean))).sum(dim=(1, 2, 3))  # (D,)
        convolution.bias.copy_(convolution.bias.double() + shift)
        convolution.weight.copy_((kernels * after.std[0]).to(dtype))
    network.set_num_channels(num_channels)


def _column(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None, None]  # (C, 1, 1)
