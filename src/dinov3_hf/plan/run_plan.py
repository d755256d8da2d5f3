"""From a recipe and a machine to what fits, how long it takes, what limits, and what it costs."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from dinov3_hf.plan.engines import ENGINES, Engine
from dinov3_hf.plan.gpus import GPU
from dinov3_hf.plan.step_flop import step_flop
from dinov3_hf.plan.step_memory import StepMemory, step_memory
from dinov3_hf.plan.workload import Resolution, Workload

# Of the memory that a data sheet names: the rest is for the CUDA context, kernels' work spaces, fragmentation.
USABLE_MEMORY = 0.9
# Of the peak in bfloat16. The geometric mean of what the two published runs reached, 0.18 (ViT-L/16, 32 GPUs) and 0.55
# (ViT-7B/16, 256 GPUs, its blocks in float8, if all its hours were stage 1).
PUBLISHED_UTILIZATION = (0.18, 0.55)
DEFAULT_UTILIZATION = 0.32
# Of the speed of a link, in large collective operations.
LINK_EFFICIENCY = 0.8
# Electricity of a data centre for each joule of its GPUs: that of the published 7B run.
POWER_USAGE_EFFECTIVENESS = 1.1
# AdamW reads parameter, gradient and moments and writes all but the gradient; the moving average reads both networks
# and writes one: numbers of 4 bytes.
UPDATE_BYTES = 40

Limit = Literal["memory", "network", "compute"]


@dataclass(frozen=True)
class Machine:
    """
    Args:
        gpu: its kind.
        num_gpus: one rank on each.
        gpus_per_node: that are linked directly.
        utilization: share of the peak that matrix products reach over a whole step.
        network_gb_per_second: from node to node, one way, a GPU; None for that of the GPU's reference system.
    """

    gpu: GPU
    num_gpus: int
    gpus_per_node: int = 8
    utilization: float = DEFAULT_UTILIZATION
    network_gb_per_second: float | None = None

    @property
    def usable_memory(self) -> float:
        """Bytes."""
        return USABLE_MEMORY * self.gpu.memory_gb * 1e9

    @property
    def link(self) -> float:
        """
        Bytes a second that a rank sends in a ring. As many rings as a node has GPUs share the work, and each leaves
        the node by another port: together they are as fast as all ports of a node, or as the links inside it.
        """
        links = [self.gpu.link_gb_per_second]
        if self.num_gpus > self.gpus_per_node:
            network = self.network_gb_per_second
            links.append(self.gpus_per_node * (self.gpu.network_gb_per_second if network is None else network))
        return LINK_EFFICIENCY * min(links) * 1e9

    @property
    def flop_per_second(self) -> float:
        """Of one GPU."""
        return self.utilization * self.gpu.tflops * 1e12


@dataclass(frozen=True)
class ResolutionPlan:
    """
    Steps with crops of one size.

    Args:
        resolution: the sizes.
        micro_batch: images of a forward pass on a rank.
        num_forwards: such passes of an optimizer step, on each rank.
        memory: of that.
        sent_bytes: by each rank in a step.
        compute_seconds, network_seconds: of a step; the shorter of them is taken to hide behind the longer.
        update_seconds: of the optimizer and the moving average, which nothing hides.
    """

    resolution: Resolution
    micro_batch: int
    num_forwards: int
    memory: StepMemory
    sent_bytes: float
    compute_seconds: float
    network_seconds: float
    update_seconds: float

    @property
    def seconds(self) -> float:
        return max(self.compute_seconds, self.network_seconds) + self.update_seconds


class RunCosts:
    """What a run costs, by the seconds of a step."""

    machine: Machine

    @property
    def step_seconds(self) -> float:
        raise NotImplementedError

    @property
    def max_steps(self) -> int:
        raise NotImplementedError

    @property
    def global_batch_size(self) -> int:
        raise NotImplementedError

    @property
    def hours(self) -> float:
        """Of the run."""
        return self.step_seconds * self.max_steps / 3600

    @property
    def gpu_hours(self) -> float:
        return self.hours * self.machine.num_gpus

    @property
    def kilowatt_hours(self) -> float:
        """GPUs at full power, with what the data centre needs for that."""
        return self.gpu_hours * self.machine.gpu.watts / 1000 * POWER_USAGE_EFFECTIVENESS

    @property
    def images_per_second(self) -> float:
        return self.global_batch_size / self.step_seconds


@dataclass(frozen=True)
class Plan(RunCosts):
    """
    Args:
        workload, machine, engine: what was planned.
        fits: whether the memory of a GPU is enough, at the micro-batch that was asked for, or else at the smallest.
        resolutions: in the order of the workload.
    """

    workload: Workload
    machine: Machine
    engine: str
    fits: bool
    resolutions: tuple[ResolutionPlan, ...]

    def mean(self, values: Iterable[float]) -> float:
        """Over the steps of the run, of one value for each resolution."""
        return sum(value * plan.resolution.share for value, plan in zip(values, self.resolutions, strict=True))

    @property
    def limit(self) -> Limit:
        if not self.fits:
            return "memory"
        network = self.mean(plan.network_seconds for plan in self.resolutions)
        return "network" if network > self.mean(plan.compute_seconds for plan in self.resolutions) else "compute"

    @property
    def peak_memory(self) -> float:
        """Bytes on a GPU, at the largest resolution."""
        return max(plan.memory.peak for plan in self.resolutions)

    @property
    def model_flop_of_image(self) -> float:
        return self.mean(step_flop(self.workload, plan.resolution).model for plan in self.resolutions)

    @property
    def flop_of_image(self) -> float:
        return self.mean(step_flop(self.workload, plan.resolution).total for plan in self.resolutions)

    @property
    def step_seconds(self) -> float:
        return self.mean(plan.seconds for plan in self.resolutions)

    @property
    def max_steps(self) -> int:
        return self.workload.max_steps

    @property
    def global_batch_size(self) -> int:
        return self.workload.global_batch_size


def plan_run(workload: Workload, machine: Machine, engine: str | None = None) -> Plan:
    """
    The largest micro-batch that fits, or the one that the workload asks for, and what follows from it.

    Args:
        engine: one of `ENGINES`; None is `ddp` where it fits, else `fsdp2`.

    Raises:
        ValueError: the global batch does not go on so many ranks.
    """
    share = rank_share(workload, machine.num_gpus)
    if engine is None:
        plan = _plan(workload, machine, "ddp", share)
        return plan if plan.fits or machine.num_gpus == 1 else _plan(workload, machine, "fsdp2", share)
    assert engine in ENGINES
    return _plan(workload, machine, engine, share)


def rank_share(workload: Workload, num_ranks: int) -> int:
    """Images of an optimizer step on each rank.

    Raises:
        ValueError: they are none, or not the same number everywhere, or groups of images would be torn.
    """
    batch = workload.global_batch_size
    if num_ranks > batch:
        raise ValueError(
            f"the recipe's global_batch_size is {batch} images, so that {num_ranks} GPUs would have less than one "
            f"each; use {batch} GPUs at most, or another global_batch_size, which changes the result."
        )
    if batch % num_ranks or not micro_batches(workload, num_ranks):
        largest = max(n for n in range(1, num_ranks) if batch % n == 0 and micro_batches(workload, n))
        groups = "" if batch % num_ranks else f" in whole groups of {workload.image_group} images"
        raise ValueError(
            f"the recipe's global_batch_size {batch} cannot be divided among {num_ranks} GPUs{groups}; the next "
            f"smaller number that can is {largest}."
        )
    return batch // num_ranks


def sweep(workload: Workload, machine: Machine, engine: str | None, counts: Iterable[int]) -> list[Plan]:
    """Plans for these numbers of GPUs, without those on which the global batch does not go."""
    plans = []
    for num_gpus in counts:
        if workload.global_batch_size % num_gpus == 0 and micro_batches(workload, num_gpus):
            plans.append(plan_run(workload, replace(machine, num_gpus=num_gpus), engine))
    return plans


def _plan(workload: Workload, machine: Machine, engine_name: str, share: int) -> Plan:
    engine = Engine(engine_name, machine.num_gpus)
    allowed = micro_batches(workload, machine.num_gpus)
    asked = [] if workload.micro_batch is None else [workload.micro_batch]
    if asked and asked[0] not in allowed:
        raise ValueError(
            f"per_device_train_batch_size {asked[0]} does not go with the recipe on {machine.num_gpus} GPUs; use one "
            f"of {', '.join(map(str, allowed))}."
        )
    chosen: list[tuple[Resolution, int, StepMemory]] = []
    # The resolution that takes most images at once says how many the loader gives; others take parts of that.
    best = [
        _largest(workload, resolution, engine, machine, asked or allowed, share) for resolution in workload.resolutions
    ]
    whole = max(size for size, _ in best)
    parts = [size for size in allowed if whole % size == 0 and (size == whole or size % workload.koleo_group == 0)]
    for resolution, (size, memory) in zip(workload.resolutions, best, strict=True):
        if size not in parts:
            size, memory = _largest(workload, resolution, engine, machine, asked or parts, share)
        chosen.append((resolution, size, memory))
    resolutions = tuple(
        timed(workload, resolution, engine, machine, size, share, memory, step_flop(workload, resolution).total)
        for resolution, size, memory in chosen
    )
    fits = all(plan.memory.peak <= machine.usable_memory for plan in resolutions)
    return Plan(workload, machine, engine_name, fits, resolutions)


def micro_batches(workload: Workload, num_ranks: int) -> list[int]:
    """Images of a forward pass of a rank that leave the result as it is."""
    share = workload.global_batch_size // num_ranks
    return [
        size
        for size in range(1, share + 1)
        if share % size == 0 and size % workload.image_group == 0 and size * num_ranks % workload.koleo_group == 0
    ]


def _largest(
    workload: Workload, resolution: Resolution, engine: Engine, machine: Machine, sizes: list[int], share: int
) -> tuple[int, StepMemory]:
    """The largest of `sizes` that fits, else the one that lacks least, and its memory."""
    memories = {size: step_memory(workload, resolution, engine, size, share) for size in sizes}
    fitting = [size for size, memory in memories.items() if memory.peak <= machine.usable_memory]
    # Not always the largest or the smallest of all: gradients that add up over forward passes take memory, too.
    size = max(fitting) if fitting else min(sizes, key=lambda size: memories[size].peak)
    return size, memories[size]


def timed(
    workload: Workload,
    resolution: Resolution,
    engine: Engine,
    machine: Machine,
    micro_batch: int,
    share: int,
    memory: StepMemory,
    flop_of_image: float,
) -> ResolutionPlan:
    """How long the forward passes of a step take on a rank; for the letters see `ResolutionPlan`.

    Args:
        share: images of a step on each rank.
        flop_of_image: what a rank computes for one.
    """
    num_forwards = share // micro_batch
    sent = engine.traffic(workload, num_forwards)
    state_share = 1 if engine.name == "ddp" else 1 / engine.num_ranks
    return ResolutionPlan(
        resolution=resolution,
        micro_batch=micro_batch,
        num_forwards=num_forwards,
        memory=memory,
        compute_seconds=share * flop_of_image / machine.flop_per_second,
        sent_bytes=sent,
        network_seconds=sent / machine.link,
        update_seconds=UPDATE_BYTES * workload.num_parameters * state_share / (machine.gpu.memory_gb_per_second * 1e9),
    )
