import torch

from dinov3_hf.distributed.reductions import (
    all_reduce_max,
    all_reduce_sum,
    gather_rows,
    rank,
    rows_of_each_process,
    world_size,
)
from tests.reference.processes import run_in_processes


def test_identity_in_one_process():
    x = torch.randn(3, 2)
    assert (world_size(), rank()) == (1, 0)
    assert all_reduce_sum(x) is x
    assert all_reduce_max(x) is x
    assert gather_rows(x) is x
    assert [part is x for part in rows_of_each_process(x)] == [True]


def reductions_of_two() -> dict[str, torch.Tensor]:
    mine = torch.tensor([[1.0, 2.0], [3.0, 4.0]]) * (1 if rank() == 0 else -1)
    kept = mine.clone()
    rows = mine.T.requires_grad_()  # not contiguous
    weights = torch.arange(8.0).reshape(4, 2) + 10 * rank()
    (gather_rows(rows) * weights).sum().backward()
    return {
        "world": torch.tensor([world_size(), rank()]),
        "sum": all_reduce_sum(mine + rank()),
        "max": all_reduce_max(mine),
        "gathered": gather_rows(rows).detach(),
        "one_by_one": torch.cat(list(rows_of_each_process(mine.T))),
        "grad": rows.grad,
        "unchanged": torch.equal(mine, kept) * torch.ones(()),
    }


def test_two_processes():
    first, second = run_in_processes(reductions_of_two, 2)
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert first["world"].tolist() == [2, 0] and second["world"].tolist() == [2, 1]
    weights = 2 * torch.arange(8.0).reshape(4, 2) + 10  # of both ranks' losses
    for index, result in enumerate((first, second)):
        assert torch.equal(result["sum"], torch.ones(2, 2))
        assert torch.equal(result["max"], x)
        assert torch.equal(result["gathered"], torch.cat([x.T, -x.T]))
        assert torch.equal(result["one_by_one"], result["gathered"])
        assert torch.equal(result["grad"], weights[2 * index : 2 * index + 2])
        assert result["unchanged"]
