"""The later stages of training, as changes to the recipe of the run that they start from.

The published stages belong to a 7B model whose rates are constant. For a run of any other recipe they are read as
ratios to what went before; applied to the published recipe of stage 1, these functions return the published stages 2
and 3, number by number.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dinov3_hf.errors import ArgumentError
from dinov3_hf.models.dinov3_pretraining.backbones import patch_side
from dinov3_hf.recipes.pages import read_recipe
from dinov3_hf.training.checkpoints import checkpoints
from dinov3_hf.training.resume import RECIPE
from dinov3_hf.training.schedules import Schedule
from dinov3_hf.training.ssl_config import SSLConfig
from dinov3_hf.training.starting_point import run_folder

Recipe = dict[str, Any]
# Of one run and not of the next.
_OF_ONE_RUN = ("output_dir", "run_name", "push_to_hub", "hub_model_id", "learning_rate")
# Global, local and Gram crops as multiples of stage 1's global, local and global ones (256, 112, 256), and how often.
_CROP_SIZES = (
    (2, 1, 3, 0.3),
    (3, 1, 4.5, 0.3),
    (3, 1.5, 4.5, 0.3),
    (3, 2, 4.5, 0.05),
    (3, 3, 4.5, 0.05),
)


def gram_anchoring(recipe: Mapping[str, Any], start_from: str) -> Recipe:
    """
    Stage 2: the run goes on, and a Gram teacher keeps its patch similarities (DINOv3, section 4).

    Args:
        recipe: of the run, fields as a YAML page has them.
        start_from: the run, or one of its checkpoints.
    """
    run = SSLConfig.result_fields(recipe)
    return {
        **_carried_over(recipe),
        "output_dir": _beside(start_from, "gram"),
        "start_from": start_from,
        "start_with": "state",
        "gram_teacher": "copy",
        "gram_start_step": 0,
        # Published: this one and that of the local crops turn over one epoch, 1k of 200k steps.
        "gram_weight_schedule": {"start": 0.0, "peak": 0.0, "end": 2.0, "cosine_steps": 0.005},
        "gram_crop_size": 2 * run["global_crop_size"],
        # Published: three refreshes, after 10k, 20k and 30k of 200k steps.
        "gram_refresh_steps": 0.05,
        "gram_first_refresh_step": 0.05,
        "gram_max_refreshes": 3,
        "local_loss_weight_schedule": {"start": 1.0, "peak": 1.0, "end": 0.5, "cosine_steps": 0.005},
        "max_steps": max(run["max_steps"] // 5, 1),
        "lr_schedule": _gram_rate(Schedule.parse(run["lr_schedule"])),
        "teacher_momentum_schedule": _gram_momentum(Schedule.parse(run["teacher_momentum_schedule"])),
        **_settled(run),
    }


def high_resolution(recipe: Mapping[str, Any], start_from: str) -> Recipe:
    """
    Stage 3: the teacher of a run learns to see larger images; its own start is the Gram teacher.

    Args:
        recipe: of the run, fields as a YAML page has them.
        start_from: the run, one of its checkpoints, or its teacher.
    """
    run = SSLConfig.result_fields(recipe)
    # Published: 30k steps at 1.25e-5, after 1M at 5e-5 and 200k at 3e-5. The run is stage 2 if it was started itself.
    share, rate = (0.15, 5 / 12) if run["start_from"] else (0.03, 0.25)
    momentum = run["teacher_momentum_schedule"]
    return {
        **_carried_over(recipe),
        "output_dir": _beside(start_from, "highres"),
        "start_from": start_from,
        "start_with": "teacher",
        "gram_teacher": "copy",
        "gram_start_step": 0,
        "gram_weight_schedule": 1.5,
        "gram_crop_size": None,  # each of the crop sizes has its own
        "gram_refresh_steps": None,
        "gram_first_refresh_step": 0,
        "gram_max_refreshes": None,
        "crop_sizes": _crop_sizes(run, recipe),
        "local_loss_weight_schedule": 0.5,
        "global_batch_size": _half_batch(run["global_batch_size"], run["koleo_group_size"]),
        "max_steps": max(round(run["max_steps"] * share), 1),
        "lr_schedule": {
            "start": 0.0,
            "peak": 0.0,
            "end": _rounded(rate * _highest(Schedule.parse(run["lr_schedule"]))),
            "cosine_steps": 1 / 3,
        },
        "teacher_momentum_schedule": momentum if run["start_from"] else _gram_momentum(Schedule.parse(momentum)),
        **_settled(run),
        "gradient_checkpointing": True,  # published; crops have four to nine times the patches
    }


def from_run(stage: Callable[[Mapping[str, Any], str], Recipe]) -> Callable[[Mapping[str, str]], tuple[str, Recipe]]:
    """
    The recipe of a stage for a command line that names none, as `parse_arguments` asks for it: that of the run that
    `start_from` names, with the changes of `stage`.
    """

    def recipe_of(words: Mapping[str, str]) -> tuple[str, Recipe]:
        start_from = words.get("start_from")
        if start_from is None:
            raise ArgumentError("there is nothing to start from; name an earlier run, for example --from runs/a.")
        page = _page_of_run(Path(start_from))
        return f"of the run ({page})", stage(read_recipe(str(page)), start_from)

    return recipe_of


def _page_of_run(source: Path) -> Path:
    if not source.is_dir():
        raise FileNotFoundError(
            f"start_from {source}: there is no such folder; name the output folder of a run, or to go on with a stage "
            f"whose run is gone, put the {RECIPE} of its own checkpoint-N before --from."
        )
    folder = source.parent if source.name == "teacher" else source
    for candidate in (folder, *reversed(checkpoints(folder))):
        if (candidate / RECIPE).is_file():
            return candidate / RECIPE
    raise FileNotFoundError(
        f"{source} has no checkpoint-N with the {RECIPE} of a run; name a run or one of its checkpoints, or put the "
        "recipe of the stage before --from."
    )


def _carried_over(recipe: Mapping[str, Any]) -> Recipe:
    return {name: value for name, value in recipe.items() if name not in _OF_ONE_RUN}


def _settled(run: Mapping[str, Any]) -> Recipe:
    """What has come to its end in stage 1 and stays there."""
    return {
        **{name: Schedule.parse(run[name]).end for name in ("weight_decay_schedule", "teacher_temperature_schedule")},
        "freeze_last_layer_steps": 0,
    }


def _gram_rate(lr: Schedule) -> Any:
    """
    0.6 of the peak of stage 1, as published, where the rate of stage 1 stays at its peak.

    A rate that has fallen to nearly nothing has settled the network, and a constant one would stir it up for good.
    There it rises to 0.6 of the peak once more, over a tenth of the stage, and falls again to where it ended.
    """
    peak = _rounded(0.6 * _highest(lr))
    if lr.end == _highest(lr):
        return peak
    return {"style": lr.style, "start": 0.0, "peak": peak, "end": lr.end, "warmup_steps": 0.1}


def _highest(lr: Schedule) -> float:
    return max(lr.peak, lr.end)  # in the high-resolution stage it rises to its end


def _gram_momentum(momentum: Schedule) -> float:
    """
    A teacher that is six times as slow as stage 1 began with: published, 0.999 after 0.994.

    A momentum that has risen to 1 would leave the teacher as it is.
    """
    return round(1 - (1 - momentum.peak) / 6, 4)


def _half_batch(batch_size: int, koleo_group_size: int | None) -> int:
    """Published: half of the images, whose crops are many times larger; KoLeo's groups must still tile them."""
    half = batch_size // 2
    return half if koleo_group_size is None or (half and half % koleo_group_size == 0) else batch_size


def _crop_sizes(run: Mapping[str, Any], recipe: Mapping[str, Any]) -> list[Recipe]:
    backbone = SSLConfig.backbone_of({"backbone": {}, **recipe, "global_crop_size": run["global_crop_size"]})
    side = patch_side(backbone)

    def pixels(size: int, factor: float) -> int:
        return max(int(size * factor / side), 1) * side  # what a backbone sees of 168 px in patches of 16 is 160

    return [
        {
            "global": pixels(run["global_crop_size"], global_factor),
            "local": pixels(run["local_crop_size"], local_factor),
            "gram": pixels(run["global_crop_size"], gram_factor),
            "probability": probability,
        }
        for global_factor, local_factor, gram_factor, probability in _CROP_SIZES
    ]


def _beside(start_from: str, suffix: str) -> str:
    run = run_folder(Path(start_from))
    folder = run.with_name(f"{run.name}-{suffix}")
    return str(folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder)


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")  # 3e-5, not 3.0000000000000004e-05
