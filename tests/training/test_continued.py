"""Continued pre-training: what waits, what is watched, and what comes out."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel

from dinov3_hf.data.sources.spec import load_images
from dinov3_hf.errors import ArgumentError
from dinov3_hf.evals.features import ImageList
from dinov3_hf.models.dinov3_convnext.configuration_dinov3_convnext import DINOv3ConvNextConfig
from dinov3_hf.models.dinov3_convnext.modeling_dinov3_convnext import DINOv3ConvNextModel
from dinov3_hf.models.dinov3_vit.image_processing import build_image_processor
from dinov3_hf.training import lora
from dinov3_hf.training.continued import ContinuedTrainer, best_checkpoint, continued_model, harm_done, num_trainable
from dinov3_hf.training.continued_config import ContinuedConfig
from dinov3_hf.training.course import course, markdown
from dinov3_hf.training.ssl_config import SSLConfig
from tests.testing_utils import require_package, save_tiny_vit

HEAD = {"num_prototypes": 32, "bottleneck_dim": 16, "hidden_dim": 32, "num_layers": 2}


@pytest.fixture
def vit(tmp_path) -> Path:
    save_tiny_vit(tmp_path / "vit")
    return tmp_path / "vit"


@pytest.fixture
def convnext(tmp_path) -> Path:
    config = DINOv3ConvNextConfig(hidden_sizes=[8, 8, 12, 16], depths=[1, 1, 1, 1], layer_scale_init_value=0.5)
    DINOv3ConvNextModel(config).save_pretrained(tmp_path / "convnext")
    build_image_processor(image_size=64).save_pretrained(tmp_path / "convnext")
    return tmp_path / "convnext"


def make_args(model: Path, output_dir: Path, **overrides) -> ContinuedConfig:
    values = {
        "model": str(model),
        "output_dir": str(output_dir),
        "dino_head": HEAD,
        "ibot_head": HEAD,
        "global_crop_size": 32,
        "local_crop_size": 16,
        "num_local_crops": 2,
        "global_batch_size": 8,
        "koleo_group_size": 4,
        "max_steps": 6,
        "head_steps": 2,
        "ramp_steps": 2,
        "backbone_lr_mult": 1.0,
        "patch_embed_lr_mult": 1.0,
        "lr_schedule": 1e-2,
        "lr_scaling": "none",
        "freeze_last_layer_steps": 0,
        "teacher_momentum_schedule": 0.5,
        "teacher_temperature_schedule": 0.06,
        "eval_strategy": "no",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "precision": "fp32",
        **overrides,
    }
    return ContinuedConfig(**values)


def pictures(num_channels: int = 3, num_images: int = 12) -> ImageList:
    rng = np.random.default_rng(0)
    return ImageList(list(rng.integers(0, 256, (num_images, 40, 48, num_channels), dtype=np.uint8)))


def make_trainer(model: Path, output_dir: Path, eval_images=None, **overrides) -> ContinuedTrainer:
    args = make_args(model, output_dir, **overrides)
    torch.manual_seed(args.seed)
    return ContinuedTrainer(continued_model(args), args, pictures(args.num_channels), eval_images)


def weights(trainer: ContinuedTrainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


# ---- the configuration ----------------------------------------------------------------------------------------------


def test_what_is_left_open_comes_from_the_model(vit, tmp_path):
    args = make_args(vit, tmp_path, global_crop_size=None, local_crop_size=None)
    assert (args.image_mean, args.image_std) == ([0.5] * 3, [0.25] * 3)
    assert (args.global_crop_size, args.local_crop_size) == (224, 96)
    assert (args.num_channels, args.ibot_weight, args.gram_teacher) == (3, 1.0, "copy")
    config = args.backbone_config()
    assert (config.hidden_size, config.patch_size, config.num_register_tokens) == (24, 8, 2)
    assert make_args(vit, tmp_path, backbone={"drop_path_rate": 0.1}).backbone_config().drop_path_rate == 0.1


def test_a_convnext_goes_without_masks(convnext, tmp_path):
    args = make_args(convnext, tmp_path, global_crop_size=64, local_crop_size=32)
    assert args.ibot_weight == 0
    with pytest.raises(ValueError, match="ibot_weight: 0"):
        make_args(convnext, tmp_path, global_crop_size=64, local_crop_size=32, ibot_weight=1.0)


def test_the_recipe_of_a_run_reads_back(vit, tmp_path):
    args = make_args(vit, tmp_path, num_channels=1)
    again = ContinuedConfig(**{**args.recipe(), "use_cpu": True})
    assert again.recipe() == args.recipe()
    assert again.image_mean == [0.5]
    assert args.result_fields(args.recipe()) == again.result_fields(again.recipe())
    inherited = {field.name for field in dataclasses.fields(SSLConfig) if "group" in field.metadata}
    own = {field.name for field in dataclasses.fields(ContinuedConfig) if "group" in field.metadata}
    assert inherited <= own  # a changed default keeps its place in recipes and help


def refuse(folder: Path, **config) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_models_that_cannot_be_started_from(vit, tmp_path):
    cases = {
        None: (ArgumentError, "model is not set"),
        "nowhere/at/all": (FileNotFoundError, "there is no model folder nowhere/at/all"),
        str(refuse(tmp_path / "bert", model_type="bert")): (ValueError, "'bert' model; .* DINOv3 ViT or ConvNeXt"),
        str(refuse(tmp_path / "timm", architecture="vit_small")): (ValueError, "timm's format; .*dinov3-hf convert"),
        str(vit / "model.safetensors"): (ValueError, "is a file; convert it first, dinov3-hf convert"),
        str(tmp_path / "gone.pth"): (FileNotFoundError, "there is no model"),
    }
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    cases[str(tmp_path / "broken")] = (ValueError, "broken/config.json is no JSON")
    (tmp_path / "empty").mkdir()
    cases[str(tmp_path / "empty")] = (FileNotFoundError, "holds no config.json")
    for model, (kind, says) in cases.items():
        with pytest.raises(kind, match=says) as error:
            ContinuedConfig(model=model, use_cpu=True)
        assert "\n" not in str(error.value)
    (vit / "preprocessor_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="has no image processor"):
        make_args(vit, tmp_path)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"head_steps": 4, "ramp_steps": 2}, r"head_steps \+ ramp_steps are 6 steps, but the run has 6"),
        ({"head_steps": -1}, "head_steps -1 is negative"),
        ({"backbone_lr_mult": 0.0}, "backbone_lr_mult 0 is not positive"),
        ({"lora_rank": 0}, "lora_rank 0 is not positive"),
        ({"num_channels": 0}, "num_channels 0"),
        ({"start_from": "runs/a"}, "name the backbone as model"),
        ({"num_channels": 1, "image_mean": [0.1, 0.2, 0.3]}, "image_mean has 3 values"),
        ({"max_knn_drop": -1.0}, "max_knn_drop -1 is negative"),
        ({"lora_alpha": 8}, "lora_alpha 8 is without lora_rank"),
        ({"lora_rank": 4, "lora_alpha": 0}, "lora_alpha 0 is not positive"),
        ({"backbone": {"hiddensize": 3}}, "hidden_size"),
        ({"backbone": {"rope_theta": 50.0}}, "rope_theta 50.0 is that of another network, the model has 100.0"),
        ({"backbone": {"num_hidden_layers": 1}}, "num_hidden_layers 1 is that of another network"),
        ({"eval_strategy": "steps", "eval_steps": 2}, "eval_on_start: true"),
    ],
)
def test_numbers_that_cannot_be(vit, tmp_path, overrides, says):
    with pytest.raises(ValueError, match=says):
        make_args(vit, tmp_path, **overrides)


def test_adapters_without_peft_are_refused_in_one_line(vit, tmp_path, monkeypatch):
    monkeypatch.setattr(lora, "find_spec", lambda name: None)
    with pytest.raises(ArgumentError, match=r"lora_rank needs PEFT, which is not installed; pip install"):
        make_args(vit, tmp_path, lora_rank=4)


def test_what_is_derived_from_a_release_has_its_licence(vit, tmp_path):
    assert make_args(vit, tmp_path).license is None
    released = vit.rename(tmp_path / "dinov3-vits16-pretrain-lvd1689m")
    assert make_args(released, tmp_path).license == "dinov3-license"
    assert make_args(released, tmp_path, license="mit").license == "mit"


# ---- training -------------------------------------------------------------------------------------------------------


def is_first_layer(name: str) -> bool:
    return "patch_embeddings" in name or "stages.0.downsample_layers" in name


@pytest.mark.invariant
@pytest.mark.parametrize("family", ["vit", "convnext"])
def test_the_backbone_waits_bit_by_bit_and_then_moves(family, request, tmp_path):
    sizes = {} if family == "vit" else {"global_crop_size": 64, "local_crop_size": 32}
    trainer = make_trainer(request.getfixturevalue(family), tmp_path / "run", max_steps=6, **sizes)
    start = weights(trainer)
    for network in ("student", "teacher"):
        loaded = AutoModel.from_pretrained(request.getfixturevalue(family)).state_dict()
        ours = {name.removeprefix(f"{network}.backbone."): tensor for name, tensor in start.items()}
        assert sum(any(torch.equal(tensor, other) for other in ours.values()) for tensor in loaded.values()) == len(
            loaded
        )
    states = {}

    class Remember(trainer.callback_handler.callbacks[0].__class__.__mro__[-2]):
        def on_step_end(self, args, state, control, **kwargs):
            states[state.global_step] = weights(trainer)

    trainer.add_callback(Remember())
    trainer.train()
    # The rate of step 2, the first of the ramp, is 0 as well: a ramp begins at its start.
    for step in (1, 2, 3):
        for name, tensor in states[step].items():
            waits = ".backbone." in name and not is_first_layer(name)
            if waits or name.startswith("gram_teacher."):
                assert torch.equal(tensor, start[name]), f"{name} moved in step {step}"
            elif name.startswith("student.") and "mask_token" not in name:
                assert not torch.equal(tensor, start[name]), f"{name} did not move in step {step}"
    moved = [n for n, t in states[6].items() if ".backbone." in n and not torch.equal(t, start[n])]
    assert {name.split(".")[0] for name in moved} == {"student", "teacher"}
    assert len(moved) > 0.9 * sum(".backbone." in name for name in start)
    assert all(torch.equal(t, start[n]) for n, t in states[6].items() if n.startswith("gram_teacher."))


def plain_features(folder: Path, pixels: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return AutoModel.from_pretrained(folder)(pixels).last_hidden_state


@require_package("peft")
@pytest.mark.parametrize("family", ["vit", "convnext"])
def test_adapters_train_alone_and_are_saved_merged(family, request, tmp_path):
    source = request.getfixturevalue(family)
    sizes = {} if family == "vit" else {"global_crop_size": 64, "local_crop_size": 32}
    trainer = make_trainer(source, tmp_path / "run", lora_rank=2, head_steps=1, ramp_steps=1, **sizes)
    pixels = torch.randn(2, 3, 64, 64)
    backbone = trainer.model.teacher.backbone
    with torch.no_grad():
        before = backbone(pixels).last_hidden_state
    torch.testing.assert_close(before, plain_features(source, pixels), rtol=1e-4, atol=1e-5)
    trainable, total = num_trainable(trainer.model)
    assert 0 < trainable < 0.6 * total
    assert "adapters of rank 2" in trainer.describe_start() and f"{trainable:,}" in trainer.describe_start()

    start = weights(trainer)
    trainer.train()
    for name, tensor in weights(trainer).items():
        if ".backbone." in name and not (".lora_" in name or is_first_layer(name)):
            assert torch.equal(tensor, start[name]), name
        elif ".lora_" in name and not name.startswith("gram_teacher"):
            assert not torch.equal(tensor, start[name]), name
    with torch.no_grad():
        adapted = backbone(pixels).last_hidden_state
    assert (adapted - before).abs().max() > 1e-3
    trainer.save_teacher(tmp_path / "teacher")
    assert not any("lora" in name for name in load_file(tmp_path / "teacher" / "model.safetensors"))
    torch.testing.assert_close(plain_features(tmp_path / "teacher", pixels), adapted, rtol=1e-4, atol=1e-4)


@require_package("peft")
def test_a_run_with_adapters_resumes_bit_by_bit(vit, tmp_path):
    options = {"lora_rank": 2, "save_strategy": "steps", "save_steps": 3, "head_steps": 1, "ramp_steps": 1}
    whole = make_trainer(vit, tmp_path / "run", **options)
    whole.train()
    again = make_trainer(vit, tmp_path / "run", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    found = weights(again)
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, found[name]), name


def test_grey_images_begin_with_the_features_of_the_model(vit, tmp_path):
    trainer = make_trainer(vit, tmp_path / "run", num_channels=1, image_mean=[0.4], image_std=[0.3])
    grey = torch.rand(2, 1, 32, 32)
    with torch.no_grad():
        found = trainer.model.teacher.backbone((grey - 0.4) / 0.3).last_hidden_state
    torch.testing.assert_close(
        found, plain_features(vit, (grey.expand(-1, 3, -1, -1) - 0.5) / 0.25), rtol=1e-3, atol=1e-4
    )
    assert "kernels of 3 channels are folded into one, exactly; image_mean is [0.4]" in trainer.describe_start()
    trainer.train()
    trainer.save_teacher(tmp_path / "teacher")
    assert AutoModel.from_pretrained(tmp_path / "teacher").config.num_channels == 1
    assert list(AutoImageProcessor.from_pretrained(tmp_path / "teacher").image_mean) == [0.4]


def test_drift_is_measured_from_the_start_also_after_a_resume(vit, tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 3, "eval_on_start": True, "save_strategy": "steps"}
    whole = make_trainer(vit, tmp_path / "run", save_steps=3, max_patch_drift=None, **options)
    whole.train()
    again = make_trainer(vit, tmp_path / "run", save_steps=3, max_patch_drift=None, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    ours, theirs = (
        {e["step"]: (e["eval_patch_drift"], e["eval_cls_drift"]) for e in t.state.log_history if "eval_cls_drift" in e}
        for t in (again, whole)
    )
    assert ours == theirs
    assert list(ours) == [0, 3, 6]
    assert ours[0][0] == pytest.approx(0, abs=1e-6) and ours[6][0] > 1e-4
    assert [row[0] for row in course(again.state.log_history)[1]] == ["0", "3", "6"]  # the look at a resume is no row


# ---- harm -----------------------------------------------------------------------------------------------------------


def entry(step: int, drift: float, knn: float | None = None) -> dict[str, float]:
    return {"step": step, "eval_patch_drift": drift} | ({} if knn is None else {"eval_knn_top1": knn})


def test_what_counts_as_harm(vit, tmp_path):
    args = make_args(vit, tmp_path)
    assert harm_done(args, [entry(0, 0.0, 60.0), entry(3, 0.1, 57.1)]) is None
    assert "3.1 points below" in harm_done(args, [entry(0, 0.0, 60.0), entry(3, 0.1, 56.9)])
    assert "moved 0.51" in harm_done(args, [entry(0, 0.0), entry(3, 0.51)])
    lenient = make_args(vit, tmp_path, max_knn_drop=None, max_patch_drift=None)
    assert harm_done(lenient, [entry(0, 0.0, 60.0), entry(3, 0.9, 1.0)]) is None


def test_a_run_that_does_harm_stops_and_says_what_is_best(vit, tmp_path, caplog):
    options = {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True, "save_strategy": "steps"}
    trainer = make_trainer(vit, tmp_path / "run", save_steps=2, max_patch_drift=0.02, max_steps=40, **options)
    trainer.train()
    assert trainer.state.global_step < 40
    assert "patch features have moved" in trainer.harm and trainer.harm in caplog.text
    best = best_checkpoint(tmp_path / "run", trainer.state)
    assert best is not None and int(best.name.removeprefix("checkpoint-")) < trainer.state.global_step
    said = trainer.save_outcome(tmp_path / "run" / "teacher")
    assert f"is the teacher of {best.name}, the best" in said and "Stopped at step" in said
    ours, its = (load_file(folder / "teacher" / "model.safetensors") for folder in (tmp_path / "run", best))
    assert all(torch.equal(ours[name], its[name]) for name in its)

    headings, rows = course(trainer.state.log_history)
    assert headings == ["step", "patch-CLS cosine", "patch-similarity entropy", "CLS drift", "patch drift"]
    assert rows[0][0] == "0" and rows[0][-1] == "0.000"
    assert markdown(headings, rows[:1]).splitlines()[1] == "| --- | --- | --- | --- | --- |"


def test_limits_that_nobody_looks_at_are_warned_of(vit, tmp_path, caplog):
    make_trainer(vit, tmp_path / "run", max_steps=4, head_steps=1, ramp_steps=1, eval_strategy="no").train()
    assert "not looked at with eval_strategy no" in caplog.text


def test_harm_from_the_first_look_on_leaves_the_model_that_was(vit, tmp_path):
    digits = load_images("digits", split="test", labelled=True)
    options = {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True, "eval_data": "digits"}
    trainer = make_trainer(vit, tmp_path / "run", (digits, None), max_patch_drift=0.0, max_steps=40, **options)
    trainer.train()
    assert trainer.state.global_step == 2
    with pytest.raises(
        RuntimeError, match=r"stopped at step 2 of 40: .* Nothing on the way was better than .*vit: keep"
    ):
        trainer.save_outcome(tmp_path / "run" / "teacher")
    with pytest.raises(RuntimeError, match="keep it"):  # before anything reaches the Hub
        trainer.push_to_hub()
    assert not (tmp_path / "run" / "teacher").exists()


def test_a_long_course_is_shown_in_few_rows():
    history = [{"step": step, "eval_knn_top1": float(step)} for step in range(0, 1000, 10)]
    _, rows = course(history, num_rows=5)
    assert [row[0] for row in rows] == ["0", "250", "500", "740", "990"]
