"""Every term in float32 whatever comes in and whatever autocast does, and with the gradient that its values have."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dinov3_hf.objectives.dino import dino_loss
from dinov3_hf.objectives.gram import gram_loss
from dinov3_hf.objectives.ibot import ibot_loss
from dinov3_hf.objectives.koleo import koleo_loss
from dinov3_hf.objectives.sinkhorn import sinkhorn_knopp


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


# Name -> the term as a function of the student's side, and an input for it.
TERMS: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    "dino": (lambda z: dino_loss(z, draw(2, 3, 10).softmax(-1)), draw(4, 3, 10)),
    "ibot": (lambda z: ibot_loss(z, draw(6, 10).softmax(-1), torch.full((6,), 0.5), 4), draw(6, 10)),
    "koleo": (koleo_loss, draw(8, 6)),
    "gram": (lambda x: gram_loss(x, draw(3, 5, 7)), draw(3, 5, 6)),
}
HALVES = [torch.float16, torch.bfloat16]


def value_and_gradient(term: Callable[[Tensor], Tensor], x: Tensor, autocast: bool = False) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        value = term(x)
    return value.detach(), torch.autograd.grad(value, x)[0]


@pytest.mark.invariant
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", TERMS)
def test_halves_are_widened_first(name, dtype, autocast):
    term, x = TERMS[name]
    x = x.to(dtype)
    value, gradient = value_and_gradient(term, x, autocast)
    expected_value, expected_gradient = value_and_gradient(term, x.float())
    assert value.dtype == torch.float32
    assert torch.equal(value, expected_value)
    assert torch.equal(gradient, expected_gradient.to(dtype))


@pytest.mark.invariant
@pytest.mark.parametrize("dtype", HALVES)
def test_targets_of_halves(dtype):
    z = draw(12, 20).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        targets = sinkhorn_knopp(z, 0.05)
    assert targets.dtype == torch.float32
    assert torch.equal(targets, sinkhorn_knopp(z.float(), 0.05))


@pytest.mark.parametrize("name", TERMS)
def test_gradient_is_the_slope(name):
    term, x = TERMS[name]
    _, gradient = value_and_gradient(term, x)
    step = 1e-2 * gradient / gradient.norm()
    slope = (term(x + step) - term(x - step)) / 2e-2
    torch.testing.assert_close(slope, gradient.norm(), rtol=5e-3, atol=0)


@pytest.mark.parametrize("dtype", HALVES)
def test_the_largest_halves_do_not_overflow(dtype):
    z = torch.finfo(torch.float16).max * draw(12, 20).sign().to(dtype)
    targets = sinkhorn_knopp(z, 0.04)
    assert targets.isfinite().all()
    for term in (lambda z: dino_loss(z[None], targets[None]), lambda z: ibot_loss(z, targets, torch.ones(12), 1)):
        value, gradient = value_and_gradient(term, z)
        assert value.isfinite() and gradient.isfinite().all()
    for term in (koleo_loss, lambda x: gram_loss(x[None], z[None].flip(1))):
        value, gradient = value_and_gradient(term, z)
        assert value.isfinite() and gradient.isfinite().all()
