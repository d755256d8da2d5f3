"""The prototype head that DINO and iBOT share: MLP -> L2 normalisation -> bias-free prototypes."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PrototypeHead(nn.Module):
    """
    Scores a feature against learned prototypes (DINO, section 3.1 and appendix C; DINOv2, section 4).

        logits = W z / max(||z||_2, eps),   z = MLP(x)

    There is no weight normalisation on the prototypes `W`, unlike in the first DINO.

    Args:
        in_dim (`int`): Width of the input features D.
        num_prototypes (`int`): Number of prototypes K.
        bottleneck_dim (`int`): Width of `z`.
        hidden_dim (`int`): Width of the hidden layers of the MLP.
        num_layers (`int`): Linear layers of the MLP, with GELU between them; 1 is a single linear layer.
        mlp_bias (`bool`): Whether the linear layers of the MLP have biases.
    """

    def __init__(
        self,
        in_dim: int,
        num_prototypes: int,
        bottleneck_dim: int,
        hidden_dim: int,
        num_layers: int = 3,
        mlp_bias: bool = True,
    ) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"num_layers of a prototype head is {num_layers}; it must be at least 1.")
        widths = [in_dim, *[hidden_dim] * (num_layers - 1), bottleneck_dim]
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise(widths):
            layers += [nn.Linear(width_in, width_out, bias=mlp_bias), nn.GELU()]
        layers.pop()  # no activation after the bottleneck
        self.mlp = layers[0] if num_layers == 1 else nn.Sequential(*layers)
        self.last_layer = nn.Linear(bottleneck_dim, num_prototypes, bias=False)

    def bottleneck(self, features: Tensor) -> Tensor:
        """Features (..., D) -> L2-normalised bottleneck (..., bottleneck_dim)."""
        z = self.mlp(features)  # (..., bottleneck_dim)
        return F.normalize(z, dim=-1, eps=1e-6 if z.dtype == torch.float16 else 1e-12)

    def forward(self, features: Tensor) -> Tensor:
        """Features (..., D) -> logits (..., K)."""
        return self.last_layer(self.bottleneck(features))
