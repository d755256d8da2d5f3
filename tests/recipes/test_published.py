"""The recipes of the package against the published numbers, which stand here a second time, typed by hand.

What a recipe marks as published must be the published number, what it marks otherwise must say why, and what it leaves
out must be the published number by default.
"""

import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dinov3_hf.models.dinov3_pretraining.modeling_dinov3_pretraining import DINOv3ForPreTraining
from dinov3_hf.recipes.pages import read_recipe, recipe_names
from dinov3_hf.training.arguments import parse_arguments
from dinov3_hf.training.ssl_config import SSLConfig
from dinov3_hf.yaml_text import parse_yaml
from tests.recipes.distilled import DISTILLED, parse_distilled
from tests.testing_utils import FIXTURES

# Half of the global crops are masked, crops, colours and the optimizer's epsilon are the same in all published runs.
SHARED = {
    "dino_head.num_layers": 3,
    "ibot_head.num_layers": 3,
    "dino_weight": 1.0,
    "ibot_weight": 1.0,
    "koleo_weight": 0.1,
    "koleo_topk": 1,
    "dino_global_ignore_diagonal": True,
    "student_temperature": 0.1,
    "sinkhorn_iterations": 3,
    "mask_probability": 0.5,
    "mask_ratio": [0.1, 0.5],
    "mask_circular_shift": False,
    "num_local_crops": 8,
    "global_crop_scale": [0.32, 1.0],
    "local_crop_scale": [0.05, 0.32],
    "color_jitter": [0.4, 0.4, 0.2, 0.1],
    "color_jitter_probability": 0.8,
    "greyscale_probability": 0.2,
    "blur_probabilities": [0.0, 0.9, 0.5],
    "solarize_probability": 0.2,
    "lr_scaling": "sqrt_wrt_1024",
    "patch_embed_lr_mult": 0.2,
    "adam_beta1": 0.9,
    "adam_epsilon": 1e-8,
    "lr_schedule.start": 0.0,
    "teacher_temperature_schedule.start": 0.04,
    "teacher_temperature_schedule.peak": 0.07,
    "teacher_temperature_schedule.end": 0.07,
    "local_loss_weight_schedule.peak": 1.0,
    "local_loss_weight_schedule.end": 1.0,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "backbone.patch_size": 16,
    "backbone.layerscale_value": 1e-5,
}
VITL16_IM1K = SHARED | {
    "backbone.hidden_size": 1024,
    "backbone.num_hidden_layers": 24,
    "backbone.num_attention_heads": 16,
    "backbone.intermediate_size": 4 * 1024,
    "backbone.use_gated_mlp": False,
    "backbone.num_register_tokens": 0,
    "backbone.layer_norm_eps": 1e-6,
    "backbone.query_bias": True,
    "backbone.key_bias": True,
    "backbone.value_bias": True,
    "backbone.untie_global_and_local_cls_norm": False,
    "backbone.pos_embed_rescale": None,
    "backbone.drop_path_rate": 0.3,
    "dino_head.num_prototypes": 65536,
    "dino_head.bottleneck_dim": 256,
    "dino_head.hidden_dim": 2048,
    "ibot_head.num_prototypes": 65536,
    "ibot_head.bottleneck_dim": 256,
    "ibot_head.hidden_dim": 2048,
    "drop_path_group_size": 64,
    "koleo_group_size": 64,
    "global_crop_size": 224,
    "local_crop_size": 96,
    "horizontal_flip": True,
    "global_batch_size": 64 * 32,
    "max_steps": 100 * 1250,
    "lr_schedule.peak": 1e-3,
    "lr_schedule.end": 1e-6,
    "lr_schedule.warmup_steps": 10 * 1250,
    "freeze_last_layer_steps": 1 * 1250,
    "layerwise_lr_decay": 0.9,
    "weight_decay_schedule.peak": 0.04,
    "weight_decay_schedule.end": 0.4,
    "teacher_momentum_schedule.peak": 0.992,
    "teacher_momentum_schedule.end": 1.0,
    "teacher_temperature_schedule.warmup_steps": 30 * 1250,
    "max_grad_norm": 3.0,
    "adam_beta2": 0.999,
}
VIT7B16_PRETRAIN = SHARED | {
    "backbone.hidden_size": 4096,
    "backbone.num_hidden_layers": 40,
    "backbone.num_attention_heads": 32,
    "backbone.intermediate_size": 8192,  # 3 x width x 2/3, a multiple of 64
    "backbone.use_gated_mlp": True,
    "backbone.hidden_act": "silu",
    "backbone.num_register_tokens": 4,
    "backbone.layer_norm_eps": 1e-5,
    "backbone.query_bias": False,
    "backbone.key_bias": False,
    "backbone.value_bias": False,
    "backbone.untie_global_and_local_cls_norm": True,
    "backbone.pos_embed_rescale": 2.0,
    "backbone.drop_path_rate": 0.4,
    "dino_head.num_prototypes": 262144,
    "dino_head.bottleneck_dim": 512,
    "dino_head.hidden_dim": 8192,
    "ibot_head.num_prototypes": 98304,
    "ibot_head.bottleneck_dim": 384,
    "ibot_head.hidden_dim": 4096,
    "drop_path_group_size": 16,
    "koleo_group_size": 16,
    "global_crop_size": 256,
    "local_crop_size": 112,
    "horizontal_flip": False,
    "global_batch_size": 16 * 256,
    "max_steps": 1000 * 1000,
    "lr_schedule.peak": 5e-5,
    "lr_schedule.end": 5e-5,
    "lr_schedule.warmup_steps": 100 * 1000,
    "freeze_last_layer_steps": 5 * 1000,
    "layerwise_lr_decay": 0.98,
    "weight_decay_schedule.peak": 0.04,
    "weight_decay_schedule.end": 0.04,
    "teacher_momentum_schedule.peak": 0.994,
    "teacher_momentum_schedule.end": 0.994,
    "teacher_temperature_schedule.warmup_steps": 100 * 1000,
    "max_grad_norm": 30.0,
    "adam_beta2": 0.99,
}
# Steps are counted from the start of the stage, which is step 1,000,000 of the published run.
VIT7B16_GRAM_ANCHOR = VIT7B16_PRETRAIN | {
    "start_with": "state",
    "max_steps": 200 * 1000,
    "lr_schedule.start": 3e-5,
    "lr_schedule.peak": 3e-5,
    "lr_schedule.end": 3e-5,
    "lr_schedule.warmup_steps": 0,
    "freeze_last_layer_steps": 0,
    "teacher_momentum_schedule.peak": 0.999,
    "teacher_momentum_schedule.end": 0.999,
    "teacher_temperature_schedule.start": 0.07,
    "teacher_temperature_schedule.warmup_steps": 0,
    "local_loss_weight_schedule.end": 0.5,
    "gram_teacher": "copy",
    "gram_start_step": 0,
    "gram_weight_schedule.start": 0.0,
    "gram_weight_schedule.peak": 0.0,
    "gram_weight_schedule.end": 2.0,
    "gram_crop_size": 512,
    "gram_first_refresh_step": 10_000,
    "gram_refresh_steps": 10_000,
    "gram_max_refreshes": 3,
    "gram_per_image": True,
    "gram_normalize": True,
    "gram_negatives": "keep",
    "gram_antialias": False,
}
VIT7B16_HIGH_RES = VIT7B16_GRAM_ANCHOR | {
    "start_with": "teacher",
    "global_batch_size": 8 * 256,
    "drop_path_group_size": 8,
    "max_steps": 30 * 1000,
    "lr_schedule.start": 0.0,
    "lr_schedule.peak": 0.0,
    "lr_schedule.end": 1.25e-5,
    "local_loss_weight_schedule.peak": 0.5,
    "gram_weight_schedule.start": 1.5,
    "gram_weight_schedule.peak": 1.5,
    "gram_weight_schedule.end": 1.5,
    "gram_crop_size": None,
    "gram_first_refresh_step": 0,
    "gram_refresh_steps": None,
    "gram_max_refreshes": None,
    "crop_sizes": [
        {"global": 512, "local": 112, "gram": 768, "probability": 0.3},
        {"global": 768, "local": 112, "gram": 1152, "probability": 0.3},
        {"global": 768, "local": 168, "gram": 1152, "probability": 0.3},
        {"global": 768, "local": 224, "gram": 1152, "probability": 0.05},
        {"global": 768, "local": 336, "gram": 1152, "probability": 0.05},
    ],
}
VITL16_DISTILLED = SHARED | {
    "objective": "prototypes",
    "gram_teacher": None,
    "teacher_to_student_scale": 1.0,
    "backbone.hidden_size": 1024,
    "backbone.num_hidden_layers": 24,
    "backbone.num_attention_heads": 16,
    "backbone.intermediate_size": 4096,
    "backbone.use_gated_mlp": False,
    "backbone.num_register_tokens": 4,
    "backbone.layer_norm_eps": 1e-5,
    "backbone.key_bias": False,
    "backbone.untie_global_and_local_cls_norm": False,
    "backbone.pos_embed_rescale": 2.0,
    "backbone.drop_path_rate": 0.0,
    "koleo_group_size": 16,
    "global_crop_size": 256,
    "local_crop_size": 112,
    "horizontal_flip": False,
    "global_batch_size": 1920,
    "max_steps": 20 * 1250,
    "lr_schedule.start": 0.0,
    "lr_schedule.peak": 0.0,
    "lr_schedule.end": 5e-5,
    "lr_schedule.warmup_steps": 0,
    "lr_schedule.cosine_steps": 10 * 1250,
    "freeze_last_layer_steps": 0,
    "layerwise_lr_decay": 0.99,
    "weight_decay_schedule.peak": 0.04,
    "weight_decay_schedule.end": 0.04,
    "teacher_momentum_schedule.start": 0.994,
    "teacher_momentum_schedule.peak": 0.994,
    "teacher_momentum_schedule.end": 1.0,
    "teacher_temperature_schedule.start": 0.07,
    "teacher_temperature_schedule.warmup_steps": 0,
    "max_grad_norm": 3.0,
    "adam_beta2": 0.999,
}
# Crops are what the student sees, at half the size of the teacher's.
CONVNEXT_DISTILLED = {name: value for name, value in VITL16_DISTILLED.items() if not name.startswith("backbone.")} | {
    "backbone.layer_scale_init_value": 1e-6,
    "backbone.drop_path_rate": 0.0,
    "global_crop_size": 512 // 2,
    "local_crop_size": 224 // 2,
    "horizontal_flip": True,
    "max_steps": 500 * 1250,
    "lr_schedule.start": 1e-6,
    "lr_schedule.peak": 2e-4,
    "lr_schedule.end": 1e-6,
    "lr_schedule.warmup_steps": 80 * 1250,
    "lr_schedule.cosine_steps": None,
    "freeze_last_layer_steps": 1250,
    "layerwise_lr_decay": 1.0,
    "weight_decay_schedule.start": 0.04,
    "weight_decay_schedule.peak": 0.04,
    "weight_decay_schedule.end": 0.2,
    "teacher_temperature_schedule.start": 0.04,
    "teacher_temperature_schedule.warmup_steps": 120 * 1250,
}
OF_THE_RUN = {"teacher_to_student_scale"}
STUDENTS = {
    "convnext_tiny": CONVNEXT_DISTILLED,
    "convnext_small": CONVNEXT_DISTILLED,
    "convnext_base": CONVNEXT_DISTILLED
    | {"lr_schedule.peak": 1e-4, "weight_decay_schedule.start": 0.02, "weight_decay_schedule.peak": 0.02},
    "convnext_large": CONVNEXT_DISTILLED | {"lr_schedule.peak": 1e-4},
}
SATELLITE = {"image_mean": [0.430, 0.411, 0.296], "image_std": [0.213, 0.156, 0.143]}

