"""Native settings of a training step -> our model configuration and schedules."""

from collections.abc import Mapping
from typing import Any

from dinov3_hf.models.dinov3_pretraining.configuration_dinov3_distillation import DINOv3DistillationConfig
from dinov3_hf.models.dinov3_pretraining.configuration_dinov3_pretraining import DINOv3PreTrainingConfig
from dinov3_hf.training.schedules import Schedule, TrainingSchedules

from .compare import Declined, refuse_unknown
from .io import Case
from .native import RecordedDraws, vit_config
from .schedules import DEFAULT_OPTIM, DEFAULT_TEACHER, new_style_schedules, old_style_schedules, schedule

# Native constructor argument -> setting of the student that it is taken from.
BACKBONE_ARGUMENTS = {
    "layerscale_init": "layerscale",
    **{
        name: name
        for name in (
            *("patch_size", "drop_path_rate", "ffn_layer", "norm_layer", "qkv_bias", "proj_bias", "ffn_bias"),
            *("n_storage_tokens", "mask_k_bias", "untie_cls_and_patch_norms", "untie_global_and_local_cls_norm"),
            *("pos_embed_rope_base", "pos_embed_rope_min_period", "pos_embed_rope_max_period"),
            *("pos_embed_rope_normalize_coords", "pos_embed_rope_shift_coords", "pos_embed_rope_jitter_coords"),
            "pos_embed_rope_rescale_coords",
        )
    },
}
# The values that training takes for granted; others are declined.
FIXED: dict[str, dict[str, Any]] = {
    "student": {"pos_embed_type": "rope", "fp8_enabled": False},
    "dino": {"force_weight_norm": False},
    "ibot": {"separate_head": True},
    "optim": {"optimizer": "adamw"},
    "train": {"centering": "sinkhorn_knopp", "use_teacher_head": True, "learn_from_teacher_tokens": False},
    "crops": {"teacher_to_student_resolution_scale": 1.0},
}
# The same, but of a setting that counts only with dino.koleo_loss_distributed.
FIXED_KOLEO = {"koleo_distributed_replicas": 0, "koleo_distributed_loss_group_data": True}
# The same, but only with gram.use_loss; refreshes are those that a case states.
FIXED_GRAM = {
    "global_teacher_resize_method": "bicubic",
    "it_load_ema_teacher": -1,
    "rep_update": True,
    "update_frequency": 50000,
    "it_first_update": 0,
    "max_updates": None,
}
HEAD = ("head_n_prototypes", "head_bottleneck_dim", "head_hidden_dim", "head_nlayers")
# Settings that a case may override. The last row of a section holds those without a say in a recorded step: ignored by
# the original, about speed, about how the batch was made, or about where recorded weights came from.
HONOURED: dict[str, tuple[str, ...]] = {
    "student": (
        *("arch", *BACKBONE_ARGUMENTS.values(), *FIXED["student"]),
        *("ffn_ratio", "in_chans", "pos_embed_rope_dtype"),  # taken from the architecture
        *("pretrained_weights", "resume_from_teacher_chkpt", "fp8_filter"),
    ),
    "dino": (
        *("loss_weight", "global_ignore_diagonal", *HEAD, "koleo_loss_weight", "koleo_loss_distributed", "koleo_topk"),
        *("koleo_distributed_loss_group_size", "reweight_dino_local_loss", "local_loss_weight_schedule"),
        *(*FIXED["dino"], *FIXED_KOLEO, "head_norm_last_layer"),
    ),
    "ibot": (
        *("loss_weight", *HEAD, *FIXED["ibot"]),
        *("mask_sample_probability", "mask_ratio_min_max", "mask_random_circular_shift", "head_norm_last_layer"),
        "force_masking_even_with_zero_weight",
    ),
    "optim": (
        *("adamw_beta1", "adamw_beta2", "clip_grad", "layerwise_decay", "patch_embed_lr_mult", "scaling_rule"),
        *(*DEFAULT_OPTIM, "epochs", *FIXED["optim"]),
        *("dino_head_wd_multiplier", "multi_tensor_optim", "dump_fsdp_weights_path"),
    ),
    "teacher": tuple(DEFAULT_TEACHER),
    "train": (
        *("OFFICIAL_EPOCH_LENGTH", "batch_size_per_gpu", *FIXED["train"]),
        *("seed", "num_workers", "monitor_gradient_norm", "compile", "cudagraphs", "checkpointing"),
        *("checkpointing_full", "dataset_path", "data_config", "cache_dataset", "output_dir", "saveckp_freq"),
        "sharded_eval_checkpoint",
    ),
    "crops": (
        *("global_crops_size", "global_crops_scale", "local_crops_size", "local_crops_scale", "local_crops_number"),
        *("gram_teacher_crops_size", "horizontal_flips", "rgb_mean", "rgb_std", *FIXED["crops"]),
        *("localcrops_subset_of_globalcrops", "share_color_jitter", "gram_teacher_no_distortions"),
    ),
    "gram": (
        *("use_loss", "loss_weight", "loss_weight_schedule", "ema_teacher", "normalized", "img_level", "remove_neg"),
        *("remove_only_teacher_neg", "tokens_used", "global_teacher_resize_antialias", "compute_stats", *FIXED_GRAM),
        "ckpt",
    ),
    "distillation": ("enabled", "full_cfg_path", "checkpoint_path"),  # the teacher's settings are in the case
    "compute_precision": ("param_dtype",),  # the recorded steps are in float32 throughout
}
# Settings of the student that draw random numbers in a training step.
RANDOM = ("pos_embed_rope_shift_coords", "pos_embed_rope_jitter_coords", "pos_embed_rope_rescale_coords")


