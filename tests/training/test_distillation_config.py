"""A distillation's recipe: what is the run's, what a student's, what is refused, what a resumed run may not change."""

from pathlib import Path

import pytest
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import TrainingArguments

from dinov3_hf.models.dinov3_convnext.configuration_dinov3_convnext import DINOv3ConvNextConfig
from dinov3_hf.models.dinov3_convnext.modeling_dinov3_convnext import DINOv3ConvNextModel
from dinov3_hf.models.dinov3_vit.image_processing import build_image_processor
from dinov3_hf.training.arguments import parse_arguments
from dinov3_hf.training.distillation_config import OF_A_STUDENT, DistillationConfig
from dinov3_hf.training.resume import _differences
from tests.testing_utils import save_tiny_vit
from tests.training.test_distillation_teacher import HEAD, save_heads
from tests.training.test_distillation_trainer import STUDENTS, VIT, make_args

VIT_OF_8 = {**VIT, "patch_size": 8}
SIZES = {"global_batch_size": 16, "max_steps": 6}
CONVNEXT = STUDENTS["convnext"]["backbone"]


@pytest.fixture(scope="module")
def teachers(tmp_path_factory) -> Path:
    """Folders of teachers: vit (patch 4, with heads), vit8, bare (no heads), no_ibot, grey, convnext (no heads)."""
    folder = tmp_path_factory.mktemp("teachers")
    sizes = {"vit": {}, "vit8": {"patch_size": 8}, "bare": {}, "no_ibot": {}, "grey": {"num_channels": 1}}
    for name, fields in sizes.items():
        save_tiny_vit(folder / name, **{"patch_size": 4, **fields})
        if name != "bare":
            save_heads(folder / name)
    heads = folder / "no_ibot" / "heads.safetensors"
    with safe_open(heads, "pt") as file:
        metadata = {name: value for name, value in file.metadata().items() if name != "ibot_head"}
    dino = {name: tensor for name, tensor in load_file(heads).items() if name.startswith("dino_head")}
    save_file(dino, heads, metadata=metadata)
    DINOv3ConvNextModel(DINOv3ConvNextConfig(**_sizes(CONVNEXT))).save_pretrained(folder / "convnext")
    build_image_processor(image_size=32).save_pretrained(folder / "convnext")
    return folder


def _sizes(backbone):
    return {name: value for name, value in backbone.items() if name not in ("model_type", "drop_path_rate")}


@pytest.fixture
def make(teachers, tmp_path):
    """Makes a configuration with the three tiny students; `teacher` is one of `teachers`."""

    def make_config(teacher="vit", **fields) -> DistillationConfig:
        return make_args(tmp_path / "out", teachers / teacher, **{**SIZES, **fields})

    return make_config


@pytest.fixture
def parse(teachers, tmp_path):
    """Reads a command line that follows a recipe with the three tiny students."""

    def parse_words(*words: str) -> DistillationConfig:
        make_args(tmp_path / "out", teachers / "vit", **SIZES).save_yaml(tmp_path / "recipe.yaml")
        return parse_arguments(DistillationConfig, [str(tmp_path / "recipe.yaml"), *words])

    return parse_words


@pytest.fixture
def four_ranks(monkeypatch):
    monkeypatch.setattr(TrainingArguments, "world_size", property(lambda self: 4))


# ---- what is a student's, what is the run's -------------------------------------------------------------------------


def test_defaults(teachers):
    config = DistillationConfig(teacher=str(teachers / "vit"), students={"vit": {"backbone": VIT}}, use_cpu=True)
    assert (config.output_dir, config.student_ranks, config.teacher_to_student_scale) == ("runs/distill", None, 1.0)
    first, last = (config.schedules().at(step) for step in (0, config.max_steps - 1))
    assert first["teacher_temperature"] == last["teacher_temperature"] == 0.07
    assert config.freeze_last_layer_steps == 0
    student = config.student_args["vit"]
    assert (student.objective, student.cls_weight, student.patch_weight) == ("prototypes", 1, 1)
    assert (student.feature_loss, student.gram_teacher) == ("cosine", None)
    assert student.output_dir == "runs/distill/vit"