# Recipe -> the published run that its comments speak of.
SOURCES = dict.fromkeys(recipe_names(), VITL16_IM1K) | {
    "vit7b16_pretrain": VIT7B16_PRETRAIN,
    "vit7b16_sat493m": VIT7B16_PRETRAIN | SATELLITE,
    "vit7b16_gram_anchor": VIT7B16_GRAM_ANCHOR,
    "vit7b16_high_res": VIT7B16_HIGH_RES,
    **dict.fromkeys(DISTILLED, VITL16_DISTILLED),
}
# What differs from the published run by intent, beside the machine's settings.
SMALLER_GROUPS = {"drop_path_group_size"}  # so that every machine has its choice of batch
SMALLER_BACKBONE = {
    *SMALLER_GROUPS,
    "backbone.hidden_size",
    "backbone.num_hidden_layers",
    "backbone.num_attention_heads",
    "backbone.intermediate_size",
    "backbone.drop_path_rate",
}
DEPARTURES: dict[str, set[str]] = {
    "vitl16_im1k": SMALLER_GROUPS,
    "vitb16_im1k": SMALLER_BACKBONE,
    "vits16_im1k": SMALLER_BACKBONE,
    "vit7b16_pretrain": SMALLER_GROUPS,
    "vit7b16_sat493m": SMALLER_GROUPS,
    "vit7b16_gram_anchor": SMALLER_GROUPS,
    "vit7b16_high_res": {"crop_sizes"},  # one side is no multiple of the patch
    "single_gpu_vits16": {
        *SMALLER_BACKBONE,
        "backbone.num_register_tokens",
        "backbone.layer_norm_eps",
        "backbone.key_bias",
        "backbone.pos_embed_rescale",
        "dino_head.num_prototypes",
        "ibot_head.num_prototypes",
        "global_batch_size",
        "max_steps",
        "lr_schedule.warmup_steps",  # the same share of the run
        "freeze_last_layer_steps",  # the same share
        "teacher_temperature_schedule.warmup_steps",  # the same share
        "teacher_momentum_schedule.peak",
    },
}


