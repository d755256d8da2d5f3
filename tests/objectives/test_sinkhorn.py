import pytest
import torch

from dinov3_hf.objectives.sinkhorn import sinkhorn_knopp


def logits(rows: int = 12, prototypes: int = 20, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(rows, prototypes, generator=torch.Generator().manual_seed(0))


def plain_sinkhorn(z: torch.Tensor, temperature: float, num_iterations: int) -> torch.Tensor:
    """The published algorithm with its normalisers, in float64."""
    q = (z.double() / temperature).exp()
    num_rows, num_prototypes = q.shape
    q = q / q.sum()
    for _ in range(num_iterations):
        q = q / q.sum(dim=0, keepdim=True) / num_prototypes
        q = q / q.sum(dim=1, keepdim=True) / num_rows
    return (q * num_rows).float()


@pytest.mark.parametrize("num_iterations", [1, 3, 10])
@pytest.mark.parametrize("temperature", [0.04, 0.07, 1.0])
def test_equals_the_published_algorithm(temperature, num_iterations):
    z = logits()
    expected = plain_sinkhorn(z, temperature, num_iterations)
    torch.testing.assert_close(sinkhorn_knopp(z, temperature, num_iterations), expected, rtol=1e-5, atol=1e-7)


def test_without_iterations_it_is_the_softmax_of_each_row():
    z = logits()
    assert torch.equal(sinkhorn_knopp(z, 0.07, 0), (z / 0.07).softmax(dim=1))


def test_rows_sum_to_one_and_prototypes_are_used_evenly():
    q = sinkhorn_knopp(logits(rows=40, prototypes=8), 0.5, num_iterations=50)
    torch.testing.assert_close(q.sum(dim=1), torch.ones(40))
    torch.testing.assert_close(q.sum(dim=0), torch.full((8,), 40 / 8), rtol=1e-4, atol=0)


@pytest.mark.invariant
def test_a_constant_added_to_all_logits_or_to_a_prototype_changes_nothing():
    z = logits()
    expected = sinkhorn_knopp(z, 0.07)
    torch.testing.assert_close(sinkhorn_knopp(z + 3.5, 0.07), expected, rtol=1e-4, atol=1e-6)
    shift = torch.linspace(-2, 2, z.shape[1])
    torch.testing.assert_close(sinkhorn_knopp(z + shift, 0.07), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scale", [1e2, 1e4, 1e6])
def test_large_logits_stay_finite(scale):
    q = sinkhorn_knopp(logits(scale=scale), 0.04)
    assert q.isfinite().all()
    torch.testing.assert_close(q.sum(dim=1), torch.ones(len(q)))


def test_temperature_may_be_a_tensor():
    z = logits()
    assert torch.equal(sinkhorn_knopp(z, torch.tensor(0.07)), sinkhorn_knopp(z, 0.07))


def test_no_rows():
    assert sinkhorn_knopp(torch.empty(0, 5), 0.07).shape == (0, 5)


def test_input_is_left_alone_and_the_result_has_no_gradient():
    z = logits().requires_grad_()
    before = z.detach().clone()
    assert not sinkhorn_knopp(z, 1.0).requires_grad
    assert torch.equal(z, before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((torch.zeros(2, 3, 4), 0.1), r"\(2, 3, 4\)"), ((torch.zeros(2, 3), 0.1, -1), "num_iterations is -1")],
)
def test_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        sinkhorn_knopp(*arguments)