def model_config(case: Case) -> DINOv3PreTrainingConfig:
    """Our configuration for native settings.

    Raises:
        Declined: a setting that the package does not have.
        Unknown: an override of a setting that this program does not know.
    """
    settings = case.spec["resolved_config"]
    _check_settings(case, "config_overrides", settings)
    if case.config["config_overrides"].get("distillation", {}).get("enabled"):
        raise Declined("distillation in a case of pre-training")
    return DINOv3PreTrainingConfig(**_objective(case, settings, case.config["batch_size"]), **_gram(settings["gram"]))


def distillation_config(case: Case, arch: str, batch_size: int) -> DINOv3DistillationConfig:
    """Our configuration of a student of distillation of the architecture `arch`; as `model_config`."""
    settings = case.spec["resolved_config"]
    _check_settings(case, "config_overrides", settings)
    if not case.config["config_overrides"]["distillation"]["enabled"]:
        raise Declined("a case of distillation without it (distillation.enabled)")
    if settings["gram"]["use_loss"]:
        raise Declined("L_Gram in distillation (gram.use_loss)")
    settings = settings | {"student": settings["student"] | {"arch": arch}}
    return DINOv3DistillationConfig(
        **_objective(case, settings, batch_size), patch_size=settings["student"]["patch_size"]
    )


def teacher_config(case: Case) -> DINOv3PreTrainingConfig:
    """Backbone and heads of the fixed teacher of a distillation; as `model_config`."""
    settings = case.spec["resolved_teacher_config"]
    _check_settings(case, "teacher_config_overrides", settings)
    return DINOv3PreTrainingConfig(**_objective(case, settings, batch_size=None))


def _check_settings(case: Case, overrides: str, settings: Mapping[str, Any]) -> None:
    for section, values in FIXED.items():
        _decline_others(section, settings[section], values)
    if settings["dino"]["koleo_loss_distributed"]:
        _decline_others("dino", settings["dino"], FIXED_KOLEO)
    for section, names in case.config[overrides].items():
        refuse_unknown(f"{overrides}.{section}", names, HONOURED.get(section, ()))


