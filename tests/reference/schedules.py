"""Kind schedules (the primitives), and JSON files with the schedules of a whole configuration."""

from collections.abc import Callable
from typing import Any, get_args

import torch

from dinov3_hf.training.schedules import (
    LRScaling,
    Schedule,
    TrainingSchedules,
    lr_scale_factor,
    warmup_cosine,
    warmup_cosine_dinov2,
)

from .compare import Comparison, Declined, refuse_unknown
from .io import Case

# Of whole configurations, which state no tolerance: that of the primitives.
RTOL, ATOL = 1e-9, 1e-12

# Primitives of the original: our function, the names of its arguments, and defaults that ours has not.
PRIMITIVES: dict[str, tuple[Callable[..., float], dict[str, str], dict[str, float]]] = {
    "linear_warmup_cosine_decay": (
        warmup_cosine,
        {
            "start": "start",
            "peak": "peak",
            "end": "end",
            "warmup_iterations": "warmup_steps",
            "total_iterations": "max_steps",
            "cosine_iterations": "cosine_steps",
        },
        {},
    ),
    "cosine_scheduler": (
        warmup_cosine_dinov2,
        {
            "start_warmup_value": "start",
            "base_value": "peak",
            "final_value": "end",
            "warmup_iters": "warmup_steps",
            "total_iters": "max_steps",
            "freeze_iters": "freeze_steps",
            "trunc_extra": "truncation",
        },
        {"start": 0.0, "warmup_steps": 0},
    ),
}

# Settings of the original's default configuration, for files in which a section is not repeated.
DEFAULT_OPTIM = {
    "lr": 1e-3,
    "min_lr": 1e-6,
    "warmup_epochs": 10,
    "weight_decay": 0.04,
    "weight_decay_end": 0.4,
    "freeze_last_layer_epochs": 1,
    "schedule_trunc_extra": 0.0,
    "scaling_rule": "sqrt_wrt_1024",
}
DEFAULT_TEACHER = {
    "momentum_teacher": 0.992,
    "final_momentum_teacher": 1.0,
    "warmup_teacher_temp": 0.04,
    "teacher_temp": 0.07,
    "warmup_teacher_temp_epochs": 30,
}
# What is not a curve in the file of a whole configuration.
SETTINGS = (
    *("config_file", "world_size", "batch_size_per_gpu", "iterations_per_epoch", "epochs", "total_iterations"),
    *("scaling_rule", "uses_schedules_section", "schedules_section", "optim", "teacher", "iterations"),
    *("dino_local_loss_weight_section", "gram_loss_weight_section"),
    *("clip_grad", "layerwise_decay", "adamw_betas"),  # not scheduled
)
SECTION_SETTINGS = ("start", "peak", "end", "warmup_epochs", "cosine_epochs", "freeze_last_layer_epochs")
# Names of the recorded curves that differ from ours.
NATIVE_NAMES = {
    "teacher_momentum": "momentum",
    "teacher_temperature": "teacher_temp",
    "local_loss_weight": "dino_local_loss_weight",
    "gram_weight": "gram_loss_weight",
}


def check_primitives(case: Case, compare: Comparison) -> None:
    """Every point of every curve; old-style curves are recorded beyond their end."""
    for primitive, (function, names, defaults) in PRIMITIVES.items():
        for index, arguments in enumerate(case.config.get(primitive, [])):
            refuse_unknown(primitive, arguments, names)
            ours = defaults | {names[name]: value for name, value in arguments.items()}
            curve = f"{primitive}/{index}"
            values = [function(step, **ours) for step in range(len(case.outputs[curve]))]
            compare.check(curve, torch.tensor(values, dtype=torch.float64))


def is_whole_configuration(content: Any) -> bool:
    """Whether a JSON file holds curves sampled at listed iterations."""
    return isinstance(content, dict) and {"iterations", "total_iterations", "lr", "weight_decay"} <= set(content)