def page(name: str) -> str:
    return (files("dinov3_hf.recipes") / f"{name}.yaml").read_text(encoding="utf-8")


def resolved(config: SSLConfig) -> dict[str, Any]:
    """Every value of a recipe that a published table names, durations in steps."""
    backbone = config.backbone_config().to_dict()
    values: dict[str, Any] = {f"backbone.{name}": value for name, value in backbone.items()}
    for head in ("dino_head", "ibot_head"):
        values |= {f"{head}.{name}": value for name, value in config.__dict__[head].items()}
    for name in config.schedule_names():
        schedule = config.__dict__[name]
        steps = schedule.warmup_steps
        values |= {f"{name}.{part}": schedule.__dict__[part] for part in ("start", "peak", "end", "cosine_steps")}
        values[f"{name}.warmup_steps"] = round(steps * config.max_steps) if 0 < steps < 1 else steps
    frozen = config.freeze_last_layer_steps
    values["freeze_last_layer_steps"] = round(frozen * config.max_steps) if 0 < frozen < 1 else frozen
    return {**config.__dict__, **values, "freeze_last_layer_steps": values["freeze_last_layer_steps"]}


@pytest.mark.parametrize("name", DEPARTURES)
def test_values_are_the_published_ones_but_for_the_departures(name):
    values = resolved(parse_arguments(SSLConfig, [name]))
    differing = {field for field, published in SOURCES[name].items() if values[field] != published}
    assert differing == DEPARTURES[name]


