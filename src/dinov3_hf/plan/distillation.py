"""From the recipe of a distillation and a machine to what fits, how long it takes, and how long ranks wait.

One teacher runs on all ranks, each with its share of the images. Then students are trained *in turn*, each on all
ranks, or *in groups*: ranks are split, each group trains one student on the whole batch at the same time as the
others, and images with the teacher's answers go to one rank of every group first.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dinov3_hf.distributed.student_ranks import choose_student_ranks, idle_share
from dinov3_hf.plan.engines import Engine
from dinov3_hf.plan.run_plan import Limit, Machine, ResolutionPlan, RunCosts, micro_batches, rank_share, timed
from dinov3_hf.plan.step_flop import step_flop
from dinov3_hf.plan.step_memory import cut_pixels, step_memory
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

    def group_flop(self, name: str) -> float:
        """The same of a student whose group makes the targets by itself."""
        return self.student_flop(name) + self.teacher.target_flop

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
    ranks = dict.fromkeys(distillation.students, machine.num_gpus)
    return _best(_ways(distillation, machine, False, lambda size: ranks), engine)


def plan_in_groups(
    distillation: Distillation, machine: Machine, ranks: Mapping[str, int] | None = None, engine: str | None = None
) -> DistillationPlan:
    """
    Each group of ranks trains one student.

    Args:
        ranks: student -> its ranks; together those of the machine. None is the split with the shortest step, where all
            GPUs reach the same share of their peak with every student.
        engine: as in `plan_in_turn`.

    Raises:
        ValueError: the global batch does not go on so many ranks, or there is no such split.
    """
    flop = {name: distillation.group_flop(name) for name in distillation.students}

    def split(size: int | None) -> Mapping[str, int]:
        def is_possible(name: str, count: int) -> bool:
            sizes = micro_batches(distillation.students[name], count)
            return bool(sizes) if size is None else size in sizes

        if ranks is not None:
            return ranks
        batch_size = distillation.any_student.global_batch_size
        return choose_student_ranks(flop, machine.num_gpus, batch_size, is_possible)

    return _best(_ways(distillation, machine, True, split), engine)


def _best(ways: "list[_Way]", engine: str | None) -> DistillationPlan:
    """The fastest that fits, else the one that lacks least."""
    engines = [engine] if engine is not None else ["ddp"] if ways[0].machine.num_gpus == 1 else ["ddp", "fsdp2"]
    for name in engines:
        plans = [way.plan(name) for way in ways]
        fitting = [plan for plan in plans if plan.fits]
        if fitting:
            return min(fitting, key=lambda plan: plan.step_seconds)
    return min(plans, key=lambda plan: plan.peak_memory)


def _ways(
    distillation: Distillation, machine: Machine, in_groups: bool, split: Callable[[int | None], Mapping[str, int]]
) -> "list[_Way]":
    """Of the images that a forward pass can have, the most first; `split` gives the ranks of each student for them."""
    batch, num_gpus = distillation.any_student.global_batch_size, machine.num_gpus
    share = batch // num_gpus
    if batch % num_gpus:
        raise ValueError(
            f"global_batch_size {batch} is not a multiple of {num_gpus} GPUs, on all of which the teacher runs; use "
            f"{max(share, 1) * num_gpus} or {(share + 1) * num_gpus}, or other --gpus."
        )
    ways: dict[int | None, _Way] = {}
    errors = []
    for size in (None, *(size for size in range(share, 0, -1) if share % size == 0)):
        try:
            ways[size] = _Way(distillation, machine, in_groups, split(size), size)
        except ValueError as error:
            errors.append(error)
    asked = distillation.any_student.micro_batch
    if not ways:
        raise errors[0]
    if asked is not None and asked not in ways:
        possible = ", ".join(str(size) for size in ways if size is not None) or "no number"
        raise ValueError(
            f"per_device_train_batch_size {asked} does not go with all students on {num_gpus} GPUs; use {possible}."
        )
    return [*ways.values()] if asked is None else [ways[asked]]


@dataclass(frozen=True)
class _Way:
    """
    Args:
        ranks: of each student.
        size: images of a forward pass; None is each rank's whole share.

    Raises:
        ValueError: the batch of a student cannot be divided so.
    """

    distillation: Distillation
    machine: Machine
    in_groups: bool
    ranks: Mapping[str, int]
    size: int | None

    def __post_init__(self) -> None:
        for name, workload in self.distillation.students.items():
            try:
                share = rank_share(workload, self.ranks[name])
                if self.size is not None and self.size not in micro_batches(workload, self.ranks[name]):
                    raise ValueError(f"{self.size} images do not go with the {share} of a GPU; use another number.")
            except ValueError as error:
                raise ValueError(f"student {name}: {error}") from error

    def plan(self, engine: str) -> DistillationPlan:
        teacher, workload, machine = self.distillation.teacher, self.distillation.any_student, self.machine
        share = workload.global_batch_size // machine.num_gpus
        flop = teacher.answer_flop + (0 if self.in_groups else teacher.target_flop)
        computing = share * flop / machine.flop_per_second
        gathering = self.gathered_bytes(engine, share // (self.size or share)) / machine.link
        return DistillationPlan(
            distillation=self.distillation,
            machine=machine,
            engine=engine,
            in_groups=self.in_groups,
            students={name: self.student(name, engine) for name in self.distillation.students},
            per_device_train_batch_size=self.size,
            teacher_seconds=max(computing, gathering),
            exchange_seconds=self.exchanged_bytes() / machine.link if self.in_groups else 0.0,
        )

    def student(self, name: str, engine_name: str) -> StudentPlan:
        workload, engine = self.distillation.students[name], Engine(engine_name, self.ranks[name])
        resolution = workload.resolutions[0]
        share = workload.global_batch_size // engine.num_ranks
        num_images = share if self.size is None else self.size
        beside = self.teacher_bytes(engine)
        if not self.in_groups:
            others = [other for other in self.distillation.students if other != name]
            beside += sum(engine.state(self.distillation.students[other]).total for other in others)
        elif share == num_images:
            beside += share * cut_pixels(workload, resolution)  # they have come to the GPU as bytes
        memory = step_memory(workload, resolution, engine, num_images, share, beside)
        flop = self.distillation.group_flop(name) if self.in_groups else self.distillation.student_flop(name)
        step = timed(workload, resolution, engine, self.machine, num_images, share, memory, flop)
        return StudentPlan(engine.num_ranks, step)

    def teacher_bytes(self, engine: Engine) -> float:
        """Of its weights on each rank; it is shared by all of them, but for its heads."""
        teacher = self.distillation.teacher
        shared = self.machine.num_gpus if engine.shares_parameters else 1
        return self.number_bytes * (teacher.num_parameters / shared + teacher.head_parameters)

    @property
    def number_bytes(self) -> int:
        return 2 if self.distillation.any_student.bf16 else 4

    def gathered_bytes(self, engine: str, num_forwards: int) -> float:
        """Of a sharded teacher, by each rank in a step."""
        if not Engine(engine, self.machine.num_gpus).shares_parameters:
            return 0.0
        others = (self.machine.num_gpus - 1) / self.machine.num_gpus
        return num_forwards * self.number_bytes * others * self.distillation.teacher.num_parameters

    def exchanged_bytes(self) -> float:
        """What a rank sends to the groups, or a rank of the smallest group gets, whichever is more."""
        workload = self.distillation.any_student
        image = cut_pixels(workload, workload.resolutions[0])
        image += self.number_bytes * self.distillation.teacher.answer_numbers
        share = workload.global_batch_size // self.machine.num_gpus
        return image * max(share * len(self.ranks), workload.global_batch_size // min(self.ranks.values()))