CHANGES = {
    "backbone": {**VIT, "num_hidden_layers": 3},
    "drop_path_group_size": 8,
    "dino_head": {"hidden_dim": 24},
    "ibot_head": {"bottleneck_dim": 8},
    "dino_weight": 0.5,
    "dino_global_ignore_diagonal": False,
    "ibot_weight": 0.25,
    "koleo_weight": 0.3,
    "koleo_group_size": 8,
    "koleo_topk": 2,
    "student_temperature": 0.2,
    "cls_weight": 2.0,
    "patch_weight": 3.0,
    "feature_loss": "smooth_l1",
    "gram_weight_schedule": 1.5,
    "local_loss_weight_schedule": 0.5,
    "lr_schedule": 3e-3,
    "learning_rate": 4e-3,
    "lr_scaling": "sqrt_wrt_1024",
    "weight_decay_schedule": 0.1,
    "max_grad_norm": 1.0,
    "adam_beta1": 0.8,
    "adam_beta2": 0.95,
    "adam_epsilon": 1e-6,
    "freeze_last_layer_steps": 2,
    "layerwise_lr_decay": 0.7,
    "patch_embed_lr_mult": 0.1,
    "teacher_momentum_schedule": 0.5,
    "gradient_checkpointing": "full",
    "start_from": None,  # needs a model of the same shape: test_a_student_starts_from_a_model
}


def test_every_field_of_a_block_is_tried_here():
    assert set(CHANGES) == set(OF_A_STUDENT)


def _differing(one, other) -> set[str]:
    left, right = (plain.to_dict() for plain in (one, other))
    return {name for name in left if left[name] != right[name]}


@pytest.mark.parametrize("name", sorted(set(CHANGES) - {"start_from"}))
def test_a_field_of_a_block_changes_that_student_alone(make, name):
    students = {"one": {"backbone": VIT}, "other": {"backbone": VIT}}
    before = make(students=students).student_args
    after = make(students={**students, "one": {"backbone": VIT, name: CHANGES[name]}}).student_args
    changed = {"lr_schedule": {"lr_schedule", "learning_rate"}, "learning_rate": {"lr_schedule", "learning_rate"}}
    assert _differing(before["one"], after["one"]) == changed.get(name, {name})
    assert _differing(before["other"], after["other"]) == set()


def test_what_is_beside_the_blocks_is_for_all_students(make):
    config = make(koleo_weight=0.7, dino_head={"hidden_dim": 24}, layerwise_lr_decay=0.8)
    students = config.student_args
    assert [student.koleo_weight for student in students.values()] == [0.7, 0.7, 0.0]
    assert [student.layerwise_lr_decay for student in students.values()] == [0.8, 0.8, 1.0]
    assert {student.dino_head["hidden_dim"] for student in students.values()} == {24}


def test_a_student_without_a_backbone_has_the_recipes(make):
    config = make(students={"plain": None, "wide": {"backbone": {**VIT, "hidden_size": 48}}}, backbone=VIT)
    widths = [student.backbone_config().hidden_size for student in config.student_args.values()]
    assert widths == [32, 48]


def test_the_rate_of_a_block_wins_over_the_runs(make):
    students = {
        "plain": {"backbone": VIT},
        "scheduled": {"backbone": VIT, "lr_schedule": {"start": 0.0, "peak": 5e-3, "end": 1e-6}},
        "rate": {"backbone": VIT, "learning_rate": 6e-3},
        "both": {"backbone": VIT, "lr_schedule": {"peak": 5e-3, "end": 1e-6}, "learning_rate": 7e-3},
    }
    config = make(students=students, learning_rate=2e-3, lr_schedule={"peak": 1e-3, "end": 1e-5})
    ends = {name: (args.lr_schedule.peak, args.lr_schedule.end) for name, args in config.student_args.items()}
    assert ends == {"plain": (2e-3, 1e-5), "scheduled": (5e-3, 1e-6), "rate": (6e-3, 1e-5), "both": (7e-3, 1e-6)}


