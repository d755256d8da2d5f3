"""`dinov3-hf plan`: memory, time and cost of a recipe on a machine, before it is rented."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from dinov3_hf.cli import plan_distillation
from dinov3_hf.cli.plan_recipe import Asked, read_words, workload_of
from dinov3_hf.cli.plan_tables import duration, gigabytes, table_of, totals
from dinov3_hf.errors import ArgumentError, did_you_mean
from dinov3_hf.plan.engines import ENGINES
from dinov3_hf.plan.gpus import find_gpu
from dinov3_hf.plan.run_plan import (
    DEFAULT_UTILIZATION,
    POWER_USAGE_EFFECTIVENESS,
    PUBLISHED_UTILIZATION,
    Machine,
    Plan,
    RunCosts,
    plan_run,
    sweep,
)
from dinov3_hf.plan.step_flop import step_flop

SWEEP = tuple(2**k for k in range(3, 12))  # 8 to 2048 GPUs


def register(app: typer.Typer) -> None:
    app.command("plan", context_settings={"ignore_unknown_options": True})(plan)  # fields of the recipe


def plan(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE [--FIELD VALUE]...",
            help="A recipe's name or a YAML file, and fields to change, as for the training scripts.",
            show_default=False,
        ),
    ],
    gpus: Annotated[int, typer.Option("--gpus", min=1, help="Number of GPUs.")] = 8,
    gpu: Annotated[
        str, typer.Option("--gpu", help="Kind of GPU: h100-80gb, a100-40gb, rtx4090-24gb, ...")
    ] = "h100-80gb",
    engine: Annotated[
        str, typer.Option("--engine", help="ddp, fsdp2, zero2, zero3; auto: ddp where it fits, else fsdp2.")
    ] = "auto",
    images: Annotated[
        float | None, typer.Option("--images", help="Images of the data set, such as 1.7e9: how often is each seen?")
    ] = None,
    mfu: Annotated[
        float, typer.Option("--mfu", help="Share of the peak in bfloat16 that the GPUs reach over a step.")
    ] = DEFAULT_UTILIZATION,
    gpus_per_node: Annotated[int, typer.Option("--gpus_per_node", min=1, help="GPUs that are linked directly.")] = 8,
    network: Annotated[
        float | None,
        typer.Option("--network", help="GB/s between nodes for each GPU, one way; by default its reference system's."),
    ] = None,
    price: Annotated[
        float | None, typer.Option("--price", help="Price of a GPU hour, for the cost of the run.")
    ] = None,
    budget: Annotated[
        float | None, typer.Option("--budget", help="GPU hours that there are: how much of the run do they pay?")
    ] = None,
    sweep_to: Annotated[
        Path | None, typer.Option("--sweep", help="Draw the run on 8 to 2048 GPUs into this file (.png, .svg, .pdf).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")] = False,
) -> None:
    """Memory, time, energy and limits of a run on GPUs that you do not have yet; no GPU needed."""
    _check_numbers({"--mfu": mfu, "--network": network, "--images": images, "--price": price, "--budget": budget})
    if mfu > 1:
        raise ArgumentError(f"--mfu {mfu:g} is more than the peak; give a share such as {DEFAULT_UTILIZATION}.")
    if engine not in ("auto", *ENGINES):
        raise ArgumentError(f"--engine {engine!r} is unknown; {did_you_mean(engine, ('auto', *ENGINES))}")
    machine = Machine(find_gpu(gpu), gpus, gpus_per_node, mfu, network)
    asked = read_words(words)
    chosen = next((name for name in (engine, asked.engine) if name != "auto"), None)
    _check_engine(chosen, asked)
    facts: dict[str, Any] = {"recipe": asked.recipe, "gpu": gpu}
    if asked.is_distillation:
        if sweep_to is not None:
            raise ArgumentError("--sweep draws no distillations; plan them for one number of --gpus after the other.")
        both = plan_distillation.plan_both(asked, machine, chosen)
        facts |= plan_distillation.facts_of(both)
        _add_totals(facts["run"], both.wanted, images, price, budget)
        tables = plan_distillation.tables(facts, both)
    else:
        workload = workload_of(asked.args, asked.micro_batch)
        planned = plan_run(workload, machine, chosen)
        facts |= facts_of(planned)
        _add_totals(facts["run"], planned, images, price, budget)
        tables = [verdict_table(facts, planned), memory_table(facts, planned), run_table(facts, planned)]
        if sweep_to is not None:
            facts["sweep"] = _sweep(sweep_to, facts, planned, chosen)
            tables.append(sweep_table(facts["sweep"]))
    if as_json:
        print(json.dumps(facts, indent=2))
    else:
        console = Console()
        for table in tables:
            console.print(table)
        if sweep_to is not None:
            print(f"The sweep is in {sweep_to}")


def _check_engine(engine: str | None, asked: Asked) -> None:
    """What a training run refuses, too."""
    if engine == "zero3" and asked.args.gradient_checkpointing == "selective":
        raise ArgumentError("gradient_checkpointing selective does not go with engine zero3; use full, or fsdp2.")
    if engine == "zero3" and asked.args.torch_compile:
        raise ArgumentError("torch_compile does not go with engine zero3; set torch_compile: false, or engine: fsdp2.")


def _add_totals(
    run: dict[str, Any], costs: RunCosts, images: float | None, price: float | None, budget: float | None
) -> None:
    if images is not None:
        run["passes_over_the_data"] = costs.max_steps * costs.global_batch_size / images
    if price is not None:
        run["cost"] = costs.gpu_hours * price
    if budget is not None:
        run["share_of_the_run_in_budget"] = budget / costs.gpu_hours


def _sweep(path: Path, facts: dict[str, Any], planned: Plan, engine: str | None) -> list[dict[str, Any]]:
    plans = sweep(planned.workload, planned.machine, engine, SWEEP)
    if not plans:
        raise ValueError(
            f"global_batch_size {planned.global_batch_size} goes on none of 8 to 2048 GPUs; leave --sweep out."
        )
    rows = [sweep_row(each) for each in plans]
    title = f"{facts['recipe']} on {facts['gpu']}, {planned.machine.utilization:.0%} of the peak"
    draw_sweep(path, title, rows, planned)
    return rows


def _check_numbers(options: Mapping[str, float | None]) -> None:
    for name, value in options.items():
        if value is not None and not 0 < value < float("inf"):
            raise ArgumentError(f"{name} {value:g} is not positive; give a number above 0.")


def facts_of(planned: Plan) -> dict[str, Any]:
    """A plan in plain types: bytes, seconds and operations without prefixes."""
    workload, machine = planned.workload, planned.machine
    return {
        "gpus": machine.num_gpus,
        "engine": planned.engine,
        "utilization": machine.utilization,
        "fits": planned.fits,
        "limit": planned.limit,
        "model": {
            "parameters": workload.num_parameters,
            "backbone_parameters": workload.backbone.num_parameters,
            "flop_of_image": planned.model_flop_of_image,
            "flop_of_image_with_recomputation": planned.flop_of_image,
        },
        "memory": {"usable_bytes": machine.usable_memory, "peak_bytes": planned.peak_memory},
        "resolutions": [resolution_facts(planned, index) for index in range(len(planned.resolutions))],
        "run": {
            "steps": workload.max_steps,
            "global_batch_size": workload.global_batch_size,
            "step_seconds": planned.step_seconds,
            "images_per_second": planned.images_per_second,
            "hours": planned.hours,
            "gpu_hours": planned.gpu_hours,
            "kilowatt_hours": planned.kilowatt_hours,
        },
    }


def resolution_facts(planned: Plan, index: int) -> dict[str, Any]:
    plan = planned.resolutions[index]
    memory, state = plan.memory, plan.memory.state
    return {
        "global_crop_size": plan.resolution.global_side,
        "local_crop_size": plan.resolution.local_side,
        "gram_crop_size": plan.resolution.gram_side,
        "share_of_steps": plan.resolution.share,
        "micro_batch": plan.micro_batch,
        "forwards_of_a_step": plan.num_forwards,
        "bytes": {
            "parameters": state.parameters,
            "gradients": state.gradients,
            "optimizer": state.optimizer,
            "ema_teacher": state.teacher,
            "gram_teacher": state.gram_teacher,
            "communication_buffers": state.buffers,
            "activations": memory.activations,
            "heads": memory.heads,
            "crops": memory.crops,
            "peak": memory.peak,
        },
        "step_flop": planned.workload.global_batch_size * step_flop(planned.workload, plan.resolution).total,
        "sent_bytes": plan.sent_bytes,
        "link_bytes_per_second": planned.machine.link,
        "seconds": {
            "compute": plan.compute_seconds,
            "network": plan.network_seconds,
            "update": plan.update_seconds,
            "step": plan.seconds,
        },
    }


def sweep_row(planned: Plan) -> dict[str, Any]:
    return {
        "gpus": planned.machine.num_gpus,
        "engine": planned.engine,
        "fits": planned.fits,
        "limit": planned.limit,
        "micro_batch": planned.resolutions[0].micro_batch,
        "peak_bytes": planned.peak_memory,
        "hours": planned.hours,
        "gpu_hours": planned.gpu_hours,
    }


def draw_sweep(path: Path, title: str, rows: list[dict[str, Any]], planned: Plan) -> None:
    from dinov3_hf.viz.scaling import SCALABLE, scaling_figure

    if path.suffix not in SCALABLE:
        raise ArgumentError(f"--sweep {path} is no picture; end its name in {' or '.join(SCALABLE)}.")
    workload = planned.workload
    groups = f"\nin groups of {workload.image_group}" if workload.image_group > 1 else ""
    why_not = f"the batch has {workload.global_batch_size:,} images{groups}"
    figure = scaling_figure(title, rows, planned.machine.usable_memory, SWEEP, why_not)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def verdict_table(facts: dict[str, Any], planned: Plan) -> Table:
    machine, workload = planned.machine, planned.workload
    table = table_of(f"{facts['recipe']} on {machine.num_gpus:,} x {facts['gpu']}, {planned.engine}", "", "")
    limit = LIMITS[planned.limit]
    if planned.limit == "memory":
        parts = max((plan for plan in facts["resolutions"]), key=lambda plan: plan["bytes"]["peak"])["bytes"]
        largest = max((part for part in parts if part != "peak"), key=lambda part: parts[part])
        limit += f"; most is {largest.replace('_', ' ')}"
    table.add_row("limit", limit)
    if planned.engine != "ddp":  # which is what training takes unless it is told otherwise
        table.add_row("engine", f"train with --engine {planned.engine}")
    for plan in planned.resolutions:
        name = "micro-batch" if len(planned.resolutions) == 1 else f"micro-batch at {plan.resolution.global_side} px"
        passes = f"{plan.num_forwards} a step" if plan.num_forwards > 1 else "no accumulation"
        lack = "" if plan.memory.peak <= machine.usable_memory else ", [red]which does not fit[/red]"
        table.add_row(name, f"{plan.micro_batch} images a GPU, {passes}{lack}")
    table.add_row("global batch", f"{workload.global_batch_size:,} images, fixed by the recipe")
    return table


LIMITS = {
    "memory": "[red]memory: it does not fit[/red]",
    "network": "the network: sending takes longer than computing",
    "compute": "compute: GPUs are busy with matrix products",
}


def memory_table(facts: dict[str, Any], planned: Plan) -> Table:
    columns = [f"{plan.resolution.global_side} / {plan.resolution.local_side} px" for plan in planned.resolutions]
    table = table_of("Memory of a GPU in GB", "", *columns, right=True)
    for part in facts["resolutions"][0]["bytes"]:
        values = [resolution["bytes"][part] for resolution in facts["resolutions"]]
        if any(values):
            name = part.replace("_", " ")
            cells = [gigabytes(value) for value in values]
            table.add_row(f"[bold]{name}[/bold]" if part == "peak" else name, *cells)
    table.add_row("there is", *[gigabytes(planned.machine.usable_memory)] * len(columns))
    return table


def run_table(facts: dict[str, Any], planned: Plan) -> Table:
    machine, workload, run, model = planned.machine, planned.workload, facts["run"], facts["model"]
    again = planned.flop_of_image / planned.model_flop_of_image - 1
    compute, network, update = (
        planned.mean(seconds)
        for seconds in zip(
            *((plan.compute_seconds, plan.network_seconds, plan.update_seconds) for plan in planned.resolutions),
            strict=True,
        )
    )
    sent = planned.mean(plan.sent_bytes for plan in planned.resolutions)
    low, high = (planned.gpu_hours * machine.utilization / share for share in reversed(PUBLISHED_UTILIZATION))
    rows = {
        "parameters": f"{model['parameters'] / 1e6:,.0f} M, {workload.head_parameters / 1e6:,.0f} M of them in heads; "
        "the teacher has as many",
        "TFLOP an image": f"{planned.model_flop_of_image / 1e12:,.3g}"
        + (f", and {again:.0%} more to recompute activations" if again else ""),
        "TFLOP a step": f"{planned.flop_of_image * workload.global_batch_size / 1e12:,.0f} on all GPUs",
        "sent a step": f"{gigabytes(sent)} GB by each GPU, at {machine.link / 1e9:.3g} GB/s",
        "seconds a step": f"{run['step_seconds']:.3g} = the longer of compute {compute:.3g} and network "
        f"{network:.3g}, and update {update:.2g}",
        "images a second": f"{run['images_per_second']:,.0f} in all, "
        f"{run['images_per_second'] / machine.num_gpus:,.0f} for each GPU: data workers must keep up",
        "time": duration(run["hours"]),
        "GPU hours": f"{run['gpu_hours']:,.0f} at {machine.utilization:.0%} of the peak; the published runs reached "
        f"{PUBLISHED_UTILIZATION[0]:.0%} and {PUBLISHED_UTILIZATION[1]:.0%}: {high:,.0f} and {low:,.0f}",
        "energy": f"{run['kilowatt_hours']:,.0f} kWh, GPUs at {machine.gpu.watts:.0f} W x {POWER_USAGE_EFFECTIVENESS}",
    }
    rows |= totals(run, planned)
    table = table_of("The run", "", "")
    for name, text in rows.items():
        table.add_row(name, text)
    return table


def sweep_table(rows: list[dict[str, Any]]) -> Table:
    table = table_of("Sweep", "GPUs", "engine", "micro-batch", "GB a GPU", "time", "GPU hours", "limit", right=True)
    for row in rows:
        cells = [f"{row['gpus']:,}", row["engine"], str(row["micro_batch"]), gigabytes(row["peak_bytes"])]
        spent = [duration(row["hours"]), f"{row['gpu_hours']:,.0f}"] if row["fits"] else ["", ""]
        table.add_row(*cells, *spent, row["limit"])
    return table
