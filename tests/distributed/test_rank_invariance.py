"""Statistics over ranks: two processes compute what one process computes on the whole batch."""

import pytest
import torch

from dinov3_hf.distributed.reductions import rank
from dinov3_hf.objectives.koleo import koleo_loss
from dinov3_hf.objectives.prototype_usage import prototype_entropy
from dinov3_hf.objectives.sinkhorn import sinkhorn_knopp
from tests.reference.processes import run_in_processes

ROWS = 12
SPLITS = {"even": 6, "uneven": 5, "all_on_the_second": 0}
KOLEO = [(None, 1), (None, 3), (2, 1), (3, 2), (6, 1), (4, 1), (12, 2)]  # 4 straddles the ranks' border


def batch() -> torch.Tensor:
    return torch.randn(ROWS, 9, generator=torch.Generator().manual_seed(0))


def half_of_the_batch() -> dict[str, torch.Tensor]:
    results = {}
    for name, split in SPLITS.items():
        rows = batch()[:split] if rank() == 0 else batch()[split:]
        results[f"sinkhorn/{name}"] = sinkhorn_knopp(rows, 0.2)
        results[f"entropy/{name}"] = prototype_entropy(rows)
    for group_size, topk in KOLEO:
        rows = batch().chunk(2)[rank()].clone().requires_grad_()
        loss = koleo_loss(rows, group_size, topk)
        loss.backward()
        results[f"koleo/{group_size}/{topk}/loss"] = loss.detach()
        results[f"koleo/{group_size}/{topk}/grad"] = rows.grad
    try:
        koleo_loss(batch().chunk(2)[rank()], group_size=5)
    except ValueError as error:
        assert "does not divide the global batch of 12" in str(error)
        results["refused"] = torch.ones(())
    return results


@pytest.fixture(scope="module")
def halves() -> list[dict[str, torch.Tensor]]:
    return run_in_processes(half_of_the_batch, 2)


@pytest.mark.invariant
@pytest.mark.parametrize("split", SPLITS)
def test_sinkhorn(halves, split):
    both = torch.cat([half[f"sinkhorn/{split}"] for half in halves])
    torch.testing.assert_close(both, sinkhorn_knopp(batch(), 0.2))


@pytest.mark.invariant
@pytest.mark.parametrize("split", SPLITS)
def test_prototype_entropy(halves, split):
    for half in halves:
        torch.testing.assert_close(half[f"entropy/{split}"], prototype_entropy(batch()))


@pytest.mark.invariant
@pytest.mark.parametrize(("group_size", "topk"), KOLEO)
def test_koleo_mean_over_ranks_and_averaged_gradient(halves, group_size, topk):
    x = batch().requires_grad_()
    loss = koleo_loss(x, group_size, topk)
    loss.backward()
    key = f"koleo/{group_size}/{topk}"
    torch.testing.assert_close(torch.stack([half[f"{key}/loss"] for half in halves]).mean(), loss.detach())
    # Data parallel training averages the gradients of the ranks; gather_rows sums them.
    torch.testing.assert_close(torch.cat([half[f"{key}/grad"] for half in halves]) / 2, x.grad)


def test_sizes_that_do_not_divide_are_refused_on_every_rank(halves):
    assert all("refused" in half for half in halves)
