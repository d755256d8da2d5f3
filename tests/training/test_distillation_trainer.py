"""`DistillationTrainer` on the digits, in this process: a tiny teacher and three tiny students."""

import logging
import math
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModel, TrainerCallback

from dinov3_hf.data.sources.spec import load_images
from dinov3_hf.training.callbacks import StudentsProgressCallback
from dinov3_hf.training.distillation_config import DistillationConfig
from dinov3_hf.training.distillation_teacher import load_teacher, read_teacher
from dinov3_hf.training.distillation_trainer import DistillationTrainer
from dinov3_hf.training.evaluation import Evaluator
from tests.testing_utils import save_tiny_vit
from tests.training.test_distillation_teacher import save_heads

VIT = {
    "patch_size": 4,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_register_tokens": 1,
    "layerscale_value": 1.0,
    "pos_embed_rescale": 2.0,
    "drop_path_rate": 0.3,
}
STUDENTS = {
    "vit": {"backbone": VIT},
    "gated": {"backbone": {**VIT, "use_gated_mlp": True, "num_register_tokens": 0}, "lr_schedule": 2e-3},
    "convnext": {
        "backbone": {
            "model_type": "dinov3_convnext",
            "hidden_sizes": [8, 16, 24, 32],
            "depths": [1, 1, 2, 1],
            "drop_path_rate": 0.1,
        },
        "layerwise_lr_decay": 1.0,
        "koleo_weight": 0.0,
    },
}


def make_args(output_dir: Path, teacher: Path, **overrides) -> DistillationConfig:
    values = {
        "output_dir": str(output_dir),
        "teacher": str(teacher),
        "students": STUDENTS,
        "train_data": "digits",
        "global_crop_size": 32,
        "local_crop_size": 32,
        "num_local_crops": 2,
        "global_batch_size": 8,
        "koleo_group_size": 4,
        "drop_path_group_size": 4,
        "max_steps": 12,
        "lr_schedule": 1e-3,
        "lr_scaling": "none",
        "teacher_momentum_schedule": 0.9,
        "precision": "fp32",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        **overrides,
    }
    return DistillationConfig(**values)


def make_trainer(output_dir: Path, teacher: Path, callbacks=None, eval_images=None, **overrides):
    args = make_args(output_dir, teacher, **overrides)
    images = load_images("digits", split="train")
    return DistillationTrainer(load_teacher(args.description, bf16=args.bf16), args, images, eval_images, callbacks)


def save_teacher(folder: Path, with_heads: bool = True) -> Path:
    torch.manual_seed(0)
    save_tiny_vit(folder, patch_size=4)
    if with_heads:
        save_heads(folder)
    return folder


class Watch(TrainerCallback):
    """Keeps the weights after each step, does `spoil(model)` before some, and ends the run after `last`."""

    def __init__(self, last=None, steps=(), spoil=None):
        self.last, self.steps, self.spoil = last, steps, spoil
        self.after = {}

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.after[state.global_step] = weights(model)

    def on_step_begin(self, args, state, control, model, **kwargs):
        if state.global_step + 1 in self.steps:
            self.spoil(model)

    def on_step_end(self, args, state, control, model, **kwargs):
        self.after[state.global_step] = weights(model)
        if state.global_step == self.last:
            control.should_training_stop = True