def test_heads_have_the_shapes_of_the_teachers(make):
    students = {"vit": {"backbone": VIT, "ibot_head": {"hidden_dim": 8}}}
    student = make(students=students).student_args["vit"]
    assert student.dino_head == HEAD | {"mlp_bias": True}
    assert student.ibot_head == HEAD | {"hidden_dim": 8, "mlp_bias": True}
    assert student.pretraining_config().dino_head["num_prototypes"] == HEAD["num_prototypes"]


def test_precision_and_folder_of_a_student(make):
    for precision, wanted in (("bf16", True), ("fp32", False)):
        config = make(precision=precision)
        assert {student.bf16 for student in config.student_args.values()} == {wanted}
    assert [student.output_dir for student in config.student_args.values()] == [
        f"{config.output_dir}/{name}" for name in STUDENTS
    ]
    assert [student.run_name for student in config.student_args.values()] == list(STUDENTS)


def test_batches_and_seed_are_the_runs(make):
    config = make(per_device_train_batch_size=4, seed=9)
    for student in config.student_args.values():
        assert (student.train_batch_size, student.gradient_accumulation_steps) == (4, 4)
        assert (student.seed, student.max_steps, student.global_batch_size) == (9, 6, 16)


# ---- objective, grids, sizes ----------------------------------------------------------------------------------------


def test_auto_is_what_the_teacher_can_give(make):
    assert make().objective == "prototypes"
    assert make(objective="features").objective == "features"
    config = make("bare")
    assert config.objective == "features"
    assert config.mask_free
    model = config.student_args["vit"].pretraining_config()
    assert (model.objective, model.teacher_width, model.ibot_weight) == ("features", 24, 0)


def test_patches_are_predicted_unless_no_student_does(make):
    assert not make().mask_free
    one = {**STUDENTS, "vit": {**STUDENTS["vit"], "ibot_weight": 0}}
    assert not make(students=one).mask_free
    config = make("no_ibot", ibot_weight=0)
    assert config.mask_free
    assert not config.masks(*config.crop_size_mix().sizes).counts.any()


@pytest.mark.parametrize(
    ("teacher", "students", "fields", "wanted"),
    [
        ("vit", STUDENTS, {}, 4),  # of the ViT students
        ("vit", {"c": {"backbone": CONVNEXT}}, {}, 4),  # of the teacher
        ("convnext", {"c": {"backbone": CONVNEXT}}, {}, 16),
        ("convnext", {"c": {"backbone": CONVNEXT}}, {"patch_size": 8}, 8),
        ("convnext", {"v": {"backbone": VIT_OF_8}, "c": {"backbone": CONVNEXT}}, {}, 8),
    ],
)
def test_the_patches_that_are_compared(make, teacher, students, fields, wanted):
    config = make(teacher, students=students, **fields)
    assert config.patch_size == wanted
    assert {student.patch_size for student in config.student_args.values()} == {wanted}
    assert config.mask_grid(*config.crop_size_mix().sizes) == 32 // wanted


def test_the_teacher_sees_larger_crops(make):
    config = make("vit8", teacher_to_student_scale=2, global_crop_size=64, local_crop_size=64)
    for student in config.student_args.values():
        assert (student.global_crop_size, student.local_crop_size) == (32, 32)
    assert config.mask_grid(*config.crop_size_mix().sizes) == 8  # of both
    assert config.views(*config.crop_size_mix().sizes).global_crop_size == 64


