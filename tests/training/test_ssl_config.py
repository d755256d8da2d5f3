"""SSLConfig: defaults, arithmetic of the batch, what is refused, and recipes that read back."""

import dataclasses
import json
import pickle

import pytest
import torch
from accelerate.utils import DynamoBackend, TorchDynamoPlugin
from transformers import TrainingArguments

from dinov3_hf._compat import HAS_ACTIVATION_CHECKPOINTING
from dinov3_hf.errors import ArgumentError
from dinov3_hf.models.dinov3_pretraining.backbones import own_annotations
from dinov3_hf.models.dinov3_pretraining.modeling_dinov3_pretraining import DINOv3ForPreTraining
from dinov3_hf.training import precision, recipe_config
from dinov3_hf.training.batch_arithmetic import check_koleo_groups, micro_batch_size
from dinov3_hf.training.recipe_config import RecipeConfig
from dinov3_hf.training.schedules import Schedule
from dinov3_hf.training.ssl_config import SSLConfig
from tests.testing_utils import require_package

TINY = {
    "backbone": {"patch_size": 4, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
                 "num_attention_heads": 2},
    "global_crop_size": 16,
    "local_crop_size": 8,
    "global_batch_size": 8,
    "max_steps": 10,
}  # fmt: skip


def tiny(tmp_path, **fields) -> SSLConfig:
    return SSLConfig(**{"output_dir": str(tmp_path), **TINY, **fields})


def test_defaults_are_the_published_values():
    config = SSLConfig()
    values = config.schedules().at(12_500)  # end of the warm-up
    assert values["lr"] == pytest.approx(1e-3 * 4 * 2**0.5)
    assert config.schedules().freeze_last_layer_steps == 1250
    pretraining = config.pretraining_config()
    head = {"num_prototypes": 65536, "bottleneck_dim": 256, "hidden_dim": 2048, "num_layers": 3, "mlp_bias": True}
    assert pretraining.dino_head == pretraining.ibot_head == head
    assert pretraining.koleo_weight == 0.1
    assert pretraining.backbone_config.hidden_size == 384


def test_docstrings_list_every_inherited_default_that_is_changed():
    inherited = {f.name: f for f in dataclasses.fields(TrainingArguments)}
    for cls in (RecipeConfig, SSLConfig):
        for f in dataclasses.fields(cls):
            parent = inherited.get(f.name)
            if parent is not None and (f.default, f.default_factory) != (parent.default, parent.default_factory):
                assert f"`{f.name}" in (cls.__doc__ + RecipeConfig.__doc__), f.name


def test_unused_fields_exist_in_transformers_or_did():
    names = {f.name for f in dataclasses.fields(TrainingArguments)}
    known_in_one_version_only = {"warmup_ratio", "activation_checkpointing", "activation_checkpointing_kwargs"}
    assert set(SSLConfig.UNUSED_FIELDS) - names <= known_in_one_version_only


def test_every_own_field_has_a_group_and_help():
    inherited = {f.name for f in dataclasses.fields(TrainingArguments)}
    for f in dataclasses.fields(SSLConfig):
        if f.name not in inherited:
            assert f.metadata["group"] in (
                recipe_config.CHANGES_THE_RESULT,
                recipe_config.ORCHESTRATION,
                recipe_config.EFFICIENCY,
            )
            assert f.metadata["help"].endswith(".")


def test_pretraining_config_carries_every_setting(tmp_path):
    config = tiny(
        tmp_path,
        dino_head={"num_prototypes": 32},
        ibot_head={"num_prototypes": 24, "num_layers": 2},
        koleo_weight=0.2,
        koleo_group_size=4,
        koleo_topk=2,
        dino_weight=0.5,
        ibot_weight=2.0,
        dino_global_ignore_diagonal=False,
        student_temperature=0.2,
        sinkhorn_iterations=5,
        attn_implementation="eager",
    )
    built = config.pretraining_config()
    assert built.dino_head["num_prototypes"] == 32
    assert built.dino_head["hidden_dim"] == 2048
    assert (built.ibot_head["num_prototypes"], built.ibot_head["num_layers"]) == (24, 2)
    for name in ("koleo_weight", "koleo_group_size", "koleo_topk", "dino_weight", "ibot_weight"):
        assert getattr(built, name) == getattr(config, name)
    for name in ("dino_global_ignore_diagonal", "student_temperature", "sinkhorn_iterations"):
        assert getattr(built, name) == getattr(config, name)
    assert built.backbone_config.hidden_size == 16
    assert built.backbone_config._attn_implementation == "eager"
    network = DINOv3ForPreTraining(built)
    for backbone in (network.student.backbone, network.teacher.backbone):
        assert backbone.config._attn_implementation == "eager"


