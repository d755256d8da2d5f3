"""Every recipe trains: two real steps of the script, with sizes that fit a test and every other value as it stands."""

import json
import math
import runpy

import numpy as np
import pytest
from PIL import Image
from transformers import AutoModel

from dinov3_hf.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTModel
from dinov3_hf.recipes.pages import read_recipe, recipe_names
from dinov3_hf.yaml_text import dump_yaml
from tests.recipes.distilled import DISTILLED, teacher_of
from tests.testing_utils import REPOSITORY

SIZES = {
    "backbone.hidden_size": 48,
    "backbone.intermediate_size": 64,
    "backbone.num_hidden_layers": 2,
    "backbone.num_attention_heads": 3,
    **{f"{head}.num_prototypes": 32 for head in ("dino_head", "ibot_head")},
    **{f"{head}.bottleneck_dim": 16 for head in ("dino_head", "ibot_head")},
    **{f"{head}.hidden_dim": 32 for head in ("dino_head", "ibot_head")},
    "global_batch_size": 4,
    "per_device_train_batch_size": 2,
    "koleo_group_size": 2,
    "drop_path_group_size": 2,
    "max_steps": 2,
    "lr_schedule.warmup_steps": 1,
    "teacher_temperature_schedule.warmup_steps": 1,
    "freeze_last_layer_steps": 1,
}
# Of the later stages, by the end of the recipe's name. The script has no earlier run here to copy at step 0.
STAGES = {
    "gram_anchor": {
        "gram_start_step": 1,
        "lr_schedule.start": 0.0,
        "teacher_temperature_schedule.start": 0.04,
        "gram_crop_size": 64,
        "gram_first_refresh_step": 1,
        "gram_refresh_steps": 1,
        "gram_weight_schedule.cosine_steps": 1,
        "local_loss_weight_schedule.cosine_steps": 1,
    },
    "high_res": {
        "gram_start_step": 1,
        "crop_sizes": "[{global: 64, local: 32, gram: 96, probability: 0.5}, {global: 80, local: 48, gram: 96, "
        "probability: 0.5}]",
        "lr_schedule.cosine_steps": 0,
        "teacher_temperature_schedule.start": 0.04,
    },
}
LIKE_OTHERS = {"vits16plus", "vitb16", "vitl16", "convnext_small", "convnext_large"}  # once all are shrunk
SMALL_CONVNEXT = "{model_type: dinov3_convnext, hidden_sizes: [8, 16, 24, 32], depths: [1, 1, 1, 1]}"
# Of a distillation, beside its students: the heads are the teacher's.
DISTILLATION = {
    **{field: SIZES[field] for field in ("global_batch_size", "koleo_group_size")},
    "max_steps": 2,
    "num_local_crops": 2,
}
MACHINE = {"use_cpu": "true", "dataloader_num_workers": 0, "report_to": "none", "logging_steps": 1, "save_steps": 2}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(5):
        Image.fromarray(rng.integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


@pytest.mark.parametrize("name", DISTILLED)
def test_two_steps_of_distillation(name, photos, tmp_path):
    main = runpy.run_path(str(REPOSITORY / "training_scripts" / "distill.py"))["main"]
    recipe = read_recipe(name)
    for student in LIKE_OTHERS & set(recipe["students"]) if name == "distill_family" else ():
        del recipe["students"][student]
    (tmp_path / "recipe.yaml").write_text(dump_yaml(recipe))
    teacher = teacher_of(name, tmp_path / "of")
    changes = DISTILLATION | MACHINE | {"train_data": photos, "output_dir": tmp_path / "out", "teacher": teacher}
    if name != "distill_small_cpu":
        changes |= {"global_crop_size": 64, "local_crop_size": 32}
    for student, block in recipe["students"].items():
        if student.startswith("convnext"):
            changes[f"students.{student}.backbone"] = SMALL_CONVNEXT
        else:
            sizes = {field: value for field, value in SIZES.items() if field.startswith("backbone.")}
            changes |= {f"students.{student}.{field}": value for field, value in sizes.items()}
        if "lr_schedule" in block:
            changes |= {
                f"students.{student}.{field}": 1 for field in ("lr_schedule.warmup_steps", "freeze_last_layer_steps")
            }
    durations = {"lr_schedule": ("warmup_steps", "cosine_steps"), "teacher_temperature_schedule": ("warmup_steps",)}
    for schedule, parts in durations.items():
        given = recipe[schedule] if isinstance(recipe[schedule], dict) else {}
        changes |= {f"{schedule}.{part}": 1 for part in parts if part in given}
    words = [word for field, value in changes.items() for word in (f"--{field}", str(value))]
    main([str(tmp_path / "recipe.yaml"), *words])

    state = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    logged = [entry for entry in state["log_history"] if "loss" in entry]
    assert [entry["step"] for entry in logged] == [1, 2]
    for student in recipe["students"]:
        terms = [logged[step][f"{student}/{term}"] for step in (0, 1) for term in ("loss/ibot", "grad_norm/backbone")]
        assert all(math.isfinite(term) for term in terms)
        assert logged[1][f"{student}/schedule/lr"] > 0
        for folder in (tmp_path / "out" / student, tmp_path / "out" / "checkpoint-2" / student):
            model = AutoModel.from_pretrained(folder)
            assert model.config.model_type == ("dinov3_convnext" if student.startswith("convnext") else "dinov3_vit")
            assert (folder / "heads.safetensors").is_file()


@pytest.mark.parametrize(
    "name", sorted({*recipe_names()} - {"continue_pretraining", *DISTILLED})
)  # start from a model
def test_two_steps(name, photos, tmp_path):
    main = runpy.run_path(str(REPOSITORY / "training_scripts" / "pretrain.py"))["main"]
    of_stage = next((sizes for ending, sizes in STAGES.items() if name.endswith(ending)), {})
    changes = SIZES | of_stage | MACHINE | {"train_data": photos, "output_dir": tmp_path}
    main([name, *(word for field, value in changes.items() for word in (f"--{field}", str(value)))])

    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    logged = [entry for entry in state["log_history"] if "loss" in entry]
    assert [entry["step"] for entry in logged] == [1, 2]
    terms = [value for entry in logged for key, value in entry.items() if key.startswith(("loss", "grad_norm"))]
    assert {"loss", "loss/ibot", "loss/koleo", "grad_norm/backbone"} <= set(logged[0])
    assert all(math.isfinite(value) for value in terms)
    assert ("loss/gram" in logged[1]) == bool(of_stage)
    assert logged[0]["schedule/last_layer_lr"] == 0 < logged[1]["schedule/last_layer_lr"]

    recipe = read_recipe(name)
    processor = json.loads((tmp_path / "teacher" / "preprocessor_config.json").read_text())
    assert processor["image_mean"] == recipe.get("image_mean", [0.485, 0.456, 0.406])
    teacher = DINOv3ViTModel.from_pretrained(tmp_path / "teacher").config
    for field in set(recipe["backbone"]) - {"preset"} - {field.removeprefix("backbone.") for field in SIZES}:
        assert teacher.to_dict()[field] == recipe["backbone"][field], field