def test_a_student_starts_from_a_model(make, teachers):
    there = {"patch_size": 4, "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2}
    backbone = {**there, "num_attention_heads": 2, "num_register_tokens": 2}
    students = {"again": {"backbone": backbone, "start_from": str(teachers / "bare")}, "afresh": {"backbone": VIT}}
    starts = [student.start_from for student in make(students=students).student_args.values()]
    assert starts == [str(teachers / "bare"), None]


# ---- ranks ----------------------------------------------------------------------------------------------------------


def test_ranks_that_are_given(make, four_ranks):
    config = make(student_ranks={"convnext": 1, "vit": 1, "gated": 2})
    assert config.split == {"vit": 1, "gated": 2, "convnext": 1}
    assert list(config.split) == list(STUDENTS)
    assert [student.world_size for student in config.student_args.values()] == [1, 2, 1]
    assert [student.train_batch_size for student in config.student_args.values()] == [16, 8, 16]
    assert (config.world_size, config.train_batch_size) == (4, 4)  # of the teacher


def test_groups_have_batches_of_their_own(make, four_ranks):
    """Stochastic depth in groups of 16 images needs 16 on a rank, as the group has, not the 4 of all ranks in turn."""
    only = {"vit": STUDENTS["vit"]}
    with pytest.raises(ValueError, match="drop_path_group_size 8 does not divide the 4 images"):
        make(students=only, drop_path_group_size=8)
    students = {"vit": STUDENTS["vit"], "gated": {"backbone": {**VIT, "drop_path_rate": 0.0}}}
    ranks = {"vit": 1, "gated": 3}
    with pytest.raises(ValueError, match=r"student gated: global_batch_size 16 is not a multiple of the .* ranks 3"):
        make(students=students, drop_path_group_size=8, student_ranks=ranks)
    config = make(students=students, drop_path_group_size=8, student_ranks={"vit": 2, "gated": 2})
    assert config.student_args["vit"].train_batch_size == 8
    small = make(student_ranks={"vit": 1, "gated": 1, "convnext": 2}, per_device_train_batch_size=4)
    assert [args.gradient_accumulation_steps for args in small.student_args.values()] == [4, 4, 2]


def test_ranks_that_are_measured_are_given_later(make, four_ranks):
    config = make(student_ranks="auto", drop_path_group_size=8)
    assert config.split is None
    possible = [count for count in range(1, 5) if config.can_have("vit", count)]
    assert possible == [1, 2]  # 16 images in groups of 8
    config.split_ranks({"vit": 1, "gated": 1, "convnext": 2})
    assert config.student_args["convnext"].train_batch_size == 8


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ({"vit": 1, "gated": 1, "convnext": 1}, r"\{vit: 1, gated: 1, convnext: 1\} are 3 ranks, but 4 have been"),
        ({"vit": 1, "gated": 1}, r"must name each student once: \{vit: 1, gated: 1, convnext: 1\}"),
        ({"vit": 1, "gated": 1, "other": 2}, "must name each student once"),
        ({"vit": 0, "gated": 2, "convnext": 2}, "student_ranks.vit is 0; expected an integer of 1 or more"),
        ({"vit": 1.5, "gated": 1.5, "convnext": 1}, "student_ranks.vit is 1.5; expected an integer"),
        ({"vit": True, "gated": 2, "convnext": 1}, "student_ranks.vit is True; expected an integer"),
        ("equal", "student_ranks is 'equal'; expected null, auto or a mapping of names"),
    ],
)
def test_ranks_that_are_refused(make, four_ranks, ranks, message):
    assert_refused(message, make, student_ranks=ranks)


@pytest.mark.parametrize("ranks", ["auto", {"vit": 1, "gated": 1, "convnext": 1}])
def test_fewer_ranks_than_students(make, ranks):
    assert_refused("3 students need as many ranks or more, but this run has 1; start", make, student_ranks=ranks)


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_zero_has_one_network(make, engine):
    assert_refused(f"engine {engine} trains one network, but there are 3 students", make, engine=engine)


# ---- what is refused ------------------------------------------------------------------------------------------------


def assert_refused(message, make, *arguments, **fields):
    with pytest.raises((ValueError, OSError), match=message) as error:
        make(*arguments, **fields)
    assert "\n" not in str(error.value)


