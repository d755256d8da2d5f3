"""The layers of the DINOv3 vision transformer, on packed tokens.

Legend: B images of a crop group, C channels, H x W pixels, h x w patch grid, P = h * w patches, R register tokens,
N = 1 + R + P tokens of an image, D width, A heads, d = D / A head width, L blocks, T tokens of all images of all crop
groups, K <= T tokens that go through a branch. Crops of different sizes are packed into one (T, D) matrix: token-wise
layers see that matrix, attention runs per group.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dinov3_hf.models.dinov3_vit.configuration_dinov3_vit import DINOv3ViTConfig
from dinov3_hf.models.dinov3_vit.rope import RopeDraws, rotate

Rotation = tuple[Tensor, Tensor]  # cosine and signed sine of one crop group in one block, each (N, 1, 1, d)


class CropGroup(NamedTuple):
    """Images of one size inside the packed matrix, where they fill `num_images * num_tokens` rows."""

    num_images: int
    num_tokens: int

    @property
    def num_rows(self) -> int:
        return self.num_images * self.num_tokens


class KeptImages(NamedTuple):
    """The images that go through one branch under stochastic depth."""

    rows: Tensor  # (K,) int64, their rows in the packed matrix
    scale: Tensor  # (K, 1), images / kept images of the row's group
    groups: tuple[CropGroup, ...]


class ForwardDraws(NamedTuple):
    """The random numbers of a forward in training mode; `None` where nothing is drawn."""

    kept_images: tuple[Tensor, ...] | None = (
        None  # for each group (L, 2, kept) int64: of attention and FFN, each block
    )
    rope: tuple[RopeDraws, ...] | None = None  # one for each group


def num_kept(num_images: int, drop_path_rate: float) -> int:
    """How many of `num_images` images go through a branch."""
    return max(int(num_images * (1 - drop_path_rate)), 1)


def unpack(packed: Tensor, groups: Sequence[CropGroup]) -> list[Tensor]:
    """Split a packed matrix (T, D) into its groups, each (B, N, D)."""
    parts = packed.split([group.num_rows for group in groups])
    return [part.unflatten(0, tuple(group)) for part, group in zip(parts, groups, strict=True)]


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention written out. Takes (B, A, N, d) thrice, returns (B, N, A, d) and the probabilities (B, A, N, N)."""
    scores = query @ key.transpose(-2, -1) * scaling  # (B, A, N, N)
    if attention_mask is not None:
        scores = scores + attention_mask
    probabilities = F.dropout(scores.softmax(dim=-1), dropout, module.training)  # (B, A, N, N)
    return (probabilities @ value).transpose(1, 2).contiguous(), probabilities


class DINOv3ViTRMSNorm(nn.Module):
    """Root mean square norm: float32 inside, cast back, then the weight."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        wide = hidden_states.float()
        normalized = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return normalized.to(hidden_states.dtype) * self.weight


def build_norm(config: DINOv3ViTConfig) -> nn.Module:
    if config.norm_type == "rmsnorm":
        return DINOv3ViTRMSNorm(config.hidden_size, config.layer_norm_eps)
    return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


class DINOv3ViTEmbeddings(nn.Module):
    """Image to tokens: [CLS, registers, patches row-major]; extra pixels on the right and bottom are dropped."""

    def __init__(self, config: DINOv3ViTConfig) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.hidden_size))
        self.mask_token = nn.Parameter(torch.empty(1, 1, config.hidden_size))
        self.register_tokens = nn.Parameter(torch.empty(1, config.num_register_tokens, config.hidden_size))
        self.patch_embeddings = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )

    def forward(self, pixel_values: Tensor, bool_masked_pos: Tensor | None = None) -> Tensor:
        patches = self.patch_embeddings(pixel_values.to(self.patch_embeddings.weight.dtype))  # (B, D, h, w)
        # Under autocast the convolution returns bfloat16; the residual stream keeps the dtype of the weights.
        patches = patches.flatten(2).transpose(1, 2).to(self.cls_token.dtype)  # (B, P, D)
        cls_token = self.cls_token
        if bool_masked_pos is not None:
            patches = torch.where(bool_masked_pos[..., None], self.mask_token, patches)  # (B, P, D)
        elif self.training:
            cls_token = cls_token + 0 * self.mask_token  # a gradient of zero: DDP waits for every parameter's
        batch_size = patches.shape[0]
        prefix = torch.cat((cls_token, self.register_tokens), dim=1)  # (1, 1 + R, D)
        return torch.cat((prefix.expand(batch_size, -1, -1), patches), dim=1)  # (B, N, D)


class DINOv3ViTAttention(nn.Module):
    """Self-attention inside each image, with RoPE."""

    def __init__(self, config: DINOv3ViTConfig) -> None:
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.head_dim = config.head_dim
        self.scaling = config.head_dim**-0.5
        self.is_causal = False  # read by the attention functions of transformers
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.query_bias)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.key_bias)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.value_bias)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.proj_bias)

    def forward(
        self,
        hidden_states: Tensor,
        groups: Sequence[CropGroup],
        rotations: Sequence[Rotation],
        output_attentions: bool = False,
    ) -> tuple[Tensor, list[Tensor | None]]:
        attend = eager_attention_forward
        if not output_attentions:
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)

        qkv = self.project_qkv(hidden_states)  # (T, 3D)
        outputs: list[Tensor] = []
        attentions: list[Tensor | None] = []
        parts = qkv.split([group.num_rows for group in groups])
        for part, group, (cos, sin) in zip(parts, groups, rotations, strict=True):
            part = part.view(*group, 3, self.num_heads, self.head_dim)  # (B, N, 3, A, d)
            query, key = rotate(part[:, :, :2], cos, sin).transpose(1, 3).unbind(2)  # 2 x (B, A, N, d)
            value = part[:, :, 2].transpose(1, 2)  # (B, A, N, d)
            dropout = self.config.attention_dropout if self.training else 0.0
            output, attention = attend(
                self, query, key, value, attention_mask=None, scaling=self.scaling, dropout=dropout
            )  # (B, N, A, d)
            outputs.append(output.reshape(group.num_rows, -1))  # (B * N, D)
            attentions.append(attention)
        return self.o_proj(outputs[0] if len(outputs) == 1 else torch.cat(outputs)), attentions

    def project_qkv(self, hidden_states: Tensor) -> Tensor:
        """Queries, keys and values side by side: (T, D) -> (T, 3D), as one product wherever the weights are plain."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        if not all(map(is_plain_linear, projections)):
            return torch.cat([projection(hidden_states) for projection in projections], dim=-1)
        weight = torch.cat([projection.weight for projection in projections])  # (3D, D)
        biases = [projection.bias for projection in projections]
        if all(bias is None for bias in biases):
            return F.linear(hidden_states, weight)
        zeros = weight.new_zeros(self.config.hidden_size)
        return F.linear(hidden_states, weight, torch.cat([zeros if bias is None else bias for bias in biases]))