def test_a_preset_can_be_changed(tmp_path):
    config = tiny(tmp_path, backbone={"preset": "vits16", "drop_path_rate": 0.25, "patch_size": 8})
    backbone = config.backbone_config()
    assert (backbone.hidden_size, backbone.drop_path_rate, backbone.patch_size) == (384, 0.25, 8)
    assert backbone.num_register_tokens == 4


def test_views_and_masks_follow_the_recipe(tmp_path):
    config = tiny(tmp_path, num_local_crops=3, horizontal_flip=False, mask_probability=0.25, mask_ratio=[0.2, 0.4])
    views = config.views(*config.crop_size_mix().sizes)
    assert (views.global_crop_size, views.local_crop_size, views.num_local_crops) == (16, 8, 3)
    assert views.horizontal_flip is False
    masks = config.masks(*config.crop_size_mix().sizes)
    assert (masks.grid_height, masks.grid_width) == (4, 4)
    assert (masks.counts > 0).sum() == int(2 * 8 * 0.25)


# --- the batch -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("wanted", "micro", "accumulation"), [(None, 8, 1), (8, 8, 1), (2, 2, 4), (1, 1, 8)])
def test_accumulation_follows_from_the_batch(tmp_path, wanted, micro, accumulation):
    config = tiny(tmp_path, per_device_train_batch_size=wanted, koleo_group_size=micro)
    assert config.per_device_train_batch_size == config.train_batch_size == micro
    assert config.gradient_accumulation_steps == accumulation


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, 8, None), r"global_batch_size 4 is smaller than the number of ranks 8; use at least 8, or start fewer"),
        ((20, 8, None), r"global_batch_size 20 is not a multiple of the number of ranks 8; use 16 or 24"),
        ((96, 8, 5), r"per_device_train_batch_size 5 does not divide the 12 images that each rank has .* use 4 or 6"),
        ((96, 8, 99), r"per_device_train_batch_size 99 .* use 12"),
        ((96, 8, 0), r"per_device_train_batch_size 0 .* use 1"),
    ],
)
def test_batches_that_do_not_divide_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        micro_batch_size(*arguments)


def test_koleo_groups_must_tile_the_batch():
    check_koleo_groups(None, 1, 64, 1)
    check_koleo_groups(16, 15, 64, 4)
    check_koleo_groups(None, 1, 1, 1)  # one image has no neighbour; the loss of an empty set is the objective's affair
    with pytest.raises(ValueError, match=r"koleo_group_size 48 does not divide the 64 images .* use 32 or 64"):
        check_koleo_groups(48, 1, 64, 1)
    with pytest.raises(
        ValueError, match=r"koleo_topk 4 needs groups of more than 4 images, but they have 4; .* 1 to 3"
    ):
        check_koleo_groups(4, 4, 64, 1)
    with pytest.raises(ValueError, match=r"null is the whole global batch, .* 16 of its 64 images; set .* to 16"):
        check_koleo_groups(None, 1, 16, 4)


# --- precision -------------------------------------------------------------------------------------------------------


def test_precision_auto_on_a_cpu_depends_on_the_width(monkeypatch, tmp_path):
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: True)
    resolve = precision.resolve_precision
    assert resolve("auto", precision.MIN_CPU_BF16_WIDTH, use_cpu=True) == "bf16"
    assert resolve("auto", precision.MIN_CPU_BF16_WIDTH - 1, use_cpu=True) == "fp32"
    assert resolve("bf16", 16, use_cpu=True) == "bf16"
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: False)
    assert resolve("auto", 4096, use_cpu=True) == "fp32"
    assert resolve("fp32", 4096, use_cpu=True) == "fp32"


