"""What a backbone holds, computes and keeps, by arithmetic on the fields of its configuration.

A floating-point operation is one multiplication or one addition of a matrix product, an attention or a convolution,
as `torch.utils.flop_counter` counts them; what works element by element is left out. Bytes are those of the tensors
that autograd keeps for the backward pass, without `torch.compile`.

Letters: D width, F width inside the FFN, A heads, L blocks, N tokens of a crop, T tokens of all crops, K <= T tokens
of the crops that go through a branch under stochastic depth, P positions of a feature map, C channels of it, b bytes
of a number in matrix products: 2 under bf16 autocast, 4 in float32.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple, Protocol

Recomputation = Literal["none", "selective", "full"]

# Fields that a preset may leave out, with the defaults of the configurations.
_VIT_DEFAULTS: dict[str, Any] = {
    "patch_size": 16,
    "num_channels": 3,
    "num_register_tokens": 0,
    "use_gated_mlp": False,
    "query_bias": True,
    "key_bias": False,
    "value_bias": True,
    "proj_bias": True,
    "mlp_bias": True,
    "layerscale_value": 1.0,
    "norm_type": "layernorm",
    "untie_cls_and_patch_norms": False,
    "untie_global_and_local_cls_norm": False,
    "drop_path_rate": 0.0,
}
_CONVNEXT_DEFAULTS: dict[str, Any] = {
    "num_channels": 3,
    "hidden_sizes": (96, 192, 384, 768),
    "depths": (3, 3, 9, 3),
    "layer_scale_init_value": 1e-6,
    "drop_path_rate": 0.0,
}

# Scores and their product with the values are 2 matrix products; their backward pass computes the scores anew: 5.
ATTENTION_BACKWARD = 2.5


class Crops(NamedTuple):
    """Crops of one size in a forward pass."""

    number: int
    side: int  # pixels
    kept: float = 1.0  # share of them that goes through a branch under stochastic depth


class Flop(NamedTuple):
    """Floating-point operations of the forward pass of one crop."""

    embedding: int  # of the first layer, which passes no gradient on
    linear: int  # matrix products and convolutions of the blocks
    attention: int

    @property
    def forward(self) -> int:
        return self.embedding + self.linear + self.attention

    @property
    def blocks(self) -> int:
        return self.linear + self.attention

    def training(self, kept: float) -> float:
        """Forward and backward, where a share `kept` of the crops goes through each branch."""
        return 2 * self.embedding + kept * (3 * self.linear + (1 + ATTENTION_BACKWARD) * self.attention)


class Kept(NamedTuple):
    """Bytes that wait for the backward pass."""

    outside: float  # of the first layer and the final norm
    blocks: float  # of all blocks
    recomputed_block: float  # what the largest block has for a moment, when it is computed anew; else 0


class Backbone(Protocol):
    """What flops and memory of a step ask of a family."""

    @property
    def num_parameters(self) -> int: ...

    @property
    def num_channels(self) -> int: ...

    @property
    def width(self) -> int:
        """Of its tokens."""

    @property
    def block_parameters(self) -> int:
        """Of the largest block."""

    @property
    def matrix_weights(self) -> int:
        """Of all parameters, those of matrix products and convolutions."""

    @property
    def joined_weights(self) -> int:
        """Of these, those that are put together to one matrix at every forward."""

    def patches(self, side: int) -> int: ...

    def tokens(self, side: int) -> int: ...

    def kept_share(self, crops_of_a_group: int) -> float: ...

    def flop(self, side: int) -> Flop: ...

    def kept_bytes(
        self, crops: Sequence[Crops], b: int, recomputation: Recomputation, separate_qkv: bool = False
    ) -> Kept: ...

    def passing_bytes(self, count: int, side: int, b: int) -> float: ...


def backbone_of(family: str, fields: Mapping[str, Any]) -> Backbone:
    """
    Args:
        family: `model_type` of the configuration.
        fields: of the configuration; what is left out has its default.
    """
    return ConvNext(fields) if family.startswith("dinov3_convnext") else ViT(fields)


@dataclass(frozen=True)
class ViT:
    """A vision transformer with these fields of `DINOv3ViTConfig`."""

    fields: Mapping[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.fields[name] if name in self.fields else _VIT_DEFAULTS[name]

    @property
    def width(self) -> int:
        return int(self["hidden_size"])

    @property
    def num_channels(self) -> int:
        return int(self["num_channels"])

    @property
    def num_blocks(self) -> int:
        return int(self["num_hidden_layers"])

    @property
    def _norm(self) -> int:
        return self.width if self["norm_type"] == "rmsnorm" else 2 * self.width

    @property
    def _ffn_matrices(self) -> int:
        return 3 if self["use_gated_mlp"] else 2

    @property
    def _block_weights(self) -> int:
        return self.width * (4 * self.width + self._ffn_matrices * int(self["intermediate_size"]))

    @property
    def _embedding_weights(self) -> int:
        return int(self.num_channels * self["patch_size"] ** 2 * self.width)

    @property
    def block_parameters(self) -> int:
        D, F = self.width, int(self["intermediate_size"])
        biases = D * sum(self[f"{name}_bias"] for name in ("query", "key", "value", "proj"))
        biases += self["mlp_bias"] * ((self._ffn_matrices - 1) * F + D)
        layer_scale = 0 if self["layerscale_value"] is None else 2 * D
        return int(self._block_weights + biases + layer_scale + 2 * self._norm)

    @property
    def num_parameters(self) -> int:
        tokens = (2 + self["num_register_tokens"]) * self.width  # CLS, mask, registers
        final_norms = 1 + self["untie_cls_and_patch_norms"] + self["untie_global_and_local_cls_norm"]
        embedding = self._embedding_weights + self.width
        return int(embedding + tokens + self.num_blocks * self.block_parameters + final_norms * self._norm)

    @property
    def matrix_weights(self) -> int:
        return self._embedding_weights + self.num_blocks * self._block_weights

    @property
    def joined_weights(self) -> int:
        return self.num_blocks * 3 * self.width**2  # queries, keys and values

    def patches(self, side: int) -> int:
        return int((side // self["patch_size"]) ** 2)

    def tokens(self, side: int) -> int:
        return int(1 + self["num_register_tokens"] + self.patches(side))

    def kept_share(self, crops_of_a_group: int) -> float:
        """Share of the crops that an exact subset of each group leaves in."""
        return max(int(crops_of_a_group * (1 - self["drop_path_rate"])), 1) / crops_of_a_group

    def flop(self, side: int) -> Flop:
        N, P = self.tokens(side), self.patches(side)
        return Flop(
            embedding=2 * P * self._embedding_weights,
            linear=self.num_blocks * 2 * N * self._block_weights,
            attention=self.num_blocks * 4 * N * N * self.width,
        )

    def kept_bytes(
        self, crops: Sequence[Crops], b: int, recomputation: Recomputation, separate_qkv: bool = False
    ) -> Kept:
        """
        Args:
            crops: of one forward pass.
            b: bytes of a number in matrix products.
            recomputation: what the backward pass computes anew.
            separate_qkv: whether queries, keys and values are three products, of which each rounds its input.
        """
        D, F, A = self.width, int(self["intermediate_size"]), int(self["num_attention_heads"])
        T = sum(group.number * self.tokens(group.side) for group in crops)
        K = sum(group.number * group.kept * self.tokens(group.side) for group in crops)
        pixels = self.num_channels * sum(group.number * group.side**2 for group in crops)
        drops, scales = self["drop_path_rate"] > 0, self["layerscale_value"] is not None

        norm = 4 * K * D + 8 * K  # its input, mean and deviation
        # What a branch adds: its result for the gradient of LayerScale, and under stochastic depth its rows and
        # factors, and the float32 that is added to the rows.
        added = b * K * D * scales + drops * (4 * K * D + 12 * K)
        rounded_inputs = 3 if separate_qkv and b == 2 else 1
        joined = len(crops) > 1  # the crop groups, after attention
        attention = b * K * D * (rounded_inputs + 3 + 2 + 1 + joined) + 4 * K * A  # input; q, k, v; rotated; result
        inside = 4 if self["use_gated_mlp"] else 2  # before and after the activation; gated, their product too
        # Each matrix that reads the same float32 numbers rounds them for itself.
        ffn = b * K * D * (2 if self["use_gated_mlp"] and b == 2 else 1) + inside * b * K * F
        block = 2 * norm + 2 * added + attention + ffn

        if recomputation == "none":
            blocks, recomputed = self.num_blocks * block, 0.0
        else:
            one = 4 * T * D + drops * 24 * K
            if recomputation == "selective":
                # Results of the matrix products and of attention.
                one += b * K * (6 * D + (self._ffn_matrices - 1) * F) + 4 * K * A
            blocks, recomputed = self.num_blocks * one, block
        return Kept(outside=b * pixels + 4 * T * D + 8 * T, blocks=blocks, recomputed_block=recomputed)

    def passing_bytes(self, count: int, side: int, b: int) -> float:
        """What a forward without gradient has at most: the residual stream, and queries and keys being rotated."""
        return float((4 + b + 3 * b + 24) * count * self.tokens(side) * self.width)


@dataclass(frozen=True)
class ConvNext:
    """A ConvNeXt with these fields of `DINOv3ConvNextConfig`."""

    fields: Mapping[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.fields[name] if name in self.fields else _CONVNEXT_DEFAULTS[name]

    @property
    def width(self) -> int:
        return int(self["hidden_sizes"][-1])

    @property
    def num_channels(self) -> int:
        return int(self["num_channels"])

    @property
    def _stages(self) -> list[tuple[int, int]]:
        """Channels and blocks of each stage."""
        return list(zip(self["hidden_sizes"], self["depths"], strict=True))

    def _block(self, C: int) -> int:
        # Depthwise 7 x 7 with bias, norm, two linear layers of 4 times the width, layer scale.
        layer_scale = 0 if self["layer_scale_init_value"] is None else C
        return 49 * C + C + 2 * C + 8 * C * C + 5 * C + layer_scale

    @property
    def block_parameters(self) -> int:
        return max(self._block(C) for C, _ in self._stages)

    @property
    def num_parameters(self) -> int:
        widths = self["hidden_sizes"]
        stem = 16 * self.num_channels * widths[0] + widths[0] + 2 * widths[0]
        downsampling = sum(2 * C + 4 * C * wider + wider for C, wider in pairwise(widths))
        return int(stem + downsampling + sum(depth * self._block(C) for C, depth in self._stages) + 2 * widths[-1])

    @property
    def matrix_weights(self) -> int:
        widths = self["hidden_sizes"]
        blocks = sum(depth * (49 * C + 8 * C * C) for C, depth in self._stages)
        downsampling = sum(4 * C * wider for C, wider in pairwise(widths))
        return int(16 * self.num_channels * widths[0] + downsampling + blocks)

    @property
    def joined_weights(self) -> int:
        return 0

    def patches(self, side: int) -> int:
        return self._positions(side)[-1]

    def tokens(self, side: int) -> int:
        return 1 + self.patches(side)

    def _positions(self, side: int) -> list[int]:
        """Positions of the feature map of each stage."""
        cells = side // 4
        return [(cells >> stage) ** 2 for stage in range(len(self["depths"]))]

    def kept_share(self, crops_of_a_group: int) -> float:
        """All: every branch is computed, and left out afterwards."""
        return 1.0

    def flop(self, side: int) -> Flop:
        positions, widths = self._positions(side), self["hidden_sizes"]
        linear = sum(
            2 * P * 4 * C * wider for P, (C, wider) in zip(positions[1:], pairwise(widths), strict=True)
        ) + sum(depth * 2 * P * (49 * C + 8 * C * C) for P, (C, depth) in zip(positions, self._stages, strict=True))
        return Flop(embedding=2 * positions[0] * 16 * self.num_channels * widths[0], linear=linear, attention=0)

    def kept_bytes(
        self, crops: Sequence[Crops], b: int, recomputation: Recomputation, separate_qkv: bool = False
    ) -> Kept:
        """As that of a ViT, where `separate_qkv` means nothing."""
        scales = self["layer_scale_init_value"] is not None
        outside, blocks, largest = 0.0, 0.0, 0.0
        for group in crops:
            positions = self._positions(group.side)
            outside += b * group.number * self.num_channels * group.side**2
            outside += group.number * (4 * self.width + 8) * (1 + positions[-1])
            for stage, (P, (C, depth)) in enumerate(zip(positions, self._stages, strict=True)):
                numbers = group.number * P * C
                if stage > 0:  # its norm and the input of its convolution, at the resolution before
                    outside += group.number * positions[stage - 1] * ((4 + b) * self["hidden_sizes"][stage - 1] + 8)
                else:
                    outside += b * numbers + 8 * group.number * P
                # Inputs of the convolution, of the norm and of the two linear layers, before and after the
                # activation, and the result for the gradient of the layer scale.
                block = b * numbers * (1 + 1 + 1 + 4 + 4 + scales) + 8 * group.number * P
                one = block
                if recomputation != "none":
                    one = 4 * numbers
                    largest = max(largest, block)
                if recomputation == "selective":
                    one += b * numbers * (1 + 4 + 1)
                blocks += depth * one
        return Kept(outside=outside, blocks=blocks, recomputed_block=largest)

    def passing_bytes(self, count: int, side: int, b: int) -> float:
        """What a forward without gradient has at most: the residual stream, and the inside of a block."""
        widest = max(P * C for P, C in zip(self._positions(side), self["hidden_sizes"], strict=True))
        return float((4 + b * (1 + 4 + 4)) * count * widest)
