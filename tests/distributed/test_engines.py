"""Every engine, on two processes, does what one does on the whole batch, and reads what any other has saved."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import AdamW

from dinov3_hf.distributed.engine import Engine
from dinov3_hf.distributed.pieces import StateReader, on_host, state_file, write_pieces
from dinov3_hf.distributed.reductions import all_reduce_sum, rank, world_size
from tests.reference.processes import run_in_processes
from tests.testing_utils import require_package

# `make test-engines` and CI run them.
pytestmark = [pytest.mark.slow, require_package("deepspeed")]

CPU = torch.device("cpu")
ENGINES = ("ddp", "fsdp2", "fsdp2_offload", "zero2", "zero3", "zero3_persistent", "zero3_offload")
STEPS, SKIPPED = 4, 2
MAX_NORM = 0.5


class Network(nn.Module):
    """Sizes that two do not divide."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Linear(33, 65)
        self.norm = nn.LayerNorm(65)
        self.head = nn.Linear(65, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.block(x)))


class Pair(nn.Module):
    """A student and its moving average."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.student, self.teacher = Network(), Network()
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            target = self.teacher(x)
        return (self.student(1.1 * x) - target).square().mean() + self.student(x).square().mean()


def make_engine(name: str, bf16: bool = False) -> Engine:
    offload = name.endswith("offload")
    if name.startswith("fsdp2"):
        from dinov3_hf.distributed.fsdp2 import FSDP2Engine

        return FSDP2Engine(CPU, bf16, offload, lambda: torch.autocast("cpu", torch.bfloat16, enabled=bf16))
    if name.startswith("zero"):
        from dinov3_hf.distributed.zero import ZeroEngine

        # Edits inside of gathered weights that DeepSpeed would lose are an error.
        options: dict[str, Any] = {"enable_sanity_checks": True}
        if name == "zero3_persistent":  # all but the largest stay gathered between steps
            options["stage3_param_persistence_threshold"] = 1000
        return ZeroEngine(int(name[4]), {"zero_optimization": options}, CPU, 4, bf16, offload)
    return Engine()


class Run:
    """A training run without a Trainer: two micro-batches a step, one clip for each part, a step that is left out."""

    def __init__(self, engine: Engine, bf16: bool = False) -> None:
        self.engine, self.model = engine, Pair()
        self.autocast = bf16 and engine.name == "ddp"
        networks = [self.model.student, self.model.teacher]
        blocks = [network.block for network in networks]
        engine.shard(networks, [] if bf16 else blocks, products=blocks)
        self.adamw = AdamW(self.model.student.parameters(), lr=1e-2, fused=True)
        wrapped = engine.wrap(self.model, self.adamw)
        self.called, self.optimizer = wrapped or (self.model, self.adamw)
        if wrapped is None and world_size() > 1:
            self.called = nn.parallel.DistributedDataParallel(self.model)

    def loss(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            return self.called(x)

    def step(self, number: int) -> dict[str, Tensor]:
        x = torch.randn(8, 33, generator=torch.Generator().manual_seed(number))
        micro_batches = x.chunk(world_size())[rank()].chunk(2)
        losses = []
        for i, micro_batch in enumerate(micro_batches):
            with self.engine.no_sync(self.called) if i == 0 else nullcontext():
                loss = self.loss(micro_batch) / 2
                self.engine.backward(loss)
            losses.append(loss.detach())
        student = self.model.student
        parts = {"block": student.block, "rest": nn.ModuleList([student.norm, student.head])}
        values = self.engine.clip_gradients(parts, MAX_NORM)
        if number == SKIPPED:
            self.engine.discard_gradients(self.model)
        self.optimizer.step()
        self.called.zero_grad()
        if number != SKIPPED:
            self.update(0.1)
        return {**values, "loss": all_reduce_sum(sum(losses)) / world_size()}

    @torch.no_grad()
    def update(self, weight: float) -> None:
        self.engine.update_average(self.model.teacher, self.model.student, weight)

    def weights(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.engine.whole_tensors(self.model)}

    def save(self, folder: Path) -> None:
        write_pieces(state_file(folder, rank(), world_size()), on_host(self.engine.pieces(self.model, self.adamw)))

    def load(self, folder: Path) -> None:
        self.engine.load(self.model, self.adamw, StateReader(folder))


def take_steps(run: Run, start: int, stop: int) -> dict[str, Tensor]:
    return {
        f"{number}/{name}": value for number in range(start, stop) for name, value in run.step(number).items()
    } | run.weights()


def whole_runs(folder: str, names: tuple[str, ...]) -> dict[str, Tensor]:
    """All steps with each engine, saved in the middle; then each goes on from what each other has saved."""
    results = {}
    for name in names:
        run = Run(make_engine(name))
        results |= {f"{name}/{key}": value for key, value in take_steps(run, 0, STEPS).items()}
        run.save(Path(folder, name))
        results[f"{name}/num_steps"] = torch.tensor(run.engine.num_optimizer_steps(run.adamw))
    dist.barrier()
    for name in names:
        run = Run(make_engine(name))
        for other in ("one", *names):
            run.load(Path(folder, other))
            going_on = take_steps(run, STEPS, STEPS + 2)
            results |= {f"{name} from {other}/{key}": value for key, value in going_on.items()}
    return results


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> tuple[Path, dict[str, Tensor], dict[str, Tensor]]:
    """One process: where it has saved its state, and its values before and after that."""
    folder = tmp_path_factory.mktemp("state")
    run = Run(Engine())
    before = take_steps(run, 0, STEPS)
    run.save(folder / "one")
    return folder, before, take_steps(run, STEPS, STEPS + 2)


@pytest.fixture(scope="module")
def two(one) -> list[dict[str, Tensor]]:
    return run_in_processes(whole_runs, 2, str(one[0]), ENGINES)


def assert_same(results: dict[str, Tensor], prefix: str, expected: dict[str, Tensor]) -> None:
    for key, value in expected.items():
        torch.testing.assert_close(
            results[prefix + key], value, rtol=1e-5, atol=1e-7, msg=lambda m, k=key: f"{k}: {m}"
        )


@pytest.mark.invariant
@pytest.mark.parametrize("name", ENGINES)
def test_two_processes_do_what_one_does(one, two, name):
    for results in two:
        assert_same(results, f"{name}/", one[1])
        assert results[f"{name}/num_steps"] == STEPS - 1  # one was left out


@pytest.mark.invariant
@pytest.mark.parametrize("other", ["one", *ENGINES])
@pytest.mark.parametrize("name", ENGINES)
def test_every_engine_goes_on_from_every_other(one, two, name, other):
    for results in two:
        assert_same(results, f"{name} from {other}/", one[2])


@pytest.mark.parametrize("name", ENGINES)
def test_one_process_goes_on_from_every_engine(one, two, name):
    run = Run(Engine())
    run.load(one[0] / name)
    assert_same(take_steps(run, STEPS, STEPS + 2), "", one[2])


def averages(names: tuple[str, ...]) -> dict[str, Tensor]:
    """The teacher after 1000 updates in a bf16 run, and how far a float64 average of the same students has come."""
    results = {}
    for name in names:
        run = Run(make_engine(name, bf16=True), bf16=True)
        before = run.weights()
        expected = {key: value.double() for key, value in before.items()}
        for turn in range(10):
            run.step(100 + turn)
            weights = run.weights()
            for key in expected:
                if key.startswith("teacher"):
                    student = weights[key.replace("teacher", "student", 1)].double()
                    expected[key] = expected[key] + 0.1 * (student - expected[key])  # the step's own update
                    for _ in range(99):
                        expected[key] = expected[key] + 0.001 * (student - expected[key])
            for _ in range(99):
                run.update(0.001)
        after = run.weights()
        teacher = [key for key in after if key.startswith("teacher")]
        error, moved = (
            torch.stack([(after[key].double() - other[key].double()).norm() for key in teacher]).norm()
            for other in (expected, before)
        )
        size = torch.stack([after[key].double().norm() for key in teacher]).norm()
        x = torch.ones(4, 33)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            run.model.eval()
            said = run.model.teacher(x).float()
        whole = Network()
        whole.load_state_dict({key.removeprefix("teacher."): after[key] for key in teacher})
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            results[f"{name}/said"], results[f"{name}/expected"] = said, whole(x).float()
        results |= {f"{name}/error": error / size, f"{name}/moved": moved / size}
    return results


@pytest.mark.invariant
def test_a_thousand_updates_in_bf16_follow_a_float64_average():
    names = ("ddp", "fsdp2", "zero2", "zero3", "zero3_persistent")
    for results in run_in_processes(averages, 2, names):
        for name in names:
            assert results[f"{name}/moved"] > 1e-3
            assert results[f"{name}/error"] < 1e-5, name
            # What the next forward gathers is what was written.
            torch.testing.assert_close(results[f"{name}/said"], results[f"{name}/expected"], rtol=2e-2, atol=2e-2)


def bytes_held(names: tuple[str, ...]) -> dict[str, Tensor]:
    """Bytes of this rank's parameters and moments."""
    held = {}
    for name in names:
        run = Run(make_engine(name))
        run.step(0)
        shards = [run.engine.parameter_shard(p) for p in run.model.parameters()]
        shards += [s for p in run.model.parameters() for s in run.engine.moment_shards(p, run.adamw).values()]
        held[name] = torch.tensor(sum(shard.values.nbytes for shard in shards))
    return held


def test_what_a_rank_holds_falls_with_their_number():
    whole = bytes_held(("ddp",))["ddp"].item()
    for num_ranks in (2, 4):
        held = run_in_processes(bytes_held, num_ranks, ("fsdp2", "zero3"))
        for name in ("fsdp2", "zero3"):
            of_ranks = [results[name].item() for results in held]
            assert sum(of_ranks) == whole
            assert max(of_ranks) < 1.15 * whole / num_ranks  # rows cannot be halved