def departures_of_students(name: str, folder: Path) -> dict[str, set[str]]:
    """Student -> fields in which it differs from the published student of its family."""
    config = parse_distilled(name, folder)
    found = {}
    for student, args in config.student_args.items():
        values = resolved(args) | {field: config.__dict__[field] for field in OF_THE_RUN}
        published = STUDENTS.get(student, VITL16_DISTILLED).items()
        found[student] = {
            field for field, value in published if not field.endswith("_head.num_layers") and values[field] != value
        }
    return found


def test_a_distilled_vit_is_the_published_one(tmp_path):
    assert departures_of_students("distill_vitl16", tmp_path) == {"vitl16": set()}


def test_a_family_departs_where_it_says_so(tmp_path):
    departures = departures_of_students("distill_family", tmp_path)
    convnexts = [name for name in departures if name.startswith("convnext")]
    assert convnexts == list(STUDENTS)
    assert [departures[name] for name in convnexts] == [set()] * 4
    as_convnexts = {
        *("horizontal_flip", "max_steps", "teacher_temperature_schedule.start"),
        "teacher_temperature_schedule.warmup_steps",
        *(f"lr_schedule.{part}" for part in ("peak", "end", "warmup_steps", "cosine_steps")),
    }
    assert departures["vitl16"] == as_convnexts
    sizes = {f"backbone.{field}" for field in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    for name in ("vits16", "vits16plus", "vitb16"):
        smaller = {*sizes, "backbone.intermediate_size", "backbone.use_gated_mlp"}
        assert departures[name] - smaller == as_convnexts


def test_sizes_of_the_smaller_backbones():
    sizes = {"vits16_im1k": (12, 384, 6), "vitb16_im1k": (12, 768, 12), "single_gpu_vits16": (12, 384, 6)}
    for name, size in sizes.items():
        backbone = parse_arguments(SSLConfig, [name]).backbone_config()
        assert (backbone.num_hidden_layers, backbone.hidden_size, backbone.num_attention_heads) == size
        assert backbone.intermediate_size == 4 * backbone.hidden_size


def lines_with_comments(name: str) -> list[tuple[str, str, str]]:
    """(dotted field, its YAML, its comment) of every line under "changes the result"; an entry of a mapping without a
    comment of its own has the mapping's, and a field that of the lines above it."""
    found = []
    section, above = "", ""
    parents: list[tuple[int, str, str]] = []  # (indent, field, comment) of the mappings that a line is in
    for line in page(name).splitlines():
        if line.startswith("# --- "):
            section = line
        elif line.startswith("#"):
            above += line
            continue
        elif match := re.match(r"( *)(\w+):([^#]*)(#.*)?$", line):
            indent, field, value, comment = len(match[1]), match[2], match[3].strip(), match[4] or ""
            parents = [parent for parent in parents if parent[0] < indent]
            comment = comment or above
            if parents:
                field, comment = f"{parents[-1][1]}.{field}", comment or parents[-1][2]
            parents.append((indent, field, comment))
            if "changes the result" in section and value:
                found.append((field, value, comment.lstrip("# ")))
        above = ""
    return found


@pytest.mark.parametrize("name", recipe_names())
def test_every_value_that_changes_the_result_has_its_source(name):
    lines = lines_with_comments(name)
    assert len(lines) > 30
    assert len(lines) == len(re.findall(r"^ *\w+: ?[^#\s]", page(name).partition("# --- orchestration ---")[0], re.M))
    assert [field for field, _, comment in lines if not comment] == []


@pytest.mark.parametrize("name", recipe_names())
def test_what_is_marked_published_is_published(name):
    checked = 0
    for field, value, comment in lines_with_comments(name):
        if not re.match(r"published($|[;,])", comment):  # "published: 0.3 ..." says what was published instead
            continue
        value = parse_yaml(value, field)
        for part, number in (value if isinstance(value, dict) else {"": value}).items():
            whole = f"{field}.{part}" if part else field
            source = SOURCES[name]
            if whole.startswith("students."):
                _, student, whole = whole.split(".", 2)
                source = STUDENTS.get(student, source)
            # The published values of every step, and those of a preset, are compared elsewhere here.
            if not whole.endswith((".style", ".preset")):
                names = [whole] if whole in source else [f"{whole}.peak", f"{whole}.end"]
                assert [source[entry] for entry in names] == [number] * len(names), whole
                checked += 1
    assert checked > 5


@pytest.mark.parity
@pytest.mark.parametrize(
    ("name", "fixture"),
    [
        ("vitl16_im1k", "vitl_im1k"),
        ("vits16_im1k", "vitl_im1k"),
        ("vitb16_im1k", "vitl_im1k"),
        ("vit7b16_pretrain", "vit7b16_pretrain"),
        ("vit7b16_sat493m", "vit7b16_pretrain"),
    ],
)
def test_published_schedules(name, fixture):
    reference = json.loads((FIXTURES / "f_schedules" / f"{fixture}.json").read_text())
    config = parse_arguments(SSLConfig, [name])
    assert config.max_steps == reference["total_iterations"]
    assert config.global_batch_size == reference["world_size"] * reference["batch_size_per_gpu"]
    assert config.koleo_group_size == reference["batch_size_per_gpu"]
    assert config.max_grad_norm == reference["clip_grad"]
    assert config.layerwise_lr_decay == reference["layerwise_decay"]
    assert [config.adam_beta1, config.adam_beta2] == reference["adamw_betas"]
    schedules = config.schedules()
    values = [schedules.at(step) for step in reference["iterations"]]
    ours_by_theirs = {
        "lr": "lr",
        "last_layer_lr": "last_layer_lr",
        "weight_decay": "weight_decay",
        "momentum": "teacher_momentum",
        "teacher_temp": "teacher_temperature",
    }
    for theirs, ours in ours_by_theirs.items():
        np.testing.assert_allclose(
            [value[ours] for value in values], reference[theirs], rtol=1e-9, atol=1e-12, err_msg=theirs
        )


@pytest.mark.parity
@pytest.mark.parametrize(
    ("name", "fixture", "start"),
    [("vit7b16_gram_anchor", "vit7b16_gram_anchor", 1_000_000), ("vit7b16_high_res", "vit7b16_high_res_adapt", 0)],
)
def test_published_schedules_of_the_stages(name, fixture, start):
    reference = json.loads((FIXTURES / "f_schedules" / f"{fixture}.json").read_text())
    config = parse_arguments(SSLConfig, [name])
    assert config.max_steps == reference["total_iterations"] - start
    assert config.global_batch_size == reference["world_size"] * reference["batch_size_per_gpu"]
    schedules = config.schedules()
    of_stage = [i for i, step in enumerate(reference["iterations"]) if step >= start]
    assert len(of_stage) > 50
    values = [schedules.at(reference["iterations"][i] - start) for i in of_stage]
    ours_by_theirs = {
        "lr": "lr",
        "last_layer_lr": "last_layer_lr",
        "weight_decay": "weight_decay",
        "momentum": "teacher_momentum",
        "teacher_temp": "teacher_temperature",
        "dino_local_loss_weight": "local_loss_weight",
        "gram_loss_weight": "gram_weight",
    }
    for theirs, ours in ours_by_theirs.items():
        expected = [reference[theirs][i] for i in of_stage]
        np.testing.assert_allclose([value[ours] for value in values], expected, rtol=1e-9, atol=1e-12, err_msg=theirs)


@pytest.mark.parametrize(
    ("name", "step", "expected"),
    [
        ("vit7b16_gram_anchor", 0, {"lr": 2.4e-4, "last_layer_lr": 2.4e-4, "local_loss_weight": 1, "gram_weight": 0}),
        ("vit7b16_gram_anchor", 1000, {"local_loss_weight": 0.5, "gram_weight": 2, "teacher_momentum": 0.999}),
        ("vitl16_gram_anchor", 0, {"lr": 0, "weight_decay": 0.4, "teacher_momentum": 0.9987}),
        ("vitl16_gram_anchor", 2500, {"lr": 6e-4 * 4 * 2**0.5, "gram_weight": 2, "teacher_temperature": 0.07}),
        ("vitl16_high_res", 3749, {"lr": 2.5e-4 * 4, "gram_weight": 1.5, "local_loss_weight": 0.5}),
        ("vit7b16_pretrain", 0, {"lr": 0, "last_layer_lr": 0, "teacher_temperature": 0.04}),
        ("vit7b16_pretrain", 4999, {"lr": 4e-4 * 4999 / 100_000, "last_layer_lr": 0}),
        ("vit7b16_pretrain", 50_000, {"lr": 2e-4, "last_layer_lr": 2e-4, "teacher_temperature": 0.055}),
        ("vit7b16_pretrain", 999_999, {"lr": 4e-4, "weight_decay": 0.04, "teacher_momentum": 0.994}),
        ("vitl16_im1k", 12_500, {"lr": 1e-3 * 4 * 2**0.5}),
        ("vitb16_im1k", 1249, {"last_layer_lr": 0}),
        ("vits16_im1k", 37_500, {"teacher_temperature": 0.07}),
        ("single_gpu_vits16", 999, {"last_layer_lr": 0}),
        ("single_gpu_vits16", 10_000, {"lr": 1e-3 * 4 / 2**0.5, "teacher_temperature": 0.05}),
        ("single_gpu_vits16", 30_000, {"teacher_temperature": 0.07}),
        ("single_gpu_vits16", 99_999, {"lr": 1e-6 * 4 / 2**0.5, "weight_decay": 0.4, "teacher_momentum": 1}),
    ],
)
def test_values_at_single_steps(name, step, expected):
    values = parse_arguments(SSLConfig, [name]).schedules().at(step)
    assert {field: values[field] for field in expected} == pytest.approx(expected, rel=1e-9)


def test_a_satellite_run_of_the_length_in_the_paper_shortens_every_duration():
    schedules = parse_arguments(SSLConfig, ["vit7b16_sat493m", "--max_steps", "100000"]).schedules()
    assert schedules.at(499)["last_layer_lr"] == 0 < schedules.at(500)["last_layer_lr"]
    assert schedules.at(9_999)["lr"] < schedules.at(10_000)["lr"] == pytest.approx(4e-4)
    assert schedules.at(9_999)["teacher_temperature"] < schedules.at(10_000)["teacher_temperature"] == 0.07


def test_recipes_of_one_family_differ_in_the_backbone_alone():
    """Copies of one page stay copies."""

    def without(name: str, *fields: str) -> dict[str, Any]:
        recipe = read_recipe(name)
        for field in ("backbone", "output_dir", *fields):
            del recipe[field]
        return recipe

    assert without("vits16_im1k") == without("vitl16_im1k") == without("vitb16_im1k")
    durations = ("lr_schedule", "freeze_last_layer_steps", "teacher_temperature_schedule")
    statistics = ("image_mean", "image_std")
    assert without("vit7b16_sat493m", *durations, *statistics) == without("vit7b16_pretrain", *durations, *statistics)
    assert read_recipe("vit7b16_sat493m")["backbone"] == read_recipe("vit7b16_pretrain")["backbone"]
    for stage in ("gram_anchor", "high_res"):
        for size, first in (("vit7b16", "vit7b16_pretrain"), ("vitl16", "vitl16_im1k")):
            later, stage_1 = read_recipe(f"{size}_{stage}"), read_recipe(first)
            assert [later[part] for part in ("backbone", "dino_head", "ibot_head")] == [
                stage_1[part] for part in ("backbone", "dino_head", "ibot_head")
            ]


@pytest.mark.parametrize(
    ("name", "backbone", "dino_head", "ibot_head"),
    [
        ("vit7b16_pretrain", 6_716_043_264, 239_092_224, 72_884_608),
        ("vit7b16_sat493m", 6_716_043_264, 239_092_224, 72_884_608),
        # The released file holds 384 key biases a block, which its mask multiplies with 0.
        ("single_gpu_vits16", 21_601_152 - 12 * 384, 9_703_680, 9_703_680),
    ],
)
def test_parameters(name, backbone, dino_head, ibot_head):
    """Backbones as large as the released ones; a head D -> h -> h -> b -> K has Dh + h + hh + h + hb + b + bK."""
    config = parse_arguments(SSLConfig, [name])
    with torch.device("meta"):
        model = DINOv3ForPreTraining(config.pretraining_config())
    for network in (model.student, model.teacher):
        parts = (network.backbone, network.dino_head, network.ibot_head)
        assert [sum(p.numel() for p in part.parameters()) for part in parts] == [backbone, dino_head, ibot_head]
