"""Health of dense features: what wears away first in a long training, seen without labels.

DINOv3 (arXiv 2508.10104, section 4.1) finds that image-level accuracy keeps rising in long runs of large models while
patch features decay: the cosine between CLS and patch tokens grows, and the similarity map of a patch, which lights up
its object at first, loses its place.

Letters: N images, P patches of an image, D features.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize

from dinov3_hf.evals.features import Features


def dense_health(features: Features, device: str | torch.device = "cpu") -> dict[str, float]:
    """Both measurements of this page: `{"patch_cls_cosine": 0.21, "patch_similarity_entropy": 0.63}`."""
    return {**patch_cls_cosine(features), **patch_similarity_entropy(features, device=device)}


def patch_cls_cosine(features: Features) -> dict[str, float]:
    r"""Cosine between the CLS token and the patch tokens of the same image, mean over patches, then over images.

    $$ \frac{1}{N P} \sum_{n=1}^{N} \sum_{i=1}^{P} \cos(c_n, x_{ni}) $$

    The measure of section 4.1 of DINOv3. There is no healthy value for all models: look at its course. A steady rise
    late in a run means that patches give up what is theirs for what CLS says already; at 1 they are copies of it.

    Args:
        features: of N images, with patches.

    Returns:
        `{"patch_cls_cosine": 0.21}`, in [-1, 1].

    Raises:
        ValueError: the features have no patches.
    """
    patches = _patches(features)
    cls = normalize(features.cls, dim=-1)  # (N, D)
    cosines = [normalize(x, dim=-1) @ c for x, c in zip(patches, cls, strict=True)]  # N of (P,)
    return {"patch_cls_cosine": float(torch.stack(cosines).mean())}


def patch_similarity_entropy(
    features: Features, temperature: float = 0.07, device: str | torch.device = "cpu"
) -> dict[str, float]:
    r"""How far the similarity map of a patch spreads over its image, mean over patches, then over images.

    $$ p_{ij} = \operatorname{softmax}_j \big( \cos(x_i, x_j) / \tau \big), \qquad
       H = - \frac{1}{P \log P} \sum_{i=1}^{P} \sum_{j=1}^{P} p_{ij} \log p_{ij} $$

    over all patches j of the image, i itself included; $P^H$ is about the number of patches that one is similar to.
    At 1 all patches are alike and a map shows nothing; near 0 no patch resembles any other, as in noise. Useful
    features lie between, since a patch resembles the rest of its object and not the background. Again it is the course
    that tells: a late rise together with `patch_cls_cosine` means that maps spread over the whole image. The number
    is ours; section 4.1 of DINOv3 shows the maps themselves.

    Args:
        features: of N images, with patches.
        temperature: $\tau$; 0.07 as in the vote of kNN. At 1 the softmax of cosines would always be nearly even.
        device: where similarities are computed, P x P at a time.

    Returns:
        `{"patch_similarity_entropy": 0.63}`, in [0, 1]; 1 for images of a single patch, of which nothing can be said.

    Raises:
        ValueError: the features have no patches, or the temperature is not positive.
    """
    if temperature <= 0:
        raise ValueError(f"temperature {temperature} is not positive; 0.07 is usual.")
    patches = _patches(features)
    num_patches = patches.shape[1]
    if num_patches == 1:
        return {"patch_similarity_entropy": 1.0}
    entropies = []
    for image in patches:
        x = normalize(image.to(device), dim=-1)  # (P, D)
        log_p = (x @ x.T / temperature).log_softmax(dim=-1)  # (P, P)
        entropies.append(-(log_p.exp() * log_p).sum(dim=-1).mean())
    mean = float(torch.stack(entropies).mean()) / math.log(num_patches)
    return {"patch_similarity_entropy": min(mean, 1.0)}  # rounding


def _patches(features: Features) -> Tensor:
    return features.patch_maps().flatten(1, 2)  # (N, P, D); raises without patches
