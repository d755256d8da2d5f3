import pytest
import torch
import torch.nn.functional as F

from dinov3_hf.objectives.koleo import koleo_loss


def features(rows: int = 8, width: int = 6) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(0))


def plain_koleo(x: torch.Tensor, topk: int = 1) -> torch.Tensor:
    """The equation, row by row."""
    x = F.normalize(x, dim=-1, eps=1e-8)
    terms = []
    for i in range(len(x)):
        others = [j for j in range(len(x)) if j != i]
        others.sort(key=lambda j: float(x[i].detach() @ x[j].detach()), reverse=True)
        terms += [-((x[i] - x[j] + 1e-8).norm() + 1e-8).log() for j in others[:topk]]
    return torch.stack(terms).mean()


@pytest.mark.parametrize("topk", [1, 2, 7])
def test_equals_the_equation_with_its_gradient(topk):
    x = features().requires_grad_()
    loss, expected = koleo_loss(x, topk=topk), plain_koleo(x, topk)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, x), torch.autograd.grad(expected, x))


@pytest.mark.parametrize("group_size", [2, 4])
def test_groups_are_contiguous_and_apart(group_size):
    x = features()
    expected = torch.stack([koleo_loss(group) for group in x.split(group_size)]).mean()
    torch.testing.assert_close(koleo_loss(x, group_size=group_size), expected)


def test_a_group_of_all_rows_is_no_group():
    x = features()
    assert torch.equal(koleo_loss(x, group_size=8), koleo_loss(x))


@pytest.mark.invariant
def test_lengths_rotations_and_order_do_not_matter():
    x = features()
    expected = koleo_loss(x)
    lengths = torch.linspace(0.1, 10, 8)[:, None]
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1))).Q
    torch.testing.assert_close(koleo_loss(x * lengths), expected)
    torch.testing.assert_close(koleo_loss(x @ rotation), expected)
    torch.testing.assert_close(koleo_loss(x.flip(0)), expected)


def test_equal_rows_stay_finite():
    x = torch.ones(4, 6, requires_grad=True)
    loss = koleo_loss(x)
    loss.backward()
    assert loss.isfinite() and x.grad.isfinite().all()


def test_spreading_out_lowers_the_loss():
    x = features().requires_grad_()
    before = koleo_loss(x)
    (gradient,) = torch.autograd.grad(before, x)
    assert koleo_loss(x - 0.01 * gradient) < before


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (8, {"group_size": 3}, "does not divide the global batch of 8"),
        (8, {"group_size": 0}, "does not divide"),
        (1, {}, r"below the rows of a group \(1\)"),
        (8, {"group_size": 2, "topk": 2}, "topk 2"),
        (8, {"topk": 0}, "at least 1"),
    ],
)
def test_refuses(rows, options, message):
    with pytest.raises(ValueError, match=message):
        koleo_loss(features(rows), **options)