def weights(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def of(name: str, values: dict) -> dict:
    """What is a student's: weights by their names, a log entry by its keys, without what measures the machine."""
    prefixes = (f"{name}.", f"{name}/")
    return {key: value for key, value in values.items() if key.startswith(prefixes)}


def log_of(name: str, trainer) -> list[dict[str, float]]:
    return [of(name, entry) for entry in trainer.state.log_history if "loss" in entry]


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours and ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert torch.equal(tensor, theirs[key]), key


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher") / "teacher")


@pytest.fixture(scope="module")
def headless(tmp_path_factory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("headless") / "headless", with_heads=False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, teacher):
    """A run of all three students, its callback, and its folder."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    trainer = make_trainer(folder, teacher, [watch := Watch()], save_strategy="steps", save_steps=6)
    trainer.train()
    return trainer, watch, folder


# ---- learning -------------------------------------------------------------------------------------------------------


def test_every_student_learns_and_the_teacher_does_not(teacher, whole):
    trainer, watch, _ = whole
    num_steps = trainer.args.max_steps
    for student in trainer.students:
        losses = [entry[f"{student.name}/loss"] for entry in log_of(student.name, trainer)]
        assert len(losses) == num_steps
        assert sum(losses[-4:]) < sum(losses[:4]), student.name
        for name, tensor in student.model.named_parameters():
            moved = not torch.equal(tensor, watch.after[0][f"{student.name}.{name}"])
            untouched = "mask_token" in name
            assert moved != untouched, f"{student.name}.{name}"
            assert tensor.requires_grad == (name.startswith("student.") and not untouched), name
    again = load_teacher(read_teacher(str(teacher)), bf16=False)
    assert_same(trainer.teacher.state_dict(), again.state_dict())
    assert not trainer.teacher.training
    assert all(not p.requires_grad and p.grad is None for p in trainer.teacher.parameters())


def test_the_moving_average_is_one(whole):
    trainer, watch, _ = whole
    momentum = 0.9
    for step in (1, trainer.args.max_steps):
        for name, average in watch.after[step].items():
            if ".ema." in name:
                student = watch.after[step][name.replace(".ema.", ".student.")]
                expected = watch.after[step - 1][name].lerp(student, 1 - momentum)
                torch.testing.assert_close(average, expected, rtol=1e-6, atol=1e-7, msg=name)


def test_the_log_says_of_each_student_what_a_run_says_of_its_own(whole):
    trainer, _, _ = whole
    logged = trainer.state.log_history[1]
    for name, peak in (("vit", 1e-3), ("gated", 2e-3), ("convnext", 1e-3)):
        of_student = {key.removeprefix(f"{name}/") for key in of(name, logged)}
        assert of_student == {
            *("loss", "loss/dino_global", "loss/dino_local", "loss/ibot", "loss/koleo"),
            *("prototypes/dino_entropy", "prototypes/ibot_entropy"),
            *("grad_norm", "grad_norm/backbone", "grad_norm/dino_head", "grad_norm/ibot_head"),
            *("schedule/lr", "schedule/last_layer_lr", "schedule/weight_decay", "schedule/teacher_momentum"),
            *("schedule/teacher_temperature", "schedule/local_loss_weight", "guard/skipped_steps"),
        }
        assert logged[f"{name}/schedule/lr"] == peak
    assert logged["loss"] == pytest.approx(sum(logged[f"{name}/loss"] for name in STUDENTS))
    assert logged["schedule/teacher_temperature"] == 0.07
    for name in ("learning_rate", "images_per_second", "data/wait_share", "data/unreadable_images"):
        assert name in logged, name


@pytest.mark.parametrize("name", STUDENTS)
def test_students_do_not_influence_each_other(tmp_path, teacher, whole, name):
    together, watch, _ = whole
    alone = make_trainer(tmp_path, teacher, [own := Watch(last=3)], students={name: STUDENTS[name]})
    alone.train()
    assert log_of(name, alone) == log_of(name, together)[:3]
    assert_same(own.after[3], of(name, watch.after[3]))


@pytest.mark.parametrize("ranks", [{"vit": 1}, "auto"])
def test_one_student_on_one_rank_is_no_group(tmp_path, teacher, whole, ranks):
    together, *_ = whole
    run = {"students": {"vit": STUDENTS["vit"]}, "student_ranks": ranks}
    alone = make_trainer(tmp_path, teacher, [Watch(last=1)], **run)
    alone.train()
    assert alone.args.split == {"vit": 1}
    assert log_of("vit", alone) == log_of("vit", together)[:1]


def test_accumulation_changes_nothing_but_rounding(tmp_path, teacher, whole):
    together, watch, _ = whole
    parts = make_trainer(tmp_path, teacher, [own := Watch(last=3)], per_device_train_batch_size=4)
    assert parts.args.gradient_accumulation_steps == 2
    parts.train()
    for name in STUDENTS:
        for ours, theirs in zip(log_of(name, parts), log_of(name, together)[:3], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    for name, tensor in own.after[3].items():
        torch.testing.assert_close(tensor, watch.after[3][name], rtol=1e-4, atol=2e-5, msg=name)


# ---- going on -------------------------------------------------------------------------------------------------------


def test_goes_on_bitwise(tmp_path, teacher, whole):
    together, watch, folder = whole
    shutil.copytree(folder / "checkpoint-6", tmp_path / "run" / "checkpoint-6")
    resumed = make_trainer(tmp_path / "run", teacher, [own := Watch(last=8)], save_strategy="steps", save_steps=6)
    resumed.train(resume_from_checkpoint="last")
    assert sorted(own.after) == [6, 7, 8]
    assert_same(own.after[6], watch.after[6])
    assert_same(own.after[8], watch.after[8])
    for name in STUDENTS:
        assert log_of(name, resumed) == log_of(name, together)[:8]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"teacher": "headless", "objective": "features"}, "teacher is .*teacher' there and .*headless' here"),
        (
            {"students": {**STUDENTS, "gated": {**STUDENTS["gated"], "lr_schedule": 3e-3}}},
            "students.gated.lr_schedule",
        ),
        ({"students": {name: STUDENTS[name] for name in ("vit", "gated")}}, "students.convnext"),
        ({"teacher_temperature_schedule": 0.05}, "teacher_temperature_schedule is 0.07 there and 0.05 here"),
    ],
)
def test_only_the_same_recipe_goes_on(tmp_path, teacher, headless, whole, change, named):
    *_, folder = whole
    source = headless if change.get("teacher") else teacher
    fields = {name: value for name, value in change.items() if name != "teacher"}
    trainer = make_trainer(tmp_path, source, **fields)
    with pytest.raises(ValueError, match=named):
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-6"))


# ---- a student that goes wrong --------------------------------------------------------------------------------------


def spoil(model):
    """An infinity in the last layer of the ViT's projection."""
    model["vit"].student.dino_head.mlp[0].bias.data[0] = torch.inf


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory, teacher):
    """A run whose ViT goes wrong in the fourth step, its callback, its folder and what it has warned of."""
    folder = tmp_path_factory.mktemp("spoiled") / "run"
    records = Records()
    logger = logging.getLogger("dinov3_hf.training.student")
    logger.addHandler(records)
    watch = Watch(steps={4}, spoil=spoil)
    trainer = make_trainer(folder, teacher, [watch], save_strategy="steps", save_steps=6)
    try:
        trainer.train()
    finally:
        logger.removeHandler(records)
    return trainer, watch, folder, records.messages