def _objective(case: Case, settings: Mapping[str, Any], batch_size: int | None) -> dict[str, Any]:
    """Backbone, heads and weights; `batch_size` images are those of a process."""
    dino, ibot, student = settings["dino"], settings["ibot"], settings["student"]
    draws_numbers = student["drop_path_rate"] > 0 or any(student[name] for name in RANDOM)
    if draws_numbers and not RecordedDraws(case.inputs):
        raise Declined("a random step (stochastic depth or RoPE augmentation) whose draws were not recorded")
    backbone = {argument: student[setting] for argument, setting in BACKBONE_ARGUMENTS.items()}
    koleo: dict[str, Any] = {"koleo_group_size": batch_size, "koleo_topk": 1}
    if dino["koleo_loss_distributed"]:
        koleo = {"koleo_group_size": dino["koleo_distributed_loss_group_size"], "koleo_topk": dino["koleo_topk"]}
    return {
        "backbone_config": vit_config(backbone | case.config["architectures"][student["arch"]]),
        "dino_head": _head(dino),
        "ibot_head": _head(ibot),
        "dino_weight": dino["loss_weight"],
        "dino_global_ignore_diagonal": dino["global_ignore_diagonal"],
        "ibot_weight": ibot["loss_weight"],
        "koleo_weight": dino["koleo_loss_weight"],
        **koleo,
    }


def _gram(gram: Mapping[str, Any]) -> dict[str, Any]:
    if not gram["use_loss"]:
        return {}
    _decline_others("gram", gram, FIXED_GRAM)
    negatives = "remove" if gram["remove_neg"] else "remove_teacher" if gram["remove_only_teacher_neg"] else "keep"
    return {
        "gram_teacher": "ema" if gram["ema_teacher"] else "separate",
        "gram_normalize": gram["normalized"],
        "gram_per_image": gram["img_level"],
        "gram_negatives": negatives,
        "gram_tokens": gram["tokens_used"],
        "gram_antialias": gram["global_teacher_resize_antialias"],
    }


def _decline_others(section: str, settings: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    for name, value in fixed.items():
        if settings[name] != value:
            raise Declined(f"{section}.{name}: {settings[name]}")


def _head(section: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "num_prototypes": section["head_n_prototypes"],
        "bottleneck_dim": section["head_bottleneck_dim"],
        "hidden_dim": section["head_hidden_dim"],
        "num_layers": section["head_nlayers"],
    }


def max_steps_of(settings: Mapping[str, Any]) -> int:
    return settings["optim"]["epochs"] * settings["train"]["OFFICIAL_EPOCH_LENGTH"]


def weight_schedules(settings: Mapping[str, Any]) -> dict[str, Schedule]:
    """Schedules of the weights of loss terms, under our names."""
    dino, gram, epoch_length = settings["dino"], settings["gram"], settings["train"]["OFFICIAL_EPOCH_LENGTH"]
    weights = {"local_loss_weight": Schedule.constant(1.0)}
    if dino["reweight_dino_local_loss"]:
        weights["local_loss_weight"] = schedule(dino["local_loss_weight_schedule"], epoch_length)
    if gram["use_loss"]:
        section = gram["loss_weight_schedule"]
        weights["gram_weight"] = schedule(section, epoch_length) if section else Schedule.constant(gram["loss_weight"])
    return weights


def schedules_of(case: Case) -> TrainingSchedules:
    """Our schedules for the settings of a trajectory."""
    settings = case.spec["resolved_config"]
    global_batch_size = settings["train"]["batch_size_per_gpu"]  # one process
    epoch_length, max_steps = settings["train"]["OFFICIAL_EPOCH_LENGTH"], max_steps_of(settings)
    weights = weight_schedules(settings)
    if case.config.get("schedules"):
        rule = settings["optim"]["scaling_rule"]
        return new_style_schedules(
            case.config["schedules"], rule, global_batch_size, epoch_length, max_steps, **weights
        )
    optim = DEFAULT_OPTIM | settings["optim"]
    teacher = DEFAULT_TEACHER | settings.get("teacher", {}) | case.config["config_overrides"].get("teacher", {})
    return old_style_schedules(optim, teacher, global_batch_size, epoch_length, max_steps, **weights)