def test_precision_sets_what_the_trainer_reads(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")  # a launcher's default must not decide
    bf16 = tiny(tmp_path, precision="bf16", use_cpu=True)
    assert (bf16.bf16, bf16.mixed_precision) == (True, "bf16")
    fp32 = tiny(tmp_path, precision="fp32")
    assert (fp32.bf16, fp32.mixed_precision) == (False, "no")


@pytest.mark.skipif(torch.accelerator.is_available(), reason="has an accelerator")
def test_a_machine_without_a_gpu_needs_no_flag(tmp_path):
    assert tiny(tmp_path, precision="bf16").device.type == "cpu"
    plain = tiny(tmp_path, precision="fp32")
    assert plain.use_cpu  # without it, processes that torchrun starts would not find each other
    assert "use_cpu" not in plain.recipe()


@pytest.mark.filterwarnings("error::FutureWarning")
@pytest.mark.parametrize(
    ("given", "mode"),
    [(True, "full"), (False, "none"), ("full", "full"), ("selective", "selective"), ("none", "none")],
)
def test_gradient_checkpointing_is_a_mode_that_the_trainer_does_not_see(tmp_path, given, mode):
    config = tiny(tmp_path, gradient_checkpointing=given)
    assert config.gradient_checkpointing == mode
    assert not config.gradient_checkpointing  # transformers 5.8
    if HAS_ACTIVATION_CHECKPOINTING:
        assert not config.activation_checkpointing
    assert config.recipe()["gradient_checkpointing"] == given
    assert tiny(tmp_path).gradient_checkpointing == "none"


def test_neither_the_recipe_nor_the_launcher_lets_the_trainer_compile(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    config = tiny(tmp_path, torch_compile=True)
    assert config.torch_compile
    plugin = TorchDynamoPlugin(backend=config.torch_compile_backend, mode=config.torch_compile_mode)
    assert plugin.backend == DynamoBackend.NO


@pytest.mark.parametrize("name", ["torch_compile_mode", "torch_compile_backend", "gradient_checkpointing_kwargs"])
def test_settings_of_what_the_trainer_does_not_do_are_refused(tmp_path, name):
    with pytest.raises(ArgumentError, match=f"{name} is not read by this trainer; set "):
        tiny(tmp_path, **{name: {} if name.endswith("kwargs") else "default"})


@require_package("deepspeed")
@pytest.mark.parametrize("fields", [{"gradient_checkpointing": "selective"}, {"torch_compile": True}])
def test_zero3_stays_out_of_blocks_that_are_partly_recomputed_or_compiled(tmp_path, fields):
    (name,) = fields
    with pytest.raises(ArgumentError, match=rf"{name} .*does not go with engine zero3.* or engine: fsdp2\.$"):
        tiny(tmp_path, engine="zero3", **fields)
    assert tiny(tmp_path, engine="zero3", gradient_checkpointing="full").gradient_checkpointing == "full"


@pytest.mark.parametrize("capability", [None, (8, 6), (8, 9), (9, 0)])
def test_fp8_is_refused_where_there_is_none(tmp_path, monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "an A40")
    monkeypatch.setattr(precision, "find_spec", lambda name: name == "torchao")
    if capability is None:
        with pytest.raises(
            ValueError, match=r"fp8 needs a GPU .* 8\.9 or more, and this run has none; set fp8: false"
        ):
            tiny(tmp_path, fp8=True, precision="bf16")
    elif capability < (8, 9):
        with pytest.raises(ValueError, match=r"8\.9 or more, and an A40 has 8\.6; set fp8: false"):
            precision.check_fp8(True, use_cpu=False)
    else:
        precision.check_fp8(True, use_cpu=False)
        with pytest.raises(ValueError, match="this run has none"):
            precision.check_fp8(True, use_cpu=True)
        with pytest.raises(ValueError, match="precision is fp32; set precision: bf16"):
            precision.check_fp8(False, use_cpu=False)
        monkeypatch.setattr(precision, "find_spec", lambda name: None)
        with pytest.raises(ArgumentError, match=r"torchao, which is not installed; pip install 'dinov3-hf\[fp8\]'"):
            precision.check_fp8(True, use_cpu=False)


# --- the learning rate -----------------------------------------------------------------------------------------------


def test_learning_rate_moves_the_peak_and_what_is_level_with_it(tmp_path):
    config = tiny(tmp_path, learning_rate=1e-2)
    assert config.lr_schedule == Schedule(0.0, 1e-2, 1e-6, warmup_steps=0.1)
    flat = tiny(tmp_path, lr_schedule={"start": 0.0, "peak": 5e-5, "end": 5e-5, "warmup_steps": 3}, learning_rate=3e-5)
    assert flat.lr_schedule == Schedule(0.0, 3e-5, 3e-5, warmup_steps=3)
    assert tiny(tmp_path, lr_schedule=1e-4, learning_rate=2e-4).lr_schedule == Schedule.constant(2e-4)
    assert tiny(tmp_path).learning_rate == 1e-3
    with pytest.raises(ArgumentError, match=r"rises to its end 1.25e-05; set lr_schedule.end instead"):
        tiny(tmp_path, lr_schedule={"peak": 0.0, "end": 1.25e-5}, learning_rate=1e-4)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_train_epochs": 10}, r"num_train_epochs is not read by this trainer; .* set max_steps"),
        ({"warmup_steps": 10}, r"warmup_steps is not read .* set lr_schedule.warmup_steps"),
        ({"lr_scheduler_type": "cosine"}, r"lr_scheduler_type is not read .* set lr_schedule"),
        ({"weight_decay": 0.1}, r"weight_decay is not read .* set weight_decay_schedule"),
        ({"gradient_accumulation_steps": 2}, r"gradient_accumulation_steps .* set per_device_train_batch_size"),
        ({"bf16": True}, r"bf16 is not read .* set precision"),
        ({"fp16": True}, r"fp16 is not read .* set precision"),
        ({"label_smoothing_factor": 0.1}, r"label_smoothing_factor is not read"),
        ({"dataloader_drop_last": False}, r"dataloader_drop_last is not read"),
        ({"remove_unused_columns": True}, r"remove_unused_columns is not read"),
        ({"backbone": {"preset": "vit16s"}}, r"backbone.preset 'vit16s' is unknown; did you mean vits16\?"),
        ({"backbone": {"hidden_sizes": 16}}, r"backbone has no entry 'hidden_sizes'; did you mean hidden_size\?"),
        ({"backbone": {"hidden_size": "16"}}, r"backbone.hidden_size is '16'; expected an integer"),
        ({"dino_head": {"prototypes": 8}}, r"dino_head has no entry 'prototypes'; did you mean num_prototypes\?"),
        ({"ibot_head": {"mlp_bias": 1}}, r"ibot_head.mlp_bias is 1; expected true or false"),
        ({"lr_schedule": {"peek": 1}}, r"lr_schedule has no entry 'peek'"),
        ({"save_only_model": True}, r"save_only_model is not read .* teacher/ in a checkpoint is the model alone"),
        ({"load_best_model_at_end": True}, r"load_best_model_at_end is not read"),
        ({"save_strategy": "best"}, r"save_strategy best is not supported; use steps with save_total_limit"),
        ({"hub_always_push": True}, r"hub_always_push is not read .* the teacher is uploaded once"),
        ({"hub_strategy": "checkpoint"}, r"hub_strategy checkpoint is not supported, .*; use end\."),
    ],
)
def test_arguments_that_cannot_be_parsed(tmp_path, fields, message):
    with pytest.raises(ArgumentError, match=message) as error:
        tiny(tmp_path, **fields)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"global_crop_size": 18}, r"global_crop_size 18 is not a multiple of patch_size 4; use 16 or 20"),
        ({"local_crop_size": 3}, r"local_crop_size 3 is not a multiple of patch_size 4; use 4"),
        ({"global_batch_size": 0}, r"global_batch_size 0 is not positive"),
        ({"per_device_train_batch_size": 3}, r"per_device_train_batch_size 3 does not divide the 8 images .* 2 or 4"),
        ({"koleo_group_size": 3}, r"koleo_group_size 3 does not divide the 8 images"),
        ({"per_device_train_batch_size": 2, "koleo_group_size": 4}, r"does not divide the 2 images of one forward"),
        ({"per_device_train_batch_size": 2}, r"koleo_group_size null .* sees 2 of its 8 images; set koleo_group_size"),
        ({"max_steps": -1}, r"max_steps -1 is not positive"),
        ({"lr_schedule": {"start": 0, "peak": 1, "warmup_steps": 20}}, r"warmup_steps 20 is longer than the run"),
        ({"mask_ratio": [0.5, 0.1]}, r"mask_ratio \[0.5, 0.1\] must be a smaller and a larger share"),
        ({"mask_probability": 1.5}, r"mask_probability 1.5 is no probability"),
        ({"student_temperature": 0.0}, r"student_temperature 0.0 is not positive"),
        ({"image_mean": [0.5]}, r"image_mean has 1 values, but the backbone's num_channels is 3"),
        ({"backbone": {"hidden_size": 17}}, r"hidden_size 17"),
        ({"blur_probabilities": [0.5]}, r"blur_probabilities \[0.5\] must be 3 numbers"),
        ({"save_steps": 0.5, "save_strategy": "never"}, r"never"),
        ({"keep_every_steps": 0}, r"keep_every_steps 0 is not positive; use null"),
        ({"save_steps": 0, "save_strategy": "steps"}, r"save_steps 0 is not positive; for no checkpoints use"),
        ({"image_std": [0.2, 0.0, 0.2]}, r"image_std \[0.2, 0.0, 0.2\] has a value that is not positive"),
        (
            {"keep_every_steps": 10, "save_steps": 4, "save_strategy": "steps"},
            r"not a multiple of save_steps 4.* use 12",
        ),
    ],
)
def test_values_that_cannot_work(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        tiny(tmp_path, **fields)


def test_an_output_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(ValueError, match=r"output_dir .*run is a file; name a folder"):
        SSLConfig(output_dir=str(tmp_path / "run"))


def test_a_backbone_that_cannot_be_masked_is_refused(tmp_path):
    backbone = {"model_type": "dinov3_convnext", "depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 16, 16]}
    with pytest.raises(ValueError, match="a dinov3_convnext backbone has no mask token"):
        SSLConfig(output_dir=str(tmp_path), backbone=backbone)
    with pytest.raises(ArgumentError, match=r"backbone has no entry 'depth'; did you mean depths\?"):
        SSLConfig(output_dir=str(tmp_path), backbone={**backbone, "depth": [1]})


def test_the_backbone_is_told_the_size_it_is_trained_at(tmp_path):
    sizes = {"output_dir": str(tmp_path), "global_crop_size": 64, "local_crop_size": 32}
    assert SSLConfig(**sizes).backbone_config().image_size == 64
    assert SSLConfig(**sizes, backbone={"preset": "vits16", "image_size": 224}).backbone_config().image_size == 224


def test_local_crops_that_are_not_cut_may_have_any_size(tmp_path):
    tiny(tmp_path, num_local_crops=0, local_crop_size=7)


# --- reading back ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"learning_rate": 1e-2, "per_device_train_batch_size": 2, "koleo_group_size": 2, "save_strategy": "no"},
        {"lr_schedule": {"start": 0, "peak": 1, "warmup_steps": 3, "style": "dinov2"}, "precision": "fp32"},
        {"report_to": ["none"], "run_name": "1e-4", "local_loss_weight_schedule": {"peak": 1, "end": 0.5}},
        {"gradient_checkpointing": True, "mask_ratio": (0.1, 0.3), "koleo_group_size": 4},
    ],
)
def test_a_saved_recipe_reads_back_equal(tmp_path, fields):
    from dinov3_hf.training.arguments import parse_arguments

    config = tiny(tmp_path, **fields)
    config.save_yaml(tmp_path / "recipe.yaml")
    again = parse_arguments(SSLConfig, [str(tmp_path / "recipe.yaml")])
    if "mask_ratio" not in fields:  # YAML has lists only
        assert again == config
    assert again.recipe() == config.recipe()
    assert SSLConfig(**config.recipe()).recipe() == config.recipe()