class Records(logging.Handler):
    def __init__(self):
        super().__init__()
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


def test_a_bad_student_is_stopped_and_the_others_go_on(whole, spoiled):
    good, good_watch, _ = whole
    trainer, watch, _, messages = spoiled
    assert trainer.stopped == {"vit": 6}
    assert messages == [
        "step 6: student vit is stopped, loss/dino_global, loss/dino_local are not finite, the third step in a row; "
        "it stays as it was after step 3, the others go on. Distil it again with a lower learning_rate."
    ]
    for name in ("gated", "convnext"):
        assert log_of(name, trainer) == log_of(name, good)
        assert_same(of(name, watch.after[12]), of(name, good_watch.after[12]))
    averages = {key for key in watch.after[12] if key.startswith("vit.ema.")}
    assert_same({key: watch.after[12][key] for key in averages}, {key: good_watch.after[3][key] for key in averages})


def test_the_log_tells_of_the_stopped_student(spoiled):
    trainer, *_ = spoiled
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["vit/guard/skipped_steps"] for entry in entries] == [0, 0, 0, 1, 2, *[3] * 7]
    assert ["vit/loss" in entry for entry in entries] == [True] * 3 + [False] * 9
    assert [entry.get("vit/guard/stopped_at") for entry in entries] == [None] * 5 + [6] * 7
    assert not any("gated/guard/stopped_at" in entry for entry in entries)
    assert all(math.isfinite(value) for entry in trainer.state.log_history for value in entry.values())
    assert entries[-1]["loss"] == pytest.approx(entries[-1]["gated/loss"] + entries[-1]["convnext/loss"])


def test_people_read_a_line_for_each_student(spoiled):
    trainer, *_ = spoiled
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    of_step = {step: StudentsProgressCallback().lines(entries[step - 1], step) for step in (2, 4, 6)}
    begin, end = "step       2  gated  loss 5.", "  lr 2.00e-03"
    assert of_step[2][1].startswith(begin) and of_step[2][1].endswith(end) and "  koleo " in of_step[2][1]
    assert [line.split("  ")[-2 if "img/s" in line else -1] for line in of_step[2]] == [
        *("lr 1.00e-03", "lr 2.00e-03", "lr 1.00e-03")
    ]
    assert [line.split()[2] for line in of_step[4]] == ["gated", "convnext"]
    assert of_step[6][0] == "step       6  vit  stopped at step 6"
    assert [line.split()[2] for line in of_step[6]] == ["vit", "gated", "convnext"]