def is_plain_linear(projection: nn.Module) -> bool:
    """
    Whether reading the weight is the same as calling the module: not wrapped (PEFT), quantised or sharded (a tensor
    subclass; ZeRO-3 and FSDP gather in hooks), offloaded (an instance's own `forward`), or watched by a hook.
    """
    return (
        type(projection) is nn.Linear
        and type(projection.weight) is nn.Parameter
        and not projection._forward_hooks
        and not projection._forward_pre_hooks
        and not projection._backward_hooks
        and not projection._backward_pre_hooks
        and "forward" not in projection.__dict__
    )


class DINOv3ViTLayerScale(nn.Module):
    """A learned factor for each channel of a branch."""

    def __init__(self, config: DINOv3ViTConfig) -> None:
        super().__init__()
        self.initial_value = config.layerscale_value
        self.lambda1 = nn.Parameter(torch.empty(config.hidden_size))

    def forward(self, branch: Tensor, residual: Tensor | None = None) -> Tensor:
        """`lambda1 * branch`, added to `residual` in the same pass when there is one."""
        if residual is None:
            return branch * self.lambda1
        return torch.addcmul(residual, branch, self.lambda1)


class DINOv3ViTMLP(nn.Module):
    def __init__(self, config: DINOv3ViTConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.up_proj(hidden_states)))


class DINOv3ViTGatedMLP(nn.Module):
    """SwiGLU when `hidden_act` is "silu"."""

    def __init__(self, config: DINOv3ViTConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class DINOv3ViTLayer(GradientCheckpointingLayer):
    """Block: `x + ls1(attention(norm1(x)))`, then `x + ls2(mlp(norm2(x)))`."""

    def __init__(self, config: DINOv3ViTConfig) -> None:
        super().__init__()
        has_layer_scale = config.layerscale_value is not None
        self.norm1 = build_norm(config)
        self.attention = DINOv3ViTAttention(config)
        self.layer_scale1 = DINOv3ViTLayerScale(config) if has_layer_scale else None
        self.norm2 = build_norm(config)
        self.mlp = DINOv3ViTGatedMLP(config) if config.use_gated_mlp else DINOv3ViTMLP(config)
        self.layer_scale2 = DINOv3ViTLayerScale(config) if has_layer_scale else None

    def forward(
        self,
        hidden_states: Tensor,
        groups: Sequence[CropGroup],
        rotations: Sequence[Rotation],
        kept: tuple[KeptImages, KeptImages] | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, list[Tensor | None]]:
        """
        Args:
            hidden_states: (T, D) packed tokens.
            groups: What the rows are.
            rotations: One for each group.
            kept: The images of the attention and of the FFN branch; `None` is all images in both.
            output_attentions: Whether to return attention probabilities, (B, A, N, N) for each group.
        """
        kept_attention, kept_mlp = (None, None) if kept is None else kept

        attention_groups = groups if kept_attention is None else kept_attention.groups
        attended, attentions = self.attention(
            self.norm1(select(hidden_states, kept_attention)), attention_groups, rotations, output_attentions
        )
        hidden_states = add_branch(hidden_states, attended, self.layer_scale1, kept_attention)  # (T, D)
        del attended  # its memory serves the FFN

        mlp_output = self.mlp(self.norm2(select(hidden_states, kept_mlp)))
        hidden_states = add_branch(hidden_states, mlp_output, self.layer_scale2, kept_mlp)  # (T, D)
        return hidden_states, attentions


def select(hidden_states: Tensor, kept: KeptImages | None) -> Tensor:
    """The rows that a branch works on: (T, D) -> (K, D)."""
    return hidden_states if kept is None else hidden_states.index_select(0, kept.rows)


def add_branch(
    hidden_states: Tensor, branch: Tensor, layer_scale: DINOv3ViTLayerScale | None, kept: KeptImages | None
) -> Tensor:
    """Add a branch (K, D) to the rows that it came from; other rows pass unchanged."""
    if kept is None:
        return hidden_states + branch if layer_scale is None else layer_scale(branch, hidden_states)
    if layer_scale is not None:
        branch = layer_scale(branch)
    return hidden_states.index_add(0, kept.rows, (branch * kept.scale).to(hidden_states.dtype))