def check_whole_configuration(content: dict[str, Any], compare: Comparison) -> None:
    """Every curve at every sampled iteration, from the settings of the same file."""
    epoch_length, max_steps = content["iterations_per_epoch"], content["total_iterations"]
    global_batch_size = content["world_size"] * content["batch_size_per_gpu"]
    optim = DEFAULT_OPTIM | {"scaling_rule": content["scaling_rule"]} | content.get("optim", {})
    sections = {
        "local_loss_weight": content.get("dino_local_loss_weight_section"),
        "gram_weight": content.get("gram_loss_weight_section"),
    }
    weights = {name: schedule(section, epoch_length) for name, section in sections.items() if section}
    arguments = (global_batch_size, epoch_length, max_steps)
    if content.get("schedules_section"):
        schedules = new_style_schedules(content["schedules_section"], optim["scaling_rule"], *arguments, **weights)
    else:
        schedules = old_style_schedules(optim, DEFAULT_TEACHER | content.get("teacher", {}), *arguments, **weights)

    values = [schedules.at(step) for step in content["iterations"]]
    curves = {NATIVE_NAMES.get(name, name): [value[name] for value in values] for name in values[0]}
    for name, recorded in content.items():
        if name in SETTINGS:
            continue
        if name not in curves:
            compare.misses.append(f"{name}: not compared")
            continue
        ours, expected = (torch.tensor(curve, dtype=torch.float64) for curve in (curves[name], recorded))
        compare.check_pair(name, ours, expected, RTOL, ATOL)


def new_style_schedules(
    section: dict[str, Any],
    scaling_rule: str,
    global_batch_size: int,
    epoch_length: int,
    max_steps: int,
    **weights: Schedule,
) -> TrainingSchedules:
    """Our schedules for a native `schedules` section, whose durations are epochs of `epoch_length` steps.

    Args:
        weights: schedules of the weights of loss terms, under the names of `TrainingSchedules`.
    """
    lr = schedule(section["lr"], epoch_length)
    return TrainingSchedules(
        max_steps=max_steps,
        lr=lr.scaled(_scale_factor(scaling_rule, global_batch_size)),
        weight_decay=schedule(section["weight_decay"], epoch_length),
        teacher_momentum=schedule(section["momentum"], epoch_length),
        teacher_temperature=schedule(section["teacher_temp"], epoch_length),
        freeze_last_layer_steps=int(section["lr"].get("freeze_last_layer_epochs", 0) * epoch_length),
        **({"local_loss_weight": Schedule.constant(1.0)} | weights),
    )


def old_style_schedules(
    optim: dict[str, Any],
    teacher: dict[str, Any],
    global_batch_size: int,
    epoch_length: int,
    max_steps: int,
    **weights: Schedule,
) -> TrainingSchedules:
    """Our schedules for native settings without a `schedules` section; `weights` as above."""
    truncation = optim["schedule_trunc_extra"]
    cosine = {"style": "dinov2", "truncation": truncation}
    lr = Schedule(0.0, optim["lr"], optim["min_lr"], int(optim["warmup_epochs"] * epoch_length), **cosine)
    weight_decay, momentum = optim["weight_decay"], teacher["momentum_teacher"]
    temperature = teacher["teacher_temp"]
    return TrainingSchedules(
        max_steps=max_steps,
        lr=lr.scaled(_scale_factor(optim["scaling_rule"], global_batch_size)),
        weight_decay=Schedule(weight_decay, weight_decay, optim["weight_decay_end"], **cosine),
        teacher_momentum=Schedule(momentum, momentum, teacher["final_momentum_teacher"], **cosine),
        teacher_temperature=Schedule(
            teacher["warmup_teacher_temp"],
            temperature,
            temperature,
            int(teacher["warmup_teacher_temp_epochs"] * epoch_length),
            style="dinov2",
        ),
        freeze_last_layer_steps=int(optim["freeze_last_layer_epochs"] * epoch_length),
        **({"local_loss_weight": Schedule.constant(1.0)} | weights),
    )


def schedule(section: dict[str, Any], epoch_length: int) -> Schedule:
    """Our schedule for a native one, whose durations are epochs of `epoch_length` steps."""
    refuse_unknown("schedule", section, SECTION_SETTINGS)
    cosine_epochs = section.get("cosine_epochs")
    return Schedule(
        start=section["start"],
        peak=section["peak"],
        end=section["end"],
        warmup_steps=int(section["warmup_epochs"] * epoch_length),
        cosine_steps=None if cosine_epochs is None else int(cosine_epochs * epoch_length),
    )


def _scale_factor(rule: str, global_batch_size: int) -> float:
    if rule not in get_args(LRScaling):
        raise Declined(f"learning-rate scaling {rule} (optim.scaling_rule)")
    return lr_scale_factor(rule, global_batch_size)
