"""The health of dense features, on features made for the purpose."""

import math

import pytest
import torch

from dinov3_hf.evals.dense_health import dense_health, patch_cls_cosine, patch_similarity_entropy
from dinov3_hf.evals.features import Features

N, P, D = 3, 6, 16


def features(cls: torch.Tensor, patches: torch.Tensor) -> Features:
    return Features(cls, patches=patches, grid=(2, 3))


def orthogonal(num_vectors: int) -> torch.Tensor:
    return 5 * torch.eye(D)[:num_vectors].expand(N, -1, -1)  # (N, num_vectors, D)


def test_patches_that_copy_cls():
    cls = torch.randn(N, D)
    lengths = torch.rand(N, P, 1) + 0.1  # only directions count
    found = dense_health(features(cls, cls[:, None] * lengths))
    assert found == pytest.approx({"patch_cls_cosine": 1.0, "patch_similarity_entropy": 1.0}, abs=1e-6)


def test_patches_that_have_nothing_in_common():
    vectors = orthogonal(P + 1)
    found = dense_health(features(vectors[:, 0], vectors[:, 1:]))
    assert found == pytest.approx({"patch_cls_cosine": 0.0, "patch_similarity_entropy": 0.0}, abs=1e-4)


def test_two_objects_are_a_middle():
    first, second, cls = orthogonal(3).unbind(1)
    patches = torch.stack([first] * 3 + [second] * 3, dim=1)  # (N, P, D): each patch resembles three
    found = patch_similarity_entropy(features(cls, patches))["patch_similarity_entropy"]
    assert found == pytest.approx(math.log(3) / math.log(6), abs=1e-4)
    assert patch_cls_cosine(features(first + second, patches))["patch_cls_cosine"] == pytest.approx(math.sqrt(0.5))


def test_formulas_in_float64():
    cls, patches = torch.randn(N, D), torch.randn(N, P, D)
    cosine = torch.nn.functional.cosine_similarity(cls.double()[:, None], patches.double(), dim=-1).mean()
    pairs = torch.nn.functional.cosine_similarity(patches.double()[:, :, None], patches.double()[:, None], dim=-1)
    entropy = torch.distributions.Categorical(logits=pairs / 0.2).entropy().mean() / math.log(P)
    given = features(cls, patches)
    assert patch_cls_cosine(given)["patch_cls_cosine"] == pytest.approx(float(cosine), abs=1e-6)
    found = patch_similarity_entropy(given, temperature=0.2)["patch_similarity_entropy"]
    assert found == pytest.approx(float(entropy), abs=1e-6)


def test_one_patch():
    single = Features(torch.randn(N, D), patches=torch.randn(N, 1, D), grid=(1, 1))
    assert patch_similarity_entropy(single) == {"patch_similarity_entropy": 1.0}


def test_refuses():
    with pytest.raises(ValueError, match="with_patches=True"):
        dense_health(Features(torch.randn(N, D)))
    with pytest.raises(ValueError, match="temperature 0 is not positive"):
        patch_similarity_entropy(features(torch.randn(N, D), torch.randn(N, P, D)), temperature=0)
