import pytest
import torch

from dinov3_hf.objectives.ibot import ibot_loss

generator = torch.Generator().manual_seed(0)


def masked_patches() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits and targets at the masked patches of four crops, one of them without a mask."""
    mask = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 1, 1], [0, 1, 0]], dtype=torch.bool)
    num_masked = int(mask.sum())
    z = torch.randn(num_masked, 7, generator=generator)
    p = torch.randn(num_masked, 7, generator=generator).softmax(-1)
    weight = (1 / mask.sum(-1).clamp(min=1))[:, None].expand_as(mask)[mask]
    return z, p, weight, mask


def test_equals_the_mean_over_crops_of_means_over_patches():
    z, p, weight, mask = masked_patches()
    cross_entropy = torch.zeros(mask.shape)
    cross_entropy[mask] = -(p * (z / 0.1).log_softmax(-1)).sum(-1)
    per_crop = cross_entropy.sum(dim=-1) / mask.sum(dim=-1).clamp(min=1)
    torch.testing.assert_close(ibot_loss(z, p, weight, len(mask)), per_crop.mean())


def test_gradient():
    z, p, weight, mask = masked_patches()
    z.requires_grad_()
    (gradient,) = torch.autograd.grad(ibot_loss(z, p, weight, len(mask)), z)
    expected = weight[:, None] * ((z / 0.1).softmax(-1) - p) / 0.1 / len(mask)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_crops_without_a_mask_count():
    z, p, weight, _ = masked_patches()
    torch.testing.assert_close(ibot_loss(z, p, weight, 8), ibot_loss(z, p, weight, 4) / 2)


def test_no_masked_patch_gives_a_zero_with_a_graph():
    z = torch.zeros(0, 7, requires_grad=True)
    loss = ibot_loss(z, torch.zeros(0, 7), torch.zeros(0), 4)
    assert loss.item() == 0
    loss.backward()
    assert z.grad is not None and z.grad.shape == (0, 7)


@pytest.mark.parametrize(
    ("z", "p", "weight", "num_images", "message"),
    [
        (torch.zeros(3, 5), torch.zeros(2, 5), torch.zeros(3), 2, "masked patches, prototypes"),
        (torch.zeros(3, 5), torch.zeros(3, 5), torch.zeros(2), 2, "mask_weight"),
        (torch.zeros(3, 5), torch.zeros(3, 5), torch.zeros(3), 0, "num_images is 0"),
    ],
)
def test_refuses(z, p, weight, num_images, message):
    with pytest.raises(ValueError, match=message):
        ibot_loss(z, p, weight, num_images)