def test_the_folders_of_a_run_with_a_stopped_student(spoiled, tmp_path):
    trainer, watch, folder, _ = spoiled
    outcome = trainer.save_students(tmp_path)
    assert outcome.splitlines() == [
        "The students are in",
        f"  {tmp_path}/vit (stopped at step 6)",
        f"  {tmp_path}/gated",
        f"  {tmp_path}/convnext",
    ]
    for place in (tmp_path, folder / "checkpoint-12"):
        saved = load_file(place / "vit" / "model.safetensors")
        for name, tensor in saved.items():
            assert tensor.isfinite().all()
            assert torch.equal(tensor, watch.after[3][f"vit.ema.backbone.{name}"]), name
        card = (place / "vit" / "README.md").read_text()
        assert "| optimizer steps | 3 |" in card and "| images seen | 24 |" in card
        assert "stopped" not in (place / "gated" / "README.md").read_text()


def test_a_stopped_student_stays_stopped(spoiled, teacher, tmp_path, caplog):
    trainer, watch, folder, _ = spoiled
    shutil.copytree(folder / "checkpoint-6", tmp_path / "run" / "checkpoint-6")
    resumed = make_trainer(tmp_path / "run", teacher, [own := Watch(last=8)], save_strategy="steps", save_steps=6)
    resumed.train(resume_from_checkpoint="last")
    assert resumed.stopped == {"vit": 6}
    for name in ("gated", "convnext"):
        assert log_of(name, resumed) == log_of(name, trainer)[:8]
        assert_same(of(name, own.after[8]), of(name, watch.after[8]))
    averages = [key for key in own.after[8] if key.startswith("vit.ema.")]
    assert all(torch.equal(own.after[8][key], watch.after[8][key]) for key in averages)
    assert "vit/loss" not in resumed.state.log_history[-2]
    assert resumed.save_students(tmp_path / "students").splitlines()[1].endswith("vit (stopped at step 6)")
    assert "| optimizer steps | 3 |" in (tmp_path / "students" / "vit" / "README.md").read_text()


def test_a_run_without_good_students_ends(tmp_path, teacher):
    def spoil_all(model):
        for student in model.values():
            student.student.dino_head.mlp[0].bias.data[0] = torch.nan

    trainer = make_trainer(tmp_path, teacher, [Watch(steps={1}, spoil=spoil_all)], save_strategy="steps", save_steps=1)
    with pytest.raises(RuntimeError, match=r"^step 3: no student is left, .*learning_rate\.$") as raised:
        trainer.train()
    assert "\n" not in str(raised.value)
    assert sorted(folder.name for folder in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]


# ---- evaluation -----------------------------------------------------------------------------------------------------


class Width(Evaluator):
    def evaluate(self, backbone, args):
        return {"width": backbone.config.hidden_sizes[-1] if "conv" in args.run_name else backbone.config.hidden_size}


def test_every_student_is_measured_even_a_bad_one(tmp_path, teacher):
    digits = load_images("digits", split="train", labelled=True), load_images("digits", split="test", labelled=True)
    students = {**STUDENTS, "vit": {**STUDENTS["vit"], "lr_schedule": 1e30}}
    run = {"students": students, "max_steps": 4, "eval_strategy": "steps", "eval_steps": 4}
    trainer = make_trainer(tmp_path, teacher, [Width()], digits, **run)
    trainer.train()
    assert trainer.stopped == {"vit": 4}
    (found,) = [entry for entry in trainer.state.log_history if "vit/eval_width" in entry]
    assert [found[f"{name}/eval_width"] for name in STUDENTS] == [32, 32, 32]
    for name in STUDENTS:
        for metric in ("eval_knn_top1", "eval_knn_top5", "eval_patch_cls_cosine", "eval_patch_similarity_entropy"):
            assert f"{name}/{metric}" in found
    assert 10 < found["gated/eval_knn_top1"] <= found["gated/eval_knn_top5"] <= 100
    assert 10 < found["convnext/eval_knn_top1"] <= found["convnext/eval_knn_top5"] <= 100
    trainer.save_students(tmp_path)
    for tensor in load_file(tmp_path / "vit" / "model.safetensors").values():
        assert tensor.isfinite().all()
    card = (tmp_path / "gated" / "README.md").read_text()
    assert f"| kNN top-1 | {found['gated/eval_knn_top1']:.1f} % |" in card