def with_entry(name: str, **entries):
    return {**STUDENTS, name: {**STUDENTS[name], **entries}}


@pytest.mark.parametrize(
    ("teacher", "fields", "message"),
    [
        ("bare", {"objective": "prototypes"}, "prototypes needs the heads .* set objective: features"),
        ("no_ibot", {}, "student vit: ibot_weight is 1, but teacher .* has no iBOT head, .* set ibot_weight: 0"),
        ("vit", {"dino_head": {"num_prototypes": 64}}, "dino_head.num_prototypes is 64, but .* has 32, .* leave it"),
        (
            "vit",
            {"students": with_entry("gated", ibot_head={"num_prototypes": 16})},
            "student gated: ibot_head.num_prototypes is 16, but the iBOT head of teacher .* has 32",
        ),
        ("vit8", {}, "teacher has patches of 8 pixels, the students of 4; set teacher_to_student_scale: 2"),
        (
            "vit",
            {"students": with_entry("gated", backbone=VIT_OF_8)},
            "students vit and gated have patches of 4 and 8 pixels, .* give both the same backbone.patch_size",
        ),
        ("vit", {"patch_size": 8}, "patch_size is 8, but the patches of student vit have 4 pixels; leave"),
        ("vit", {"patch_size": 0, "students": {"c": {"backbone": CONVNEXT}}}, "patch_size 0 is no number of pixels"),
        ("vit", {"patch_size": 5, "students": {"c": {"backbone": CONVNEXT}}}, "32 is not a multiple of patch_size 5"),
        ("vit", {"teacher_to_student_scale": 0}, "teacher_to_student_scale 0 is no factor above 0; use 1"),
        ("vit", {"teacher_to_student_scale": float("nan")}, "teacher_to_student_scale nan is no factor"),
        ("vit", {"teacher_to_student_scale": float("inf")}, "teacher_to_student_scale inf is no factor"),
        ("vit", {"teacher_to_student_scale": 3}, "global_crop_size 32 .* is 10.6667 pixels for a student; choose"),
        ("vit", {"teacher_to_student_scale": 2}, "student convnext: global_crop_size 16 is not a multiple"),
        ("vit", {"global_crop_size": 30}, "30 pixels are no multiple of the patch size 4 of the teacher .* 28 or 32"),
        ("vit", {"local_crop_size": 30}, "student vit: local_crop_size 30 is not a multiple of patch_size 4"),
        ("grey", {}, "student vit: the student takes images of 3 channels, the teacher of 1; set backbone.num_chann"),
        ("none", {}, "there is no teacher folder .*none"),
        ("vit", {"gram_teacher": "copy"}, "gram_teacher copy: in distillation it is null or teacher"),
        ("bare", {"cls_weight": 0, "patch_weight": 0}, "cls_weight and patch_weight are both 0"),
        ("vit", {"students": with_entry("vit", cls_weight=-1)}, "student vit: cls_weight -1 is negative"),
        ("vit", {"students": {}}, "there are no students; name at least one"),
        ("vit", {"students": {"teacher": None}}, "student 'teacher' cannot be called so"),
        ("vit", {"students": {"checkpoint-2": None}}, "student 'checkpoint-2' cannot be called so"),
        ("vit", {"students": {"../up": None}}, r"student '../up' cannot be called so, .* use letters, digits"),
        ("vit", {"students": {7: None}}, "student 7 cannot be called so"),
        ("vit", {"students": {"vit": 3}}, r"students.vit is 3; expected a mapping"),
        ("vit", {"students": with_entry("vit", max_steps=3)}, "cannot have 'max_steps'; it is the same for all stud"),
        (
            "vit",
            {"students": with_entry("vit", lr_schedules=3)},
            "cannot have 'lr_schedules'; did you mean lr_schedule",
        ),
        ("vit", {"students": with_entry("vit", koleo_topk="a")}, "students.vit.koleo_topk is 'a'; expected an int"),
        ("vit", {"students": with_entry("vit", lr_schedule={"peek": 1})}, "student vit: lr_schedule has no entry 'pe"),
        (
            "vit",
            {"students": with_entry("vit", dino_head={"width": 1})},
            "student vit: dino_head has no entry 'width'",
        ),
        ("vit", {"students": with_entry("vit", max_grad_norm=-1)}, "student vit: max_grad_norm -1 is negative"),
        ("vit", {"students": with_entry("vit", koleo_group_size=5)}, "student vit: koleo_group_size 5 does not div"),
        ("vit", {"students": with_entry("vit", backbone={"preset": "vit"})}, "student vit: backbone.preset 'vit' is"),
        (
            "vit",
            {"students": with_entry("vit", backbone={**VIT, "hidden_size": 33})},
            "student vit: hidden_size 33 cannot be split",
        ),
        ("vit", {"students": with_entry("vit", backbone={"model_type": "dinov2"})}, "student vit: backbone model_typ"),
        (
            "vit",
            {"students": with_entry("vit", start_from="nowhere")},
            "student vit: there is no start_from folder nowhere",
        ),
    ],
)
def test_bad_recipes_get_one_line(make, teacher, fields, message):
    assert_refused(message, make, teacher, **fields)