def test_a_recipe_keeps_what_was_left_to_the_machine_and_no_secret(tmp_path):
    recipe = tiny(tmp_path, hub_token="secret", resume_from_checkpoint="last").recipe()
    assert recipe["per_device_train_batch_size"] is None
    assert recipe["precision"] == "auto"
    for name in ("hub_token", "resume_from_checkpoint", "learning_rate", "gradient_accumulation_steps", "bf16"):
        assert name not in recipe


def test_integrations_and_pickle_can_read_it(tmp_path):
    config = tiny(tmp_path)
    assert json.loads(config.to_json_string())["lr_schedule"]["peak"] == 1e-3
    config.to_sanitized_dict()
    assert pickle.loads(pickle.dumps(config)) == config


def test_own_annotations_are_the_fields_of_the_family():
    annotations = own_annotations(type(SSLConfig().backbone_config()))
    assert {"hidden_size", "norm_type"} <= set(annotations)
    assert not {"_out_features", "dtype", "id2label"} & set(annotations)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lr_schedule": -1e-3}, "lr_schedule -0.001 has a value out of range; use 0 or more"),
        ({"teacher_temperature_schedule": 0.0}, "teacher_temperature_schedule 0.0 has a value out of range"),
        ({"teacher_momentum_schedule": {"peak": 0.9, "end": 2.0}}, "has a value out of range; use 0 to 1"),
        ({"dino_head": {"hidden_dim": 0}}, "dino_head.hidden_dim is 0; use 1 or more"),
    ],
)
def test_values_that_only_spoil_a_run_are_refused(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        tiny(tmp_path, **fields)
