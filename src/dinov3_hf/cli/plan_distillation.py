"""`dinov3-hf plan` of a distillation: students in turn beside students in groups of ranks."""

from dataclasses import dataclass
from typing import Any

from rich.table import Table

from dinov3_hf.cli.plan_recipe import Asked, distillation_of
from dinov3_hf.cli.plan_tables import duration, gigabytes, table_of, totals
from dinov3_hf.errors import ArgumentError
from dinov3_hf.plan.distillation import Distillation, DistillationPlan, plan_in_groups, plan_in_turn
from dinov3_hf.plan.run_plan import Machine

MODES = {"in_turn": "in turn", "in_groups": "in groups"}


@dataclass(frozen=True)
class Both:
    """
    Args:
        plans: `in_turn` and `in_groups`, without a way that is not possible.
        wanted: the one that the recipe asks for.
        why_not: of the way that is not possible.
    """

    plans: dict[str, DistillationPlan]
    wanted: DistillationPlan
    why_not: str = ""

    @property
    def distillation(self) -> Distillation:
        return self.wanted.distillation


def plan_both(asked: Asked, machine: Machine, engine: str | None) -> Both:
    """
    Both ways to train the students.

    Raises:
        ArgumentError: the engine or the split of ranks is not one of these students.
        ValueError: the way that the recipe asks for is not possible on this machine.
    """
    distillation = distillation_of(asked.args, asked.micro_batch)  # type: ignore[arg-type]  # as the caller has looked
    names = list(distillation.students)
    if engine in ("zero2", "zero3") and (len(names) > 1 or asked.student_ranks is not None):
        raise ArgumentError(
            f"engine {engine} trains one network, but there are {len(names)} students; set engine: fsdp2 or ddp, or "
            "distil them one by one."
        )

    def in_turn() -> DistillationPlan:
        return plan_in_turn(distillation, machine, engine)

    def in_groups() -> DistillationPlan:
        given = asked.student_ranks
        ranks = _checked(given, names, machine.num_gpus) if isinstance(given, dict) else None
        return plan_in_groups(distillation, machine, ranks, engine)

    ways = {"in_turn": in_turn, "in_groups": in_groups}
    wanted = "in_turn" if asked.student_ranks is None else "in_groups"
    plans, why_not = {wanted: ways[wanted]()}, ""
    if len(names) > 1:
        (other,) = ways.keys() - plans.keys()
        try:
            plans[other] = ways[other]()
        except ValueError as error:
            why_not = f"{MODES[other]}: {error}"
    return Both({name: plans[name] for name in ways if name in plans}, plans[wanted], why_not)


def _checked(ranks: dict[str, int], names: list[str], num_gpus: int) -> dict[str, int]:
    if ranks.keys() != set(names):
        named = ", ".join(f"{name}: 1" for name in names)
        raise ArgumentError(f"student_ranks must name each student once: {{{named}}}.")
    if sum(ranks.values()) != num_gpus or min(ranks.values()) < 1:
        raise ValueError(
            f"student_ranks {ranks} are {sum(ranks.values())} ranks, but there are {num_gpus} GPUs; change one, or "
            "set student_ranks: auto."
        )
    return {name: ranks[name] for name in names}


def facts_of(both: Both) -> dict[str, Any]:
    """Both plans in plain types: bytes, seconds and operations without prefixes."""
    distillation, wanted = both.distillation, both.wanted
    teacher = distillation.teacher
    teacher_flop = teacher.answer_flop + teacher.target_flop
    return {
        "gpus": wanted.machine.num_gpus,
        "engine": wanted.engine,
        "utilization": wanted.machine.utilization,
        "fits": wanted.fits,
        "limit": wanted.limit,
        "teacher": {
            "parameters": teacher.num_parameters,
            "head_parameters": teacher.head_parameters,
            "flop_of_image": teacher_flop,
            "share_of_flop": teacher_flop / distillation.flop_of_image,
        },
        "students": {
            name: {
                "parameters": workload.num_parameters,
                "backbone_parameters": workload.backbone.num_parameters,
                "flop_of_image": distillation.student_flop(name),
            }
            for name, workload in distillation.students.items()
        },
        "memory": {"usable_bytes": wanted.machine.usable_memory, "peak_bytes": wanted.peak_memory},
        **{name: _way(plan) for name, plan in both.plans.items()},
        "run": {
            "steps": wanted.max_steps,
            "global_batch_size": wanted.global_batch_size,
            "student_ranks": _ranks(wanted) if wanted.in_groups else None,
            "step_seconds": wanted.step_seconds,
            "images_per_second": wanted.images_per_second,
            "hours": wanted.hours,
            "gpu_hours": wanted.gpu_hours,
            "kilowatt_hours": wanted.kilowatt_hours,
        },
    }