def test_a_start_of_another_network(make, teachers):
    students = with_entry("vit", start_from=str(teachers / "bare"))
    message = "student vit: start_from .* is another network .* hidden_size is 24 there and 32"
    assert_refused(message, make, students=students)


def test_a_teacher_must_be_named():
    with pytest.raises(ValueError, match="teacher is not set; name the model to distil"):
        DistillationConfig(students=STUDENTS, use_cpu=True)


# ---- on the command line --------------------------------------------------------------------------------------------


def test_words_reach_into_blocks(parse):
    config = parse(
        *("--students.vit.lr_schedule.peak", "3e-3", "--students.gated.backbone.num_hidden_layers", "1"),
        *("--students.new", "{backbone: {preset: vits16, patch_size: 4}}", "--koleo_weight", "0.2"),
    )
    assert list(config.student_args) == [*STUDENTS, "new"]
    assert config.student_args["vit"].lr_schedule.peak == 3e-3
    assert config.student_args["gated"].lr_schedule.peak == 2e-3
    assert config.student_args["gated"].backbone_config().num_hidden_layers == 1
    assert config.student_args["new"].backbone_config().hidden_size == 384
    assert config.student_args["vit"].koleo_weight == 0.2


def test_a_word_changes_what_the_block_has_from_the_run(parse):
    run = {"start": 0.0, "peak": 1e-3, "end": 1e-5, "warmup_steps": 2}
    config = parse("--lr_schedule", str(run), "--students.vit.lr_schedule.peak", "3e-3")
    assert config.student_args["vit"].lr_schedule.to_plain() == {**run, "peak": 3e-3}
    assert config.student_args["convnext"].lr_schedule.to_plain() == run


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--students.vit.lr_schedules", "3"), "students.vit cannot have 'lr_schedules'; did you mean lr_schedule"),
        (("--students.vti.lr_schedule.peak", "3"), "there is no 'vti' in students; did you mean vit"),
        (("--students", "{a: {}, a: {}}"), "--students line 1 is not valid YAML: the key a stands twice"),
        (("--students", "[a, b]"), r"--students is '\[a, b\]'; expected a mapping"),
        (("--objective", "both"), "--objective is 'both'; expected one of auto, prototypes, features"),
        (("--start_from", "runs/a"), "start_from is not read .* set students.NAME.start_from"),
        (("--from", "runs/a"), "start_from is not read"),
        (("--start_with", "teacher"), "start_with is not read .* set start_from in its block"),
        (("--crop_sizes", "[]"), "crop_sizes is not read .* set global_crop_size and local_crop_size"),
        (("--gram_crop_size", "64"), "gram_crop_size is not read .* set gram_teacher: teacher"),
        (("--push_to_hub", "true"), "push_to_hub is not read .* dinov3-hf push OUTPUT_DIR/STUDENT OWNER/NAME"),
        (("--hub_model_id", "me/a"), "hub_model_id is not read"),
        (("--num_ranks", "2"), r"num_ranks is not read .* set student_ranks: \{NAME: 1, ...\}"),
    ],
)
def test_bad_words_get_one_line(parse, words, message):
    assert_refused(message, parse, *words)


