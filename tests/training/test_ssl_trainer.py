"""`SSLTrainer` on the digits, in this process, with a network small enough for seconds."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dinov3_hf.data.sources.spec import load_images
from dinov3_hf.models.dinov3_pretraining.modeling_dinov3_pretraining import DINOv3ForPreTraining
from dinov3_hf.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTModel
from dinov3_hf.training.ssl_config import SSLConfig
from dinov3_hf.training.ssl_trainer import SSLTrainer

BACKBONE = {
    "patch_size": 4,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_register_tokens": 1,
    "layerscale_value": 1e-5,
    "pos_embed_rescale": 2.0,
    "drop_path_rate": 0.25,
    "untie_global_and_local_cls_norm": True,
}
HEAD = {"num_prototypes": 32, "bottleneck_dim": 16, "hidden_dim": 32, "num_layers": 2}


def make_args(output_dir: Path, **overrides) -> SSLConfig:
    values = {
        "output_dir": str(output_dir),
        "backbone": BACKBONE,
        "dino_head": HEAD,
        "ibot_head": HEAD,
        "train_data": "digits",
        "global_crop_size": 16,
        "local_crop_size": 8,
        "num_local_crops": 2,
        "global_batch_size": 16,
        "koleo_group_size": 4,
        "drop_path_group_size": 4,
        "max_steps": 6,
        "lr_schedule": 1e-3,
        "lr_scaling": "none",
        "freeze_last_layer_steps": 0,
        "teacher_momentum_schedule": 0.9,
        "teacher_temperature_schedule": 0.06,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        **overrides,
    }
    return SSLConfig(**values)


def make_trainer(output_dir: Path, callbacks=None, **overrides) -> SSLTrainer:
    args = make_args(output_dir, **overrides)
    torch.manual_seed(args.seed)
    model = DINOv3ForPreTraining(args.pretraining_config())
    return SSLTrainer(model, args, load_images("digits", split="train"), callbacks=callbacks)


def losses(trainer: SSLTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_loss_falls_all_weights_move_and_everything_is_logged(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=60)
    start = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.train()

    history = losses(trainer)
    assert sum(history[-10:]) < sum(history[:10])
    for name, tensor in trainer.model.named_parameters():
        assert not torch.equal(tensor, start[name]), f"{name} did not move"
        assert (tensor.grad is None) or name.startswith("student."), name
    logged = trainer.state.log_history[1]
    for name in (
        *("loss/dino_global", "loss/dino_local", "loss/ibot", "loss/koleo"),
        *("grad_norm", "grad_norm/backbone", "grad_norm/dino_head", "grad_norm/ibot_head"),
        *("schedule/lr", "schedule/last_layer_lr", "schedule/weight_decay", "schedule/teacher_momentum"),
        *("schedule/teacher_temperature", "schedule/local_loss_weight"),
        *("images_per_second", "prototypes/dino_entropy", "prototypes/ibot_entropy"),
    ):
        assert name in logged, name


def test_accumulation_changes_nothing_but_rounding(tmp_path):
    # With the small LayerScale all images look alike at first, and KoLeo's logarithm of their distances would be all
    # rounding.
    backbone = {**BACKBONE, "layerscale_value": 1.0}
    run = {"backbone": backbone, "max_steps": 5, "precision": "fp32"}
    whole = make_trainer(tmp_path / "whole", **run)
    parts = make_trainer(tmp_path / "parts", **run, per_device_train_batch_size=4)
    assert parts.args.gradient_accumulation_steps == 4
    whole.train()
    parts.train()
    torch.testing.assert_close(losses(parts), losses(whole), rtol=1e-5, atol=0)
    for name, tensor in parts.model.named_parameters():
        torch.testing.assert_close(tensor, whole.model.get_parameter(name), rtol=1e-4, atol=2e-5, msg=name)
    for ours, theirs in zip(parts.state.log_history, whole.state.log_history, strict=True):
        for name in ("loss/koleo", "loss/ibot", "prototypes/dino_entropy", "prototypes/ibot_entropy"):
            if name in theirs:
                assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name


def test_checkpoint_holds_the_teacher_and_no_pickled_arguments(tmp_path):
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=6)
    trainer.train()
    checkpoint = tmp_path / "checkpoint-6"
    assert not (checkpoint / "training_args.bin").exists()
    assert (checkpoint / "recipe.yaml").is_file()
    teacher = checkpoint / "teacher"
    for name in ("config.json", "model.safetensors", "extras.safetensors", "preprocessor_config.json", "README.md"):
        assert (teacher / name).is_file(), name
    assert json.loads((teacher / "config.json").read_text())["model_type"] == "dinov3_vit"

    backbone = DINOv3ViTModel.from_pretrained(teacher)
    for name, tensor in backbone.state_dict().items():
        assert torch.equal(tensor, trainer.model.teacher.backbone.state_dict()[name]), name
    heads = load_file(teacher / "heads.safetensors")
    assert torch.equal(heads["ibot_head.last_layer.weight"], trainer.model.teacher.ibot_head.last_layer.weight)


def test_last_layer_stands_still_while_frozen(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=3, freeze_last_layer_steps=3)
    start = trainer.model.student.dino_head.last_layer.weight.clone()
    other = trainer.model.student.dino_head.mlp[0].weight.clone()
    trainer.train()
    assert torch.equal(trainer.model.student.dino_head.last_layer.weight, start)
    assert not torch.equal(trainer.model.student.dino_head.mlp[0].weight, other)
