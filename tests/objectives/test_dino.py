import pytest
import torch

from dinov3_hf.objectives.dino import dino_loss

generator = torch.Generator().manual_seed(0)


def student(crops: int = 4) -> torch.Tensor:
    return torch.randn(crops, 3, 10, generator=generator)


def teacher(crops: int = 2) -> torch.Tensor:
    return torch.randn(crops, 3, 10, generator=generator).softmax(-1)


def pairwise(z: torch.Tensor, p: torch.Tensor, temperature: float, ignore_diagonal: bool) -> torch.Tensor:
    """The equation, pair by pair."""
    terms = []
    for s in range(len(z)):
        for t in range(len(p)):
            if not (ignore_diagonal and s == t):
                terms += [-(p[t, b] * (z[s, b] / temperature).log_softmax(-1)).sum() for b in range(z.shape[1])]
    return torch.stack(terms).mean()


@pytest.mark.parametrize("ignore_diagonal", [False, True])
@pytest.mark.parametrize(("num_student", "num_teacher"), [(2, 2), (8, 2), (1, 2), (3, 1)])
def test_equals_the_mean_over_pairs_with_its_gradient(num_student, num_teacher, ignore_diagonal):
    z, p = student(num_student).requires_grad_(), teacher(num_teacher)
    loss = dino_loss(z, p, 0.1, ignore_diagonal)
    expected = pairwise(z, p, 0.1, ignore_diagonal)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, z), torch.autograd.grad(expected, z), rtol=1e-4, atol=1e-6)


@pytest.mark.invariant
def test_order_of_images_and_a_constant_per_row_do_not_matter():
    z, p = student(), teacher()
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(dino_loss(z[:, order], p[:, order]), dino_loss(z, p))
    torch.testing.assert_close(dino_loss(z + torch.randn(4, 3, 1), p), dino_loss(z, p))


def test_is_smallest_at_the_teachers_own_prediction():
    p = teacher(1)
    agreed = dino_loss(0.1 * p.log(), p)
    entropy = torch.special.entr(p).sum(-1).mean()
    torch.testing.assert_close(agreed, entropy)
    assert dino_loss(student(1), p) > agreed


@pytest.mark.parametrize(
    ("z", "p", "message"),
    [
        (torch.zeros(2, 3, 5), torch.zeros(2, 4, 5), "same images and prototypes"),
        (torch.zeros(3, 5), torch.zeros(3, 5), "crops, images, prototypes"),
        (torch.zeros(0, 3, 5), torch.zeros(2, 3, 5), "no pair"),
    ],
)
def test_refuses(z, p, message):
    with pytest.raises(ValueError, match=message):
        dino_loss(z, p)


def test_refuses_when_only_the_diagonal_is_there():
    with pytest.raises(ValueError, match="ignore_diagonal to False"):
        dino_loss(student(1), teacher(1), ignore_diagonal=True)
