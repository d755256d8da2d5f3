"""What a run writes into the model card of its teacher."""

from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from dinov3_hf.hub.card_validation import check_model_card
from dinov3_hf.training.arguments import parse_arguments
from dinov3_hf.training.distillation_config import DistillationConfig
from dinov3_hf.training.run_card import card_datasets, card_results, card_sections, data_name, write_run_card
from dinov3_hf.training.ssl_config import SSLConfig
from dinov3_hf.yaml_text import dump_yaml, parse_yaml
from tests.training import test_distillation_trainer as distillation
from tests.training.test_ssl_trainer import make_args, make_trainer


def test_the_card_of_a_run(tmp_path):
    trainer = make_trainer(tmp_path / "run", license="mit", max_steps=2)
    trainer.train()
    trainer.log({"eval_knn_top1": 93.21, "eval_knn_top5": 98.76, "eval_patch_cls_cosine": 0.1234})
    trainer.save_teacher(tmp_path / "run" / "teacher")
    text = (tmp_path / "run" / "teacher" / "README.md").read_text()
    check_model_card(text)

    assert "\n# run\n\nA ViT with 2 blocks of width 32 and patches of 4 px (" in text
    assert "Trained without labels, by the objective of DINOv3, with `dinov3_hf`." in text
    last = next(entry for entry in reversed(trainer.state.log_history) if "loss" in entry)
    assert f"| last loss | {last['loss']:.4f} |" in text
    assert f"| last loss, dino_local | {last['loss/dino_local']:.4f} |" in text
    for row in ("images | digits", "images seen | 32", "optimizer steps | 2", "kNN top-1 | 93.2 %"):
        assert f"| {row} |" in text, row
    assert "`heads.safetensors`" in text

    data = ModelCard(text).data
    assert data["license"] == "mit"
    measured = [(result.metric_type, result.metric_value, result.dataset_name) for result in data.eval_results]
    assert measured == [("accuracy", 0.9321, "digits"), ("accuracy", 0.9876, "digits")]

    # The recipe in the card computes the same.
    recipe = parse_yaml(text.partition("```yaml\n")[2].partition("```")[0], "the card")
    again = SSLConfig(**recipe, output_dir=str(tmp_path / "again"))
    assert again.result_fields(again.recipe()) == trainer.args.result_fields(trainer.args.recipe())

    # Somebody edits the card; the run saves its teacher once more.
    (tmp_path / "run" / "teacher" / "README.md").write_text(text + "\nMine.\n")
    trainer.save_teacher(tmp_path / "run" / "teacher")
    assert (tmp_path / "run" / "teacher" / "README.md").read_text() == text + "\nMine.\n"


def test_a_card_does_not_tell_where_folders_lie(tmp_path):
    args = make_args(tmp_path, start_from="/home/me/runs/a", gram_teacher="/home/me/runs/early")
    training = card_sections(args, 2, [])["Training"]
    assert "/home" not in training
    assert "| started from | a (state) |" in training
    recipe = parse_yaml(training.partition("```yaml\n")[2].partition("```")[0], "the card")
    assert (recipe["start_from"], recipe["gram_teacher"]) == ("a", "early")


@pytest.mark.parametrize("objective", ["prototypes", "features"])
def test_the_card_of_a_student(objective, tmp_path):
    teacher = distillation.save_teacher(tmp_path / "runs" / "a" / "teacher")
    start = tmp_path / "start"
    distillation.save_tiny_vit(start, **distillation.VIT)
    students = {**distillation.STUDENTS, "vit": {"backbone": distillation.VIT, "start_from": str(start)}}
    args = distillation.make_args(tmp_path / "run", teacher, students=students, objective=objective)
    log = [{"loss": 1.5, "loss/koleo": 0.25}, {"eval_knn_top1": 93.2}]
    for name, student in args.student_args.items():
        folder = tmp_path / name
        distillation.save_tiny_vit(folder)
        write_run_card(folder, student, 2, log)
        text = (folder / "README.md").read_text()
        check_model_card(text)
        assert str(tmp_path) not in text
        assert f"\n# {name}\n" in text
        assert "\nDistilled without labels from the teacher of run a, with `dinov3_hf`.\n" in text
        for row in (
            "distilled from | the teacher of run a (ViT with 2 blocks of width 24 and patches of 4 px)",
            f"predicts | {'the prototypes of its heads' if objective == 'prototypes' else 'its features'}",
            *("images | digits", "images seen | 16", "last loss, koleo | 0.2500", "kNN top-1 | 93.2 %"),
        ):
            assert f"| {row} |" in text, row
        assert ("| started from | start |" in text) == (name == "vit")

        # The recipe in the card trains this student alone, to the same.
        recipe = parse_yaml(text.partition("```yaml\n")[2].partition("```")[0], "the card")
        assert recipe["teacher"] == "teacher" and list(recipe["students"]) == [name]
        if name == "vit":
            assert recipe["students"] == {"vit": {"start_from": "start"}}
            recipe["students"]["vit"]["start_from"] = str(start)
        (tmp_path / "again.yaml").write_text(dump_yaml({**recipe, "teacher": str(teacher)}))
        words = [str(tmp_path / "again.yaml"), "--output_dir", str(tmp_path / "again")]
        again = parse_arguments(DistillationConfig, words)
        assert again.student_args[name].recipe_alone() == student.recipe_alone()


def test_the_card_of_a_student_whose_teacher_sees_larger_crops(tmp_path):
    teacher = distillation.save_tiny_vit(tmp_path / "patch8") and tmp_path / "patch8"
    sizes = {"global_crop_size": 64, "local_crop_size": 64, "teacher_to_student_scale": 2.0}
    args = distillation.make_args(tmp_path / "run", teacher, **sizes)
    training = card_sections(args.student_args["gated"], 2, [])["Training"]
    assert "| crops | 2 x 32 px, 2 x 32 px |" in training
    assert "| crops of the teacher | 2 x 64 px |" in training
    recipe = parse_yaml(training.partition("```yaml\n")[2].partition("```")[0], "the card")
    assert {name: recipe[name] for name in sizes} == sizes


def test_nothing_is_claimed_of_images_that_nobody_named(tmp_path):
    args = make_args(tmp_path, eval_data=None)
    assert card_results(args, [{"eval_knn_top1": 93.2}]) == []
    assert card_datasets(args) == []
    assert card_results(make_args(tmp_path), [{"loss": 1.0}]) == []


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ("digits", "digits"),
        ("me/pets:plain:train", "me/pets"),
        ("stream:me/pets", "me/pets"),
        ("/home/me/customers/photos", "photos"),
        ("shards/*.parquet", "*.parquet"),
        ("stream:https://example.org/secret/a-{00..12}.tar", "a-{00..12}.tar"),
        (None, "not named"),
    ],
)
def test_images_are_called_without_the_folders_they_lie_in(data, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("shards").mkdir()
    assert data_name(data) == name


def test_the_card_of_a_stopped_student_says_so(tmp_path):
    args = make_args(tmp_path / "run")
    trainer = make_trainer(tmp_path / "run")
    trainer.save_teacher(tmp_path / "model")
    write_run_card(tmp_path / "model", args, 3, [], stopped_at=6)
    assert "## Stopped\n\nThis student was given up at step 6: " in (tmp_path / "model" / "README.md").read_text()
