"""From the recipe of a distillation and a machine to what fits, how long it takes, and how long ranks wait.

One teacher runs on all ranks, each with its share of the images. Then students are trained *in turn*, each on all
ranks, or *in groups*: ranks are split, each group trains one student on the whole batch at the same time as the
others, and images with the teacher's answers go to one rank of every group first.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import lcm

from dinov3_hf.plan.engines import Engine
from dinov3_hf.plan.run_plan import Limit, Machine, ResolutionPlan, RunCosts, micro_batches, rank_share, timed
from dinov3_hf.plan.step_flop import step_flop
from dinov3_hf.plan.step_memory import cut_pixels, step_memory
from dinov3_hf.plan.student_ranks import choose_student_ranks, idle_share
from dinov3_hf.plan.workload import FixedTeacher, Workload


@dataclass(frozen=True)
class Distillation:
    """
    Args:
        teacher: of all students.
        students: name -> its part of the work; all with the same batch, crops and steps.
    """

    teacher: FixedTeacher
    students: Mapping[str, Workload]

    @property
    def any_student(self) -> Workload:
        """Whose crops, batch and steps are those of all."""
        return next(iter(self.students.values()))

    def student_flop(self, name: str) -> float:
        """Operations of an image of a student, forward and backward."""
        workload = self.students[name]
        return step_flop(workload, workload.resolutions[0]).total

    @property
    def flop_of_image(self) -> float:
        """Operations of an image, of the teacher and all students in turn."""
        return self.teacher.answer_flop + self.teacher.target_flop + sum(map(self.student_flop, self.students))


@dataclass(frozen=True)
class StudentPlan:
    """
    Args:
        num_ranks: that train the student.
        step: its part of the optimizer step. The memory is that of a rank, with the teacher and, in turn, the others.
    """

    num_ranks: int
    step: ResolutionPlan


@dataclass(frozen=True)
class DistillationPlan(RunCosts):
    """
    Args:
        distillation, machine, engine: what was planned.
        in_groups: whether ranks are split.
        students: by name.
        per_device_train_batch_size: images of a forward pass; None is each rank's whole share.
        teacher_seconds: of a step.
        exchange_seconds: of a step, in which images and answers go to the groups.
    """

    distillation: Distillation
    machine: Machine
    engine: str
    in_groups: bool
    students: Mapping[str, StudentPlan]
    per_device_train_batch_size: int | None
    teacher_seconds: float
    exchange_seconds: float

    @property
    def max_steps(self) -> int:
        return self.distillation.any_student.max_steps

    @property
    def global_batch_size(self) -> int:
        return self.distillation.any_student.global_batch_size

    @property
    def peak_memory(self) -> float:
        """Bytes on the GPU that has most."""
        return max(plan.step.memory.peak for plan in self.students.values())

    @property
    def fits(self) -> bool:
        return self.peak_memory <= self.machine.usable_memory

    @property
    def students_seconds(self) -> float:
        """Of a step, for all students."""
        seconds = [plan.step.seconds for plan in self.students.values()]
        return max(seconds) if self.in_groups else sum(seconds)

    @property
    def step_seconds(self) -> float:
        return self.teacher_seconds + self.exchange_seconds + self.students_seconds

    @property
    def teacher_share(self) -> float:
        """Of the time of a step."""
        return self.teacher_seconds / self.step_seconds

    @property
    def idle_share(self) -> float:
        """Of the time of all ranks, that is spent waiting for the slowest group."""
        if not self.in_groups:
            return 0.0
        of_one_rank = {name: plan.step.seconds * plan.num_ranks for name, plan in self.students.items()}
        ranks = {name: plan.num_ranks for name, plan in self.students.items()}
        return idle_share(of_one_rank, ranks) * self.students_seconds / self.step_seconds

    @property
    def one_by_one_seconds(self) -> float:
        """Of a step of each student with a teacher of its own, one after the other, on all ranks."""
        students = self.students_seconds
        if self.in_groups:
            busy = sum(plan.step.seconds * plan.num_ranks for plan in self.students.values())
            students = busy / self.machine.num_gpus
        return len(self.students) * self.teacher_seconds + students

    @property
    def limit(self) -> Limit:
        if not self.fits:
            return "memory"
        waited_for = list(self.students.values())
        if self.in_groups:
            waited_for = [max(waited_for, key=lambda plan: plan.step.seconds)]
        computing = self.teacher_seconds + sum(plan.step.compute_seconds for plan in waited_for)
        sending = self.exchange_seconds + sum(plan.step.network_seconds for plan in waited_for)
        return "network" if sending > computing else "compute"


def plan_in_turn(distillation: Distillation, machine: Machine, engine: str | None = None) -> DistillationPlan:
    """
    All ranks train all students.

    Args:
        engine: one of `ENGINES`; None is `ddp` where it fits, else `fsdp2`.

    Raises:
        ValueError: the global batch does not go on so many ranks.
    """
    return _with_engine(distillation, machine, engine, None)


def plan_in_groups(
    distillation: Distillation, machine: Machine, ranks: Mapping[str, int], engine: str | None = None
) -> DistillationPlan:
    """
    Each group of ranks trains one student.

    Args:
        ranks: student -> its ranks; together those of the machine.
        engine: as in `plan_in_turn`.

    Raises:
        ValueError: the global batch does not go on so many ranks.
    """
    return _with_engine(distillation, machine, engine, ranks)


def split_ranks(distillation: Distillation, num_ranks: int) -> dict[str, int]:
    """
    The split with the shortest step, where all GPUs reach the same share of their peak with every student.

    Raises:
        ValueError: there is none; see `choose_student_ranks`.
    """
    any_student = distillation.any_student
    together = lcm(*(workload.image_group for workload in distillation.students.values()))
    flop = {name: _flop_in_a_group(distillation, name) for name in distillation.students}
    return choose_student_ranks(flop, num_ranks, any_student.global_batch_size // together)


def _with_engine(
    distillation: Distillation, machine: Machine, engine: str | None, ranks: Mapping[str, int] | None
) -> DistillationPlan:
    if engine is not None:
        return _plan(distillation, machine, engine, ranks)
    plan = _plan(distillation, machine, "ddp", ranks)
    return plan if plan.fits or machine.num_gpus == 1 else _plan(distillation, machine, "fsdp2", ranks)


def _plan(
    distillation: Distillation, machine: Machine, engine: str, ranks: Mapping[str, int] | None
) -> DistillationPlan:
    candidates = [
        _Candidate(distillation, machine, engine, ranks, size) for size in _sizes(distillation, machine, ranks)
    ]
    fitting = [candidate for candidate in candidates if candidate.peak <= machine.usable_memory]
    best = fitting[0] if fitting else min(candidates, key=lambda candidate: candidate.peak)
    return best.plan()


def _sizes(distillation: Distillation, machine: Machine, ranks: Mapping[str, int] | None) -> list[int | None]:
    """Images of a forward pass that all students can have, largest first; None is each rank's whole share."""
    any_student = distillation.any_student
    batch, num_gpus = any_student.global_batch_size, machine.num_gpus
    if batch % num_gpus:
        raise ValueError(
            f"global_batch_size {batch} is not a multiple of {num_gpus} GPUs, on all of which the teacher runs; use "
            f"{max(batch // num_gpus, 1) * num_gpus} or {(batch // num_gpus + 1) * num_gpus}, or other --gpus."
        )
    allowed: set[int] = set(range(1, batch // num_gpus + 1))
    for name, workload in distillation.students.items():
        count = num_gpus if ranks is None else ranks[name]
        try:
            rank_share(workload, count)
        except ValueError as error:
            raise ValueError(f"student {name}: {error}") from error
        allowed &= set(micro_batches(workload, count))
    asked = any_student.micro_batch
    if asked is None:
        return [None, *sorted(allowed, reverse=True)]
    if asked not in allowed:
        possible = ", ".join(map(str, sorted(allowed))) or "no number, and leave it out"
        raise ValueError(
            f"per_device_train_batch_size {asked} does not go with all students on {num_gpus} GPUs; use {possible}."
        )
    return [asked]


@dataclass(frozen=True)
class _Candidate:
    distillation: Distillation
    machine: Machine
    engine_name: str
    ranks: Mapping[str, int] | None
    size: int | None

    def engine(self, name: str) -> Engine:
        return Engine(self.engine_name, self.machine.num_gpus if self.ranks is None else self.ranks[name])

    @property
    def peak(self) -> float:
        return max(plan.step.memory.peak for plan in self.students.values())

    @cached_property
    def students(self) -> dict[str, StudentPlan]:
        return {name: self.student(name) for name in self.distillation.students}

    def student(self, name: str) -> StudentPlan:
        workload, engine = self.distillation.students[name], self.engine(name)
        resolution = workload.resolutions[0]
        share = workload.global_batch_size // engine.num_ranks
        num_images = share if self.size is None else self.size
        beside = self.teacher_bytes()
        if self.ranks is None:
            others = [other for other in self.distillation.students if other != name]
            beside += sum(engine.state(self.distillation.students[other]).total for other in others)
        elif share == num_images:
            beside += share * cut_pixels(workload, resolution)  # they have come to the GPU as bytes
        memory = step_memory(workload, resolution, engine, num_images, share, beside)
        flop = step_flop(workload, resolution).total
        if self.ranks is not None:
            flop = _flop_in_a_group(self.distillation, name)
        return StudentPlan(
            engine.num_ranks, timed(workload, resolution, engine, self.machine, num_images, share, memory, flop)
        )

    def teacher_bytes(self) -> float:
        """Of its weights on each rank; its heads are not sharded."""
        teacher, b = self.distillation.teacher, self.number_bytes
        shared = self.machine.num_gpus if Engine(self.engine_name, 1).shares_parameters else 1
        return b * (teacher.num_parameters / shared + teacher.head_parameters)

    @property
    def number_bytes(self) -> int:
        return 2 if self.distillation.any_student.bf16 else 4

    def plan(self) -> DistillationPlan:
        teacher, workload, machine = self.distillation.teacher, self.distillation.any_student, self.machine
        share = workload.global_batch_size // machine.num_gpus
        flop = teacher.answer_flop + (teacher.target_flop if self.ranks is None else 0)
        computing = share * flop / machine.flop_per_second
        gathering = self.gathered_bytes(share // (self.size or share)) / machine.link
        return DistillationPlan(
            distillation=self.distillation,
            machine=machine,
            engine=self.engine_name,
            in_groups=self.ranks is not None,
            students=self.students,
            per_device_train_batch_size=self.size,
            teacher_seconds=max(computing, gathering),
            exchange_seconds=0.0 if self.ranks is None else self.exchanged_bytes() / machine.link,
        )

    def gathered_bytes(self, num_forwards: int) -> float:
        """Of a sharded teacher, by each rank in a step."""
        if not Engine(self.engine_name, 1).shares_parameters:
            return 0.0
        others = (self.machine.num_gpus - 1) / self.machine.num_gpus
        return num_forwards * self.number_bytes * others * self.distillation.teacher.num_parameters

    def exchanged_bytes(self) -> float:
        """What a rank sends to the groups, or the rank of the smallest group gets, whichever is more."""
        assert self.ranks is not None
        workload = self.distillation.any_student
        image = cut_pixels(workload, workload.resolutions[0])
        image += self.number_bytes * self.distillation.teacher.answer_numbers
        share = workload.global_batch_size // self.machine.num_gpus
        return image * max(share * len(self.ranks), workload.global_batch_size // min(self.ranks.values()))


def _flop_in_a_group(distillation: Distillation, name: str) -> float:
    """Operations of an image of a student whose group makes the targets by itself."""
    return distillation.student_flop(name) + distillation.teacher.target_flop