# ---- what comes out -------------------------------------------------------------------------------------------------


def test_students_are_ordinary_models(whole, tmp_path):
    trainer, watch, _ = whole
    trainer.save_students(tmp_path)
    for name in STUDENTS:
        model = AutoModel.from_pretrained(tmp_path / name)
        assert type(model).__module__.startswith("transformers."), name
        average = trainer.students[list(STUDENTS).index(name)].model.ema
        for key, tensor in load_file(tmp_path / name / "model.safetensors").items():
            assert torch.equal(tensor, watch.after[12][f"{name}.ema.backbone.{key}"]), key
        assert_same(
            load_file(tmp_path / name / "heads.safetensors"),
            {key: tensor for key, tensor in average.state_dict().items() if "_head." in key},
        )
        with torch.no_grad():
            crops = torch.randn(2, 3, 32, 32)
            ours = average.backbone(crops).pooler_output
            torch.testing.assert_close(model.eval()(crops).pooler_output, ours, rtol=1e-4, atol=1e-5)
    assert not list(tmp_path.glob(".*"))


def test_an_edited_card_stays(whole, tmp_path):
    trainer, *_ = whole
    trainer.save_students(tmp_path)
    texts = {name: (tmp_path / name / "README.md").read_text() for name in STUDENTS}
    (tmp_path / "gated" / "README.md").write_text("Mine.\n")
    trainer.save_students(tmp_path)
    texts["gated"] = "Mine.\n"
    assert {name: (tmp_path / name / "README.md").read_text() for name in STUDENTS} == texts


@pytest.mark.parametrize("name", ["vit", "convnext"])
def test_a_student_teaches_in_its_turn(whole, tmp_path, name):
    trainer, _, folder = whole
    source = folder / "checkpoint-12" / name
    again = make_trainer(tmp_path, source, students={"small": STUDENTS["gated"]}, max_steps=2)
    assert again.args.objective == "prototypes"
    again.train()
    assert_same(
        again.teacher.backbone.state_dict(), of_network(trainer.students[list(STUDENTS).index(name)].model.ema)
    )
    assert all(math.isfinite(entry["small/loss"]) for entry in log_of("small", again))


def of_network(network) -> dict[str, torch.Tensor]:
    return network.backbone.state_dict()


# ---- the teacher's crops and the students' --------------------------------------------------------------------------


class Crops:
    """What teacher and first student get in the steps of a run."""

    def __init__(self, trainer):
        self.teacher, self.student, self.local = [], [], []
        trainer.teacher.register_forward_pre_hook(lambda module, inputs: self.teacher.append(inputs[0]))
        trainer.students[0].model.register_forward_pre_hook(self._keep, with_kwargs=True)

    def _keep(self, module, inputs, named):
        self.student.append(named["global_crops"])
        self.local.append(named["local_crops"])


def pixels(crops, mean, std):
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))
    return crops * std + mean


@pytest.mark.parametrize("micro_batch", [8, 4])
@pytest.mark.parametrize("scale", [1, 2])
def test_teacher_and_students_see_the_same_crops_each_in_its_way(tmp_path, teacher, scale, micro_batch):
    patch_8 = tmp_path / "teacher"
    save_tiny_vit(patch_8)
    source = teacher if scale == 1 else patch_8
    sizes = {"global_crop_size": 32 * scale, "local_crop_size": 32 * scale, "teacher_to_student_scale": scale}
    run = {"students": {"vit": STUDENTS["vit"]}, "max_steps": 1, "per_device_train_batch_size": micro_batch}
    trainer = make_trainer(tmp_path / "run", source, **sizes, **run)
    crops = Crops(trainer)
    trainer.train()
    statistics, args = read_teacher(str(source)).statistics, trainer.args
    assert statistics.mean == (0.5,) * 3 != tuple(args.image_mean)
    assert len(crops.teacher) == len(crops.student) == 8 // micro_batch
    for theirs, ours, local in zip(crops.teacher, crops.student, crops.local, strict=True):
        assert theirs.shape == (2 * micro_batch, 3, 32 * scale, 32 * scale)
        assert ours.shape == local.shape == (2 * micro_batch, 3, 32, 32)
        seen = pixels(theirs, *statistics)
        if scale != 1:
            seen = F.interpolate(seen, (32, 32), mode="bilinear", antialias=True)
        assert seen.std() > 0.1
        torch.testing.assert_close(pixels(ours, args.image_mean, args.image_std), seen, rtol=1e-4, atol=1e-5)


