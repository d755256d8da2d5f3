import pytest
import torch
import torch.nn.functional as F

from dinov3_hf.objectives.gram import gram_loss


def patches(seed: int, width: int = 6) -> torch.Tensor:
    return torch.randn(3, 5, width, generator=torch.Generator().manual_seed(seed))


def plain_gram(student, teacher, normalize, per_image, negatives):
    """The equation, entry by entry."""
    if normalize:
        student, teacher = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
    terms = []
    groups = zip(student, teacher, strict=True) if per_image else [(student.flatten(0, 1), teacher.flatten(0, 1))]
    for s, t in groups:
        for i in range(len(s)):
            for j in range(len(s)):
                s_ij, t_ij = s[i] @ s[j], t[i] @ t[j]
                t_ij = t_ij if negatives == "keep" else t_ij.clamp(min=0)
                s_ij = s_ij.clamp(min=0) if negatives == "remove" else s_ij
                terms.append((s_ij - t_ij) ** 2)
    return torch.stack(terms).mean()


@pytest.mark.parametrize("negatives", ["keep", "remove", "remove_teacher"])
@pytest.mark.parametrize("per_image", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
def test_equals_the_equation_with_its_gradient(normalize, per_image, negatives):
    student, teacher = patches(0).requires_grad_(), patches(1)
    loss = gram_loss(student, teacher, normalize, per_image, negatives)
    expected = plain_gram(student, teacher, normalize, per_image, negatives)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(loss, student), torch.autograd.grad(expected, student), rtol=1e-4, atol=1e-6
    )


def test_widths_may_differ():
    assert gram_loss(patches(0, width=6), patches(1, width=9)).isfinite()


@pytest.mark.invariant
def test_only_similarities_count():
    student, teacher = patches(0), patches(1)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(2))).Q
    torch.testing.assert_close(gram_loss(student @ rotation, teacher), gram_loss(student, teacher))
    torch.testing.assert_close(gram_loss(2 * student, teacher), gram_loss(student, teacher))
    assert gram_loss(student @ rotation, student) < 1e-12


@pytest.mark.parametrize(
    ("student", "teacher", "options", "message"),
    [
        (torch.zeros(3, 5, 6), torch.zeros(3, 4, 6), {}, "resize the teacher's patch grid"),
        (torch.zeros(5, 6), torch.zeros(5, 6), {}, "images, patches, features"),
        (torch.zeros(3, 5, 6), torch.zeros(3, 5, 6), {"negatives": "clamp"}, "'clamp' is unknown"),
    ],
)
def test_refuses(student, teacher, options, message):
    with pytest.raises(ValueError, match=message):
        gram_loss(student, teacher, **options)
