"""Within a group of processes, everything is as if there were no others."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import AdamW

from dinov3_hf.distributed.engine import Engine
from dinov3_hf.distributed.fsdp2 import FSDP2Engine
from dinov3_hf.distributed.pieces import StateReader, on_host, state_file, write_pieces
from dinov3_hf.distributed.reductions import (
    all_reduce_max,
    all_reduce_sum,
    gather_lists,
    gather_rows,
    process_group,
    rank,
    world_size,
)
from dinov3_hf.objectives.koleo import koleo_loss
from dinov3_hf.objectives.sinkhorn import sinkhorn_knopp
from tests.reference.processes import run_in_processes

GROUPS = [[0], [2, 1], [3, 4]]  # torch puts the ranks of a group in order


def my_group() -> tuple[int, dist.ProcessGroup]:
    """Its number; every process makes every group."""
    made = [dist.new_group(ranks) for ranks in GROUPS]
    (mine,) = (number for number, ranks in enumerate(GROUPS) if dist.get_rank() in ranks)
    return mine, made[mine]


def refusal_of_strangers() -> str:
    stranger = dist.new_group([1])
    if dist.get_rank() == 1:
        return ""
    try:
        with process_group(stranger):
            return "entered"
    except ValueError as error:
        return str(error)


def results_of_groups() -> dict[str, Tensor]:
    number, group = my_group()
    everywhere = torch.tensor([rank(), world_size()])
    with process_group(group):
        rows = (torch.arange(2.0)[:, None] + 10 * rank() + 100 * number).requires_grad_()  # (2, 1)
        gathered = gather_rows(rows)
        weight = torch.arange(1.0, 1 + len(gathered))[:, None] * (1 + rank())
        results = {
            "inside": torch.tensor([number, rank(), world_size()]),
            "sum": all_reduce_sum(rows),
            "max": all_reduce_max(rows),
            "gathered": gathered.detach(),
            "lists": torch.tensor(gather_lists([number, rank()])),
        }
        with process_group(None):
            results["all"] = all_reduce_sum(torch.ones(()))
    (gathered * weight).sum().backward()  # outside of the group
    refused = refusal_of_strangers()
    assert "is not in the process group" in refused or rank() == 1
    assert (rank(), world_size()) == tuple(everywhere.tolist())
    return {**results, "everywhere": everywhere, "grad": rows.grad}


def test_reductions():
    results = run_in_processes(results_of_groups, 5)
    for number, ranks in enumerate(GROUPS):
        all_rows = torch.cat([torch.arange(2.0) + 10 * i + 100 * number for i in range(len(ranks))])[:, None]
        weights = torch.arange(1.0, 1 + len(all_rows))[:, None] * sum(1 + i for i in range(len(ranks)))
        for i, place in enumerate(sorted(ranks)):
            result = results[place]
            assert result["everywhere"].tolist() == [place, 5]
            assert result["inside"].tolist() == [number, i, len(ranks)]
            assert torch.equal(result["sum"], all_rows.unflatten(0, (-1, 2)).sum(0))
            assert torch.equal(result["max"], all_rows[-2:])
            assert torch.equal(result["gathered"], all_rows)
            assert result["lists"].tolist() == [x for j in range(len(ranks)) for x in (number, j)]
            assert torch.equal(result["grad"], weights[2 * i : 2 * i + 2])
            assert result["all"] == 5


def batch(number: int) -> Tensor:
    return torch.randn(8, 9, generator=torch.Generator().manual_seed(number))


def student(number: int) -> nn.Sequential:
    torch.manual_seed(number)
    return nn.Sequential(nn.Linear(9, 5 + number), nn.GELU(), nn.Linear(5 + number, 7))


def train(engine: Engine, number: int, folder: str) -> dict[str, Tensor]:
    """Two steps of a student of its own, with its moving average, on a batch of its own; saved after the first."""
    model, average = student(number), student(number)
    average.requires_grad_(False)
    engine.shard([model, average], [model[0], average[0]])
    optimizer = AdamW(model.parameters(), lr=1e-2)
    called, _ = engine.wrap(model, optimizer) or (model, None)
    results = {}
    for step in range(2):
        x = called(batch(number)[rank() :: world_size()])
        targets = sinkhorn_knopp(batch(number + step)[rank() :: world_size(), :7], 0.2)
        loss = (x.log_softmax(-1) * targets).sum(-1).mean().neg() + koleo_loss(x, group_size=8)
        engine.backward(loss)
        norms = engine.clip_gradients({"first": model[0], "last": model[2]}, 0.1)
        optimizer.step()
        model.zero_grad()
        with torch.no_grad():
            engine.update_average(average, model, 0.1)
        results |= {f"{step}/{name}": value for name, value in norms.items()}
        results[f"{step}/loss"] = all_reduce_sum(loss) / world_size()
        for kind, network in (("student", model), ("average", average)):
            results |= {f"{step}/{kind}.{name}": x.clone() for name, x in engine.whole_tensors(network)}
        if step == 0:
            path = state_file(Path(folder, str(number)), rank(), world_size())
            write_pieces(path, on_host(engine.pieces(model, optimizer)))
    all_reduce_sum(torch.zeros(()))  # everybody has saved
    engine.load(model, optimizer, StateReader(Path(folder, str(number))))
    results |= {f"loaded.{name}": x.clone() for name, x in engine.whole_tensors(model)}
    return {name: value.detach() for name, value in results.items()}


def two_groups(folder: str) -> dict[str, Tensor]:
    engine = FSDP2Engine(torch.device("cpu"), False, False, lambda: torch.autocast("cpu", enabled=False))
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    number = dist.get_rank() % 2
    with process_group(groups[number]):
        return train(engine, number, folder)


@pytest.mark.invariant
def test_two_groups_shard_and_train_a_student_each(tmp_path):
    results = run_in_processes(two_groups, 4, str(tmp_path))
    for number in range(2):
        expected = train(Engine(), number, str(tmp_path / "one"))
        for result in results[number::2]:
            for name, value in expected.items():
                torch.testing.assert_close(result[name], value, rtol=1e-5, atol=1e-7, msg=name)
