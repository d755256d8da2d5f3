"""Random weights that leave no part of a network without effect, for proofs that two networks are one."""

import math
import zlib
from pathlib import Path

import torch
from torch import Tensor

from dinov3_hf.convert.checkpoint import Checkpoint
from dinov3_hf.convert.formats import architecture_config
from dinov3_hf.convert.image_statistics import ImageStatistics
from dinov3_hf.convert.lazy_tensor import LazyTensor
from dinov3_hf.models.dinov3_pretraining.backbones import BACKBONES


def random_checkpoint(architecture: str, seed: int = 0, zero_qkv_bias: bool = False) -> Checkpoint:
    """
    A checkpoint of random float32 weights, which are drawn when they are read.

    Fresh weights prove little: LayerScale at 1e-5 hides the blocks, zeros hide biases. Here matrices and convolutions
    have the standard deviation 1 / sqrt(fan-in), tokens 0.5 and biases 0.1; norms lie around 1 and LayerScale around
    0.6, both with standard deviation 0.1.

    Args:
        architecture: A preset.
        seed: of the draws; each tensor has its own draw from the seed and its name.
        zero_qkv_bias: Whether the biases of queries and values are zero, as in the released files.

    Raises:
        ArgumentError: There is no such preset.
    """
    config = architecture_config(architecture)
    _, model_class = BACKBONES[config.model_type]
    with torch.device("meta"):
        state = model_class(config).state_dict()
    zeros = ("q_proj.bias", "v_proj.bias") if zero_qkv_bias else ()
    tensors = {
        name: LazyTensor.full(tensor.shape, 0, torch.float32)
        if name.endswith(zeros)
        else _random(name, tuple(tensor.shape), seed)
        for name, tensor in state.items()
        if not name.startswith("local_cls_norm.")  # acts in training only
    }
    return Checkpoint(
        source=Path(f"{architecture}, random weights of seed {seed}"),
        format="hf",
        config=config,
        tensors=tensors,
        statistics=ImageStatistics.of("web", config.num_channels),
        architecture=None,
    )


def _random(name: str, shape: tuple[int, ...], seed: int) -> LazyTensor:
    mean, std = _distribution(name, shape)

    def draw() -> Tensor:
        generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
        return torch.empty(shape).normal_(mean, std, generator=generator)

    return LazyTensor(shape, torch.float32, draw)


def _distribution(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation of a parameter's values."""
    if name.endswith("_token") or name.endswith("_tokens"):
        return 0.0, 0.5
    if len(shape) > 1:
        return 0.0, 1 / math.sqrt(math.prod(shape[1:]))
    if name.endswith(("gamma", "lambda1")):
        return 0.6, 0.1
    return (1.0 if name.endswith("weight") else 0.0), 0.1
