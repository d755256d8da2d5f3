"""The blocks of both towers of dino.txt: pre-norm attention without positions, then an FFN.

Legend: B images or texts, N tokens of each, D width, A heads, d = D / A head width, K <= B that go through a branch.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dinov3_hf.models.dinov3_vit.layers import (
    DINOv3ViTGatedMLP,
    DINOv3ViTLayerScale,
    DINOv3ViTMLP,
    eager_attention_forward,
)


@dataclass(frozen=True)
class BlockShape:
    """What a block is made of; fields as in the configurations of the towers."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    layer_norm_eps: float
    hidden_act: str
    use_gated_mlp: bool = False
    layerscale_value: float | None = None
    is_causal: bool = False
    mlp_bias: bool = True


def causal_eager_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """Attention written out; the other implementations read `is_causal` from the module themselves."""
    mask = None
    if module.is_causal:
        num_tokens = query.shape[2]
        mask = query.new_full((num_tokens, num_tokens), -torch.inf).triu(1)  # (N, N)
    return eager_attention_forward(module, query, key, value, mask, **kwargs)


class DinoTxtAttention(nn.Module):
    """Self-attention; its projections to queries, keys and values have no bias."""

    def __init__(self, shape: BlockShape, config: PreTrainedConfig) -> None:
        super().__init__()
        self.config = config  # of the tower: which implementation of attention to use
        self.head_dim = shape.hidden_size // shape.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = shape.is_causal  # read by the attention functions of transformers
        self.q_proj = nn.Linear(shape.hidden_size, shape.hidden_size, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, shape.hidden_size, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, shape.hidden_size, bias=False)
        self.o_proj = nn.Linear(shape.hidden_size, shape.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, causal_eager_attention)
        query, key, value = (
            projection(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )  # 3 x (B, A, N, d)
        output, _ = attend(self, query, key, value, attention_mask=None, scaling=self.scaling, dropout=0.0)
        return self.o_proj(output.flatten(2))  # (B, N, A, d) -> (B, N, D)


class DinoTxtLayer(GradientCheckpointingLayer):
    """Block: `x + ls1(attention(norm1(x)))`, then `x + ls2(mlp(norm2(x)))`."""

    def __init__(self, shape: BlockShape, config: PreTrainedConfig) -> None:
        super().__init__()
        has_layer_scale = shape.layerscale_value is not None
        self.norm1 = nn.LayerNorm(shape.hidden_size, eps=shape.layer_norm_eps)
        self.attention = DinoTxtAttention(shape, config)
        self.layer_scale1 = DINOv3ViTLayerScale(shape) if has_layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(shape.hidden_size, eps=shape.layer_norm_eps)
        self.mlp = DINOv3ViTGatedMLP(shape) if shape.use_gated_mlp else DINOv3ViTMLP(shape)
        self.layer_scale2 = DINOv3ViTLayerScale(shape) if has_layer_scale else nn.Identity()

    def forward(self, hidden_states: Tensor, kept: Tensor | None = None) -> Tensor:
        """
        Args:
            hidden_states: (B, N, D).
            kept: (2, K) int64, the images of the attention and of the FFN branch under stochastic depth; `None` is
                all images in both.
        """
        kept_attention, kept_mlp = (None, None) if kept is None else kept.unbind()
        attended = self.layer_scale1(self.attention(self.norm1(_select(hidden_states, kept_attention))))
        hidden_states = _add_branch(hidden_states, attended, kept_attention)  # (B, N, D)
        mlp_output = self.layer_scale2(self.mlp(self.norm2(_select(hidden_states, kept_mlp))))
        return _add_branch(hidden_states, mlp_output, kept_mlp)


def _select(hidden_states: Tensor, kept: Tensor | None) -> Tensor:
    return hidden_states if kept is None else hidden_states.index_select(0, kept)  # (K, N, D)


def _add_branch(hidden_states: Tensor, branch: Tensor, kept: Tensor | None) -> Tensor:
    """Add a branch to the images that it came from, B / K times; the others pass unchanged."""
    if kept is None:
        return hidden_states + branch
    scale = len(hidden_states) / len(kept)
    return hidden_states.index_add(0, kept, (branch * scale).to(hidden_states.dtype))
