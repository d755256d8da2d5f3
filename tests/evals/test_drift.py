"""How far features have moved."""

import math

import pytest
import torch

from dinov3_hf.evals.drift import drift
from dinov3_hf.evals.features import Features


def features(cls: torch.Tensor, patches: torch.Tensor) -> Features:
    return Features(cls, patches=patches, grid=(1, patches.shape[1]))


def test_nothing_has_moved():
    start = features(torch.randn(3, 8), torch.randn(3, 4, 8))
    assert drift(start, start) == pytest.approx({"cls_drift": 0, "patch_drift": 0}, abs=1e-12)
    longer = features(2 * start.cls, 0.5 * start.patches)  # length is not looked at
    assert drift(start, longer) == pytest.approx({"cls_drift": 0, "patch_drift": 0}, abs=1e-7)


def test_drift_is_one_minus_the_mean_cosine():
    def turned(*angles: float) -> torch.Tensor:
        return torch.tensor([[math.cos(angle), math.sin(angle)] for angle in angles])

    start = features(turned(0, 0), turned(0, 0, 0, 0).view(2, 2, 2))
    now = features(turned(0, math.pi / 2), turned(0, 0, math.pi / 3, math.pi).view(2, 2, 2))
    assert drift(start, now) == pytest.approx({"cls_drift": 0.5, "patch_drift": 1 - (1 + 1 + 0.5 - 1) / 4}, abs=1e-6)


@pytest.mark.parametrize(
    ("now", "says"),
    [
        (Features(torch.ones(3, 8)), "with_patches=True"),
        (features(torch.ones(2, 8), torch.ones(2, 4, 8)), "the same images"),
        (features(torch.ones(3, 8), torch.ones(3, 9, 8)), "at the same size"),
    ],
)
def test_features_that_cannot_be_compared(now, says):
    with pytest.raises(ValueError, match=says):
        drift(features(torch.ones(3, 8), torch.ones(3, 4, 8)), now)