def _way(plan: DistillationPlan) -> dict[str, Any]:
    return {
        "engine": plan.engine,
        "fits": plan.fits,
        "limit": plan.limit,
        "per_device_train_batch_size": plan.per_device_train_batch_size,
        "peak_bytes": plan.peak_memory,
        "teacher_share": plan.teacher_share,
        "idle_share": plan.idle_share,
        "one_by_one_seconds": plan.one_by_one_seconds,
        "seconds": {
            "teacher": plan.teacher_seconds,
            "exchange": plan.exchange_seconds,
            "students": plan.students_seconds,
            "step": plan.step_seconds,
        },
        "hours": plan.hours,
        "gpu_hours": plan.gpu_hours,
        "students": {
            name: {
                "ranks": student.num_ranks,
                "micro_batch": student.step.micro_batch,
                "forwards_of_a_step": student.step.num_forwards,
                "peak_bytes": student.step.memory.peak,
                "sent_bytes": student.step.sent_bytes,
                "seconds": student.step.seconds,
            }
            for name, student in plan.students.items()
        },
    }


def _ranks(plan: DistillationPlan) -> dict[str, int]:
    return {name: student.num_ranks for name, student in plan.students.items()}


def tables(facts: dict[str, Any], both: Both) -> list[Table]:
    ways = [_way_table(name, plan) for name, plan in both.plans.items()]
    return [_networks_table(facts, both), *ways, _run_table(facts, both)]


def _networks_table(facts: dict[str, Any], both: Both) -> Table:
    machine = both.wanted.machine
    title = f"{facts['recipe']} on {machine.num_gpus:,} x {facts['gpu']}"
    table = table_of(title, "", "parameters", "in heads", "TFLOP an image", "share", right=True)
    networks = {"teacher": (facts["teacher"]["parameters"], facts["teacher"]["head_parameters"], facts["teacher"])}
    for name, student in facts["students"].items():
        in_backbone = student["backbone_parameters"]
        networks[name] = (in_backbone, student["parameters"] - in_backbone, student)
    for name, (in_backbone, in_heads, network) in networks.items():
        flop = network["flop_of_image"]
        table.add_row(
            name,
            f"{in_backbone / 1e6:,.0f} M",
            f"{in_heads / 1e6:,.0f} M",
            f"{flop / 1e12:,.3g}",
            f"{flop / both.distillation.flop_of_image:.0%}",
        )
    return table


def _way_table(name: str, plan: DistillationPlan) -> Table:
    title = f"Students {MODES[name]}, {plan.engine}"
    table = table_of(title, "", "GPUs", "images a GPU", "GB a GPU", "seconds a step", right=True)
    num_gpus = plan.machine.num_gpus
    share, seconds = plan.global_batch_size // num_gpus, f"{plan.teacher_seconds:.3g}"
    table.add_row("teacher", f"{num_gpus:,}", _passes(share, plan.per_device_train_batch_size or share), "", seconds)
    for student, own in plan.students.items():
        peak = gigabytes(own.step.memory.peak)
        if own.step.memory.peak > plan.machine.usable_memory:
            peak = f"[red]{peak}[/red]"
        images = own.step.num_forwards * own.step.micro_batch
        passes = _passes(images, own.step.micro_batch)
        table.add_row(student, f"{own.num_ranks:,}", passes, peak, f"{own.step.seconds:.3g}")
    return table


def _passes(share: int, size: int) -> str:
    return f"{share:,}" if share == size else f"{share // size} x {size}"


def _run_table(facts: dict[str, Any], both: Both) -> Table:
    plans = both.plans.values()
    table = table_of("The run", "", *(MODES[name] for name in both.plans))
    rows = {
        "limit": [plan.limit if plan.fits else "[red]memory: it does not fit[/red]" for plan in plans],
        "GB a GPU": [f"{gigabytes(plan.peak_memory)} of {gigabytes(plan.machine.usable_memory)}" for plan in plans],
        "per_device_train_batch_size": [str(plan.per_device_train_batch_size or "null") for plan in plans],
        "teacher": [f"{plan.teacher_share:.1%} of the time" for plan in plans],
        "GPUs wait": [f"{plan.idle_share:.1%} of the time" for plan in plans],
        "seconds a step": [f"{plan.step_seconds:.3g}" for plan in plans],
        "one by one": [f"{plan.one_by_one_seconds / plan.step_seconds:.2f} times as long" for plan in plans],
        "images a second": [f"{plan.images_per_second:,.0f}" for plan in plans],
        "time": [duration(plan.hours) for plan in plans],
        "GPU hours": [f"{plan.gpu_hours:,.1f}" for plan in plans],
        "kWh": [f"{plan.kilowatt_hours:,.1f}" for plan in plans],
    }
    for name, cells in rows.items():
        table.add_row(name, *cells)
    for name, text in totals(facts["run"], both.wanted).items():
        table.add_row(name, text)
    if both.why_not:
        table.add_row("not possible", both.why_not)
    return table
