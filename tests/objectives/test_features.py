"""`feature_loss` against its formula, and what it does not depend on."""

import math

import pytest
import torch
from torch import Tensor

from dinov3_hf.objectives.features import feature_loss


@pytest.fixture
def tokens() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 4, 8, generator=generator), torch.randn(3, 4, 8, generator=generator)


def test_values_by_hand():
    predictions = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    targets = torch.tensor([[3.0, 3.0], [0.0, 1.0]])
    assert feature_loss(predictions, targets).item() == pytest.approx((1 - math.sqrt(0.5)) / 2)
    # LN of (1, -1) is itself but for its epsilon: errors 0 and 3, of which smooth L1 makes 0 and 2.5
    loss = feature_loss(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, -1.0]]), "smooth_l1")
    assert loss.item() == pytest.approx(1.25, abs=1e-4)


@pytest.mark.parametrize("distance", ["cosine", "smooth_l1"])
def test_formula_in_float64(tokens, distance):
    x, y = (t.double().flatten(0, 1) for t in tokens)
    if distance == "cosine":
        expected = (1 - (x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1))).mean()
    else:
        normalised = (y - y.mean(1, keepdim=True)) / (y.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        error = (x - normalised).abs()
        expected = torch.where(error < 1, error**2 / 2, error - 0.5).mean()
    torch.testing.assert_close(feature_loss(*tokens, distance), expected.float())


@pytest.mark.invariant
@pytest.mark.parametrize("distance", ["cosine", "smooth_l1"])
def test_the_scale_of_the_teacher_does_not_matter(tokens, distance):
    predictions, targets = tokens
    torch.testing.assert_close(
        feature_loss(predictions, 100 * targets, distance),
        feature_loss(predictions, targets, distance),
        rtol=1e-4,
        atol=0,
    )


@pytest.mark.parametrize("distance", ["cosine", "smooth_l1"])
def test_no_gradient_passes_to_the_teacher(tokens, distance):
    predictions, targets = (t.requires_grad_() for t in tokens)
    feature_loss(predictions, targets, distance).backward()
    assert predictions.grad.abs().sum() > 0 and targets.grad is None


@pytest.mark.parametrize("distance", ["cosine", "smooth_l1"])
def test_float32_whatever_comes_in(tokens, distance):
    halves = [t.bfloat16() for t in tokens]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = feature_loss(*halves, distance)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, feature_loss(*(t.float() for t in halves), distance))


def test_errors_are_one_line():
    with pytest.raises(ValueError, match=r"predictions \(2, 8\) and targets \(2, 9\) must have the same shape"):
        feature_loss(torch.zeros(2, 8), torch.zeros(2, 9))
    with pytest.raises(ValueError, match="distance 'l2' is unknown; choose 'cosine' or 'smooth_l1'"):
        feature_loss(torch.zeros(2, 8), torch.zeros(2, 8), "l2")