def test_without_local_crops(tmp_path, teacher):
    trainer = make_trainer(tmp_path, teacher, num_local_crops=0, max_steps=2)
    trainer.train()
    for name in STUDENTS:
        entries = log_of(name, trainer)
        assert f"{name}/loss/dino_local" not in entries[1]
        assert entries[1][f"{name}/loss"] < entries[0][f"{name}/loss"] + 1


# ---- features -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("feature_loss", ["cosine", "smooth_l1"])
def test_features_of_a_teacher_without_heads(tmp_path, headless, feature_loss):
    trainer = make_trainer(tmp_path, headless, [watch := Watch()], feature_loss=feature_loss, koleo_weight=0.0)
    assert trainer.args.objective == "features"
    trainer.train()
    for student in trainer.students:
        entries = log_of(student.name, trainer)
        for term in ("loss/cls", "loss/cls_local", "loss/patches", "grad_norm/cls_projection"):
            assert f"{student.name}/{term}" in entries[0]
        assert entries[-1][f"{student.name}/loss"] < entries[0][f"{student.name}/loss"]
        for name, tensor in student.model.student.named_parameters():
            start = watch.after[0][f"{student.name}.student.{name}"]
            assert torch.equal(tensor, start) == ("mask_token" in name), name
    trainer.save_students(tmp_path)
    for name in STUDENTS:
        assert not (tmp_path / name / "heads.safetensors").exists()
        AutoModel.from_pretrained(tmp_path / name)


def test_gram_of_the_teacher(tmp_path, teacher):
    gram = {"gram_teacher": "teacher", "gram_weight_schedule": 2.0, "gram_tokens": "all"}
    trainer = make_trainer(tmp_path, teacher, max_steps=1, **gram)
    trainer.train()
    (plain,) = log_of("convnext", trainer)
    assert plain["convnext/schedule/gram_weight"] == 2.0
    terms = {name: plain[f"convnext/loss/{name}"] for name in ("dino_global", "dino_local", "ibot", "gram")}
    assert terms["gram"] > 0
    shares = {"dino_global": 1 / 3, "dino_local": 2 / 3, "ibot": 1.0, "gram": 2.0}  # koleo_weight is 0
    assert plain["convnext/loss"] == pytest.approx(sum(shares[name] * terms[name] for name in terms), rel=1e-5)


# ---- how it is computed ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recomputation", ["full", "selective"])
def test_recomputation_changes_nothing(tmp_path, teacher, whole, recomputation):
    plain, watch, _ = whole
    trainer = make_trainer(tmp_path, teacher, [own := Watch(last=1)], gradient_checkpointing=recomputation)
    trainer.train()
    for name in STUDENTS:
        assert log_of(name, trainer) == log_of(name, plain)[:1]
    assert_same(own.after[1], watch.after[1])


@pytest.mark.slow
def test_compiled_students_learn_the_same(tmp_path, teacher, whole):
    plain, *_ = whole
    trainer = make_trainer(tmp_path, teacher, [Watch(last=2)], torch_compile=True)
    trainer.train()
    for name in STUDENTS:
        for ours, theirs in zip(log_of(name, trainer), log_of(name, plain)[:2], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)


def test_in_bfloat16(tmp_path, teacher, whole):
    plain, *_ = whole
    trainer = make_trainer(tmp_path, teacher, [Watch(last=2)], precision="bf16")
    assert {tensor.dtype for tensor in trainer.teacher.parameters()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in trainer.model.parameters()} == {torch.float32}
    trainer.train()
    for name in STUDENTS:
        for ours, theirs in zip(log_of(name, trainer), log_of(name, plain)[:2], strict=True):
            assert ours[f"{name}/loss"] == pytest.approx(theirs[f"{name}/loss"], rel=0.02)
            assert ours[f"{name}/loss"] != theirs[f"{name}/loss"]
