"""What checks what: kinds of case folders, and structures of plain JSON files."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import (
    augmentation,
    convnext,
    dinotxt,
    distillation,
    evaluation,
    heads,
    initialisation,
    inventory,
    losses,
    masking,
    param_groups,
    schedules,
    steps,
    vit,
)
from .compare import Comparison, NotInThePackageYet
from .io import Case, read_json


class UnknownKind(Exception):
    """A case that this runner cannot read."""


@dataclass(frozen=True)
class Check:
    """How cases of a kind are checked.

    Args:
        run: compares everything that was recorded.
        settings: the keys of the case's `config` that are honoured; any other is a miss.
        left_out: which recorded tensors are not compared, with the reason.
    """

    run: Callable[[Case, Comparison], None]
    settings: tuple[str, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)


# What was recorded is in the names of the outputs; these settings only repeat it.
LOSS_SETTINGS = ("student_temp", "teacher_temps", "sinkhorn_iterations")
RUN_SETTINGS = ("architectures", "config_overrides", "batch_size")
TEACHER_SETTINGS = ("teacher_config_overrides",)
KINDS: dict[str, Check] = {
    "vit": Check(vit.check_vit, ("constructor", "image_tags", "intermediate_n")),
    "rope_table": Check(vit.check_rope_table, ("constructor", "rope_dtype", "grid")),
    "vit_rope_augmentation": Check(vit.check_vit_with_draws, ("constructor",)),
    "vit_drop_path": Check(vit.check_vit_with_draws, ("constructor",)),
    "convnext": Check(convnext.check_convnext, ("constructor", "image_tags", "intermediate_n")),
    "prototype_head": Check(heads.check_prototype_head, ("constructor", "train_mode")),
    "dino_loss": Check(losses.check_dino_loss, LOSS_SETTINGS, losses.LEFT_OUT),
    "ibot_loss": Check(losses.check_ibot_loss, LOSS_SETTINGS, losses.LEFT_OUT),
    "koleo_loss": Check(losses.check_koleo_loss, ("topk",)),
    "gram_loss": Check(losses.check_gram_loss, ()),
    "losses_two_processes": Check(
        losses.check_losses_two_processes, ("topk", "loss_group_sizes", "world_size", "ibot_split")
    ),
    "ssl_step": Check(steps.check_ssl_step, (*RUN_SETTINGS, "schedule_values", "iteration", "also_update_gram")),
    "ssl_trajectory": Check(
        steps.check_ssl_trajectory,
        (*RUN_SETTINGS, "schedules", "num_steps", "num_batches", "gram_teacher_updates"),
    ),
    "distillation_step": Check(
        distillation.check_distillation_step, (*RUN_SETTINGS, *TEACHER_SETTINGS, "schedule_values", "iteration")
    ),
    "distillation_trajectory": Check(
        distillation.check_distillation_trajectory,
        (*RUN_SETTINGS, *TEACHER_SETTINGS, "schedules", "num_steps", "num_batches"),
    ),
    "multi_distillation_step": Check(
        distillation.check_multi_distillation_step,
        (
            *("architectures", "config_overrides", *TEACHER_SETTINGS, "student_archs"),
            *("global_batch_size", "teacher_temp", "world_size"),
        ),
    ),
    "schedules": Check(schedules.check_primitives, tuple(schedules.PRIMITIVES)),
    "collate": Check(
        masking.check_collate,
        (
            *("seed", "grid", "batch_size", "n_local", "gram", "subset_divide_by"),
            *("mask_ratio_min_max", "mask_probability", "random_circular_shift"),
        ),
    ),
    "dinotxt": Check(dinotxt.check_dinotxt, dinotxt.SETTINGS),
    "contrastive_two_processes": Check(dinotxt.check_contrastive_two_processes, ("world_size",)),
    "knn": Check(evaluation.check_knn, ("num_classes", "ks", "temperatures")),
}

KINDS_NOT_IN_THE_PACKAGE_YET = (
    "logistic_regression",
    "multi_scale",
    "segmentation_metrics",
    "depth_metrics",
    "linear_classifier",
    "seg_linear",
    "depth_linear",
    "depth_dpt",
    "features_to_depth",
    "dense_encoder_vit",
    "dense_encoder_convnext",
    "ms_deform_attn",
    "adapter_mask2former",
    "sliding_window",
    "box_reparameterisation",
    "detector",
)


@dataclass(frozen=True)
class JsonTopic:
    """A plain JSON file, recognised by its structure."""

    name: str
    matches: Callable[[Any], bool]
    run: Callable[[Any, Comparison], None] | None  # None: not in the package yet


def _has(*keys: str) -> Callable[[Any], bool]:
    return lambda content: isinstance(content, dict) and set(keys) <= set(content)


JSON_TOPICS: tuple[JsonTopic, ...] = (
    JsonTopic("schedules", schedules.is_whole_configuration, schedules.check_whole_configuration),
    JsonTopic("param_groups", param_groups.is_param_groups, param_groups.check_param_groups),
    JsonTopic("mask statistics", masking.is_mask_statistics, masking.check_mask_statistics),
    JsonTopic("initialisation", initialisation.is_initialisation, initialisation.check_initialisation),
    JsonTopic("inventory", inventory.is_inventory, inventory.check_inventory),
    JsonTopic("augmentation", _has("order_global_crop", "measured_shapes"), augmentation.check_augmentation),
    JsonTopic("text tokenizer", dinotxt.is_tokenizer, dinotxt.check_tokenizer),
    JsonTopic("parameter counts", inventory.is_summary, inventory.check_summary),
    JsonTopic("settings of the released heads", _has("dinov3_vit7b16_dd", "dinov3_vit7b16_lc"), None),
)


def check_case(path: Path, round_trip: bool = False) -> Comparison:
    """Checks one case folder or JSON file; with `round_trip` a backbone's weights go through files first.

    Raises:
        UnknownKind, NotInThePackageYet, Declined: nothing was compared.
    """
    return _check_json(path) if path.is_file() else _check_folder(Case(path, round_trip))


def _check_folder(case: Case) -> Comparison:
    if case.kind in KINDS_NOT_IN_THE_PACKAGE_YET:
        raise NotInThePackageYet(case.kind)
    if case.kind not in KINDS:
        raise UnknownKind(case.kind)
    check = KINDS[case.kind]
    tolerance = case.spec["tolerance"]
    compare = Comparison(case.outputs, tolerance["rtol"], tolerance["atol"], check.left_out)
    check.run(case, compare)
    compare.finish()
    # An option that is off (false, null, 0, none) is one that the case does not have.
    unknown = [name for name, value in case.config.items() if value and name not in check.settings]
    compare.misses += [f"config: this program does not know {name}" for name in unknown]
    return compare


def _check_json(path: Path) -> Comparison:
    content = read_json(path)
    topic = next((topic for topic in JSON_TOPICS if topic.matches(content)), None)
    if topic is None:
        raise UnknownKind(f"JSON file with {', '.join(list(content)[:5])}")
    if topic.run is None:
        raise NotInThePackageYet(topic.name)
    compare = Comparison({}, 0.0, 0.0)
    topic.run(content, compare)
    if not compare.errors and not compare.misses:
        raise NotInThePackageYet(topic.name)
    return compare
