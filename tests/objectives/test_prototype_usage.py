import math

import pytest
import torch

from dinov3_hf.objectives.prototype_usage import prototype_entropy


def won_by(prototypes: list[int], num_prototypes: int) -> torch.Tensor:
    """Logits whose largest entry in row i is `prototypes[i]`."""
    return torch.nn.functional.one_hot(torch.tensor(prototypes), num_prototypes).float()


@pytest.mark.parametrize(
    ("prototypes", "num_prototypes", "expected"),
    [
        ([0, 1, 2, 3], 4, 1.0),
        ([0, 1, 2, 3], 100, 1.0),  # as evenly as four rows can
        ([7, 7, 7, 7], 100, 0.0),
        ([0, 0, 0, 1], 4, (0.75 * math.log(4 / 3) + 0.25 * math.log(4)) / math.log(4)),
        ([0, 0, 1, 1], 2, 1.0),
        ([3], 5, 1.0),  # one row says nothing
    ],
)
def test_entropy_of_the_winners(prototypes, num_prototypes, expected):
    entropy = prototype_entropy(won_by(prototypes, num_prototypes))
    assert entropy.dtype == torch.float32 and entropy.shape == ()
    assert entropy.item() == pytest.approx(expected, abs=1e-6)


def test_no_rows():
    assert prototype_entropy(torch.empty(0, 5)).item() == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves(dtype):
    z = won_by([0, 0, 0, 1], 4)
    assert torch.equal(prototype_entropy(z.to(dtype)), prototype_entropy(z))
