"""A dino.txt of a few thousand weights."""

import torch
from torch import Tensor

from dinov3_hf.models.dinotxt.configuration_dinotxt import DinoTxtConfig
from dinov3_hf.models.dinotxt.modeling_dinotxt import DinoTxtModel
from tests.models.dinov3_vit.tiny import TINY, randomize

WIDTH = TINY["hidden_size"]
VOCAB_SIZE, CONTEXT = 60, 12
TEXT = {
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": CONTEXT,
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "projection_dim": 2 * WIDTH,
    "bos_token_id": VOCAB_SIZE - 2,
    "eos_token_id": VOCAB_SIZE - 1,
}
CONVNEXT = {"model_type": "dinov3_convnext", "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 2, 1], "image_size": 64}
# Options that the released model does not have.
VARIANT_TEXT = {"num_head_layers": 1, "pooling": "last", "layerscale_value": 0.1, "projection_dim": 20}
VARIANT_VISION = {"num_head_layers": 1, "projection_dim": 10}


def tiny_config(text: dict | None = None, vision: dict | None = None) -> DinoTxtConfig:
    """With fields that shall differ."""
    return DinoTxtConfig(
        text_config={**TEXT, **(text or {})}, vision_config={"backbone_config": TINY, **(vision or {})}
    )


def tiny_model(text: dict | None = None, vision: dict | None = None) -> DinoTxtModel:
    """In eval mode, with weights that leave no part without effect."""
    torch.manual_seed(0)
    return randomize(DinoTxtModel(tiny_config(text, vision))).eval()


def texts(count: int = 4, length: int = CONTEXT) -> Tensor:
    """Start, pieces, end, and zeros: (count, length)."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, VOCAB_SIZE - 2, (count, length), generator=generator)
    for row, end in enumerate(torch.linspace(2, length - 1, count).long().tolist()):
        ids[row, end], ids[row, end + 1 :] = VOCAB_SIZE - 1, 0
    ids[:, 0] = VOCAB_SIZE - 2
    return ids