def test_a_name_twice_in_a_file(tmp_path):
    (tmp_path / "twice.yaml").write_text("students:\n  vit: {}\n  vit: {}\n")
    assert_refused("line 3 is not valid YAML: the key vit stands twice", read, tmp_path / "twice.yaml")


def read(path: Path) -> DistillationConfig:
    return parse_arguments(DistillationConfig, [str(path)])


# ---- the recipe of a run --------------------------------------------------------------------------------------------


def test_the_recipe_reads_back(make, tmp_path):
    students = with_entry("vit", learning_rate=2e-3, teacher_momentum_schedule={"peak": 0.9, "end": 1.0})
    config = make(students=students, gram_teacher="teacher", lr_schedule={"start": 0, "peak": 1e-3, "warmup_steps": 2})
    config.save_yaml(tmp_path / "recipe.yaml")
    again = read(tmp_path / "recipe.yaml")
    assert again == config
    assert again.student_args == config.student_args
    assert again.recipe() == config.recipe()
    written = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    assert (written["objective"], written["patch_size"], written["student_ranks"]) == ("auto", None, None)
    assert "num_ranks" not in written


def changes(one: DistillationConfig, other: DistillationConfig) -> list[tuple]:
    return list(_differences(*(DistillationConfig.result_fields(config.recipe()) for config in (one, other))))


@pytest.mark.parametrize(
    ("fields", "difference"),
    [
        ({"students": with_entry("vit", lr_schedule=2.0)}, ("students.vit.lr_schedule", 1e-3, 2.0)),
        ({"students": with_entry("vit", learning_rate=2.0)}, ("students.vit.lr_schedule", 1e-3, 2.0)),
        ({"students": with_entry("gated", koleo_topk=2)}, ("students.gated.koleo_topk", 1, 2)),
        ({"students": with_entry("vit", patch_weight=2.0)}, ("students.vit.patch_weight", 1.0, 2.0)),
        (
            {"students": with_entry("vit", backbone={**VIT, "num_register_tokens": 2})},
            ("students.vit.backbone.num_register_tokens", 1, 2),
        ),
        ({"objective": "features"}, ("objective", "auto", "features")),
        ({"seed": 1}, ("seed", 42, 1)),
        ({"gram_teacher": "teacher"}, ("gram_teacher", None, "teacher")),
    ],
)
def test_a_resumed_run_names_what_is_other(make, fields, difference):
    assert changes(make(), make(**fields)) == [difference]


def test_parts_of_a_schedule_are_named(make):
    one, other = (make(students=with_entry("vit", lr_schedule={"peak": peak, "end": 0.0})) for peak in (1.0, 2.0))
    assert ("students.vit.lr_schedule.peak", 1.0, 2.0) in changes(one, other)


def test_students_that_come_and_go_are_named(make):
    [(name, there, here)] = changes(make(), make(students={name: STUDENTS[name] for name in ("vit", "gated")}))
    assert (name, here) == ("students.convnext", None)
    assert there["backbone"]["depths"] == [1, 1, 2, 1]


def test_another_teacher_is_another_run(make, teachers):
    there, here = (str(teachers / name) for name in ("vit", "bare"))
    assert ("teacher", there, here) in changes(make(), make("bare"))


def test_what_only_the_machine_needs_may_change(make, four_ranks):
    given = make(
        student_ranks={"vit": 1, "gated": 1, "convnext": 2}, per_device_train_batch_size=4, dataloader_num_workers=2,
        students=with_entry("vit", gradient_checkpointing="full"), save_steps=5,
    )  # fmt: skip
    assert changes(make(), given) == []
