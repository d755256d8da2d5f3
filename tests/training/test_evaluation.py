"""What is measured on the teacher during a run."""

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from dinov3_hf.data.sources.spec import load_images
from dinov3_hf.evals.dense_health import dense_health
from dinov3_hf.evals.features import ImageList, center_crop, extract_features
from dinov3_hf.evals.knn import leave_one_out_accuracies
from dinov3_hf.models.dinov3_pretraining.modeling_dinov3_pretraining import DINOv3ForPreTraining
from dinov3_hf.training.evaluation import DenseHealthCallback, DriftCallback, Evaluator, KnnCallback, described
from dinov3_hf.training.ssl_trainer import SSLTrainer
from dinov3_hf.training.teacher_folder import image_processor
from tests.training.test_ssl_trainer import make_args, make_trainer


class CountImages(Evaluator):
    """An evaluator as a user writes one."""

    def evaluate(self, backbone, args):
        assert not any(parameter.requires_grad for parameter in backbone.parameters())
        return {"num_blocks": float(backbone.config.num_hidden_layers)}


def evaluations(trainer) -> dict[int, dict[str, float]]:
    return {
        entry["step"]: {name: value for name, value in entry.items() if name.startswith("eval_")}
        for entry in trainer.state.log_history
        if any(name.startswith("eval_") for name in entry)
    }


def test_a_run_without_labels_watches_its_dense_features(tmp_path):
    trainer = make_trainer(
        tmp_path, [CountImages()], eval_data=None, eval_strategy="steps", eval_steps=3, eval_on_start=True
    )
    trainer.train()
    found = evaluations(trainer)
    assert list(found) == [0, 3, 6]
    for numbers in found.values():
        assert set(numbers) == {"eval_num_blocks", "eval_patch_cls_cosine", "eval_patch_similarity_entropy"}
        assert -1 <= numbers["eval_patch_cls_cosine"] <= 1
        assert 0 <= numbers["eval_patch_similarity_entropy"] <= 1
        assert numbers["eval_num_blocks"] == 2
    assert found[0] != found[6]
    trainer.save_teacher(tmp_path / "teacher")
    assert f"{found[6]['eval_patch_cls_cosine']:.3f}" in (tmp_path / "teacher" / "README.md").read_text()


def test_with_labels_kNN_comes_first(tmp_path):
    args = make_args(tmp_path)
    digits = tuple(load_images("digits", split=split, labelled=True) for split in ("train", "test"))
    model = DINOv3ForPreTraining(args.pretraining_config())
    trainer = SSLTrainer(model, args, digits[0], digits)
    metrics = trainer.evaluate()
    assert list(metrics)[:2] == ["eval_knn_top1", "eval_knn_top5"]
    assert 10 < metrics["eval_knn_top1"] <= metrics["eval_knn_top5"] <= 100
    assert metrics.items() <= trainer.state.log_history[-1].items()
    with pytest.raises(ValueError, match="add_callback"):
        trainer.evaluate(digits)


def test_other_callbacks_see_the_numbers(tmp_path):
    class Remember(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **kwargs):
            self.metrics = metrics

    remember = Remember()
    metrics = make_trainer(tmp_path, [remember]).evaluate()
    assert remember.metrics == metrics != {}


def test_two_evaluators_with_one_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match="num_blocks"):
        make_trainer(tmp_path, [CountImages(), CountImages()]).evaluate()


class BrokenImages:
    """Every second image cannot be read."""

    def __init__(self, step: int) -> None:
        self.pictures = np.random.default_rng(0).integers(0, 256, (10, 20, 24, 3), dtype=np.uint8)
        self.step = step
        self.asked: list[int] = []

    def __len__(self) -> int:
        return len(self.pictures)

    def image(self, i: int) -> np.ndarray:
        self.asked.append(i)
        if i % self.step == 0:
            raise ValueError(f"cannot read image {i}")
        return self.pictures[i]


def test_dense_health_is_that_of_a_fixed_sample_of_readable_images(tmp_path):
    args = make_args(tmp_path)
    backbone = DINOv3ForPreTraining(args.pretraining_config()).teacher.backbone
    images = BrokenImages(step=2)
    callback = DenseHealthCallback(images)
    found = callback.evaluate(backbone, args)
    assert images.asked == list(range(10))
    readable = ImageList([center_crop(images.pictures[i], 16) for i in range(1, 10, 2)])
    features = extract_features(backbone, readable, image_processor(args), with_patches=True)
    assert found == dense_health(features)
    assert callback.evaluate(backbone, args) == found
    assert len(images.asked) == 10  # read once

    few = BrokenImages(step=11)
    DenseHealthCallback(few, num_images=4).evaluate(backbone, args)
    assert few.asked == [0, 2, 5, 7]
    with pytest.raises(ValueError, match="none of 10"):
        DenseHealthCallback(BrokenImages(step=1)).evaluate(backbone, args)


def test_evaluation_leaves_the_run_as_it_would_have_been(tmp_path):
    plain = make_trainer(tmp_path / "plain")
    plain.train()
    watched = make_trainer(tmp_path / "watched", eval_strategy="steps", eval_steps=2, eval_on_start=True)
    digits = (load_images("digits", split=split, labelled=True) for split in ("train", "test"))
    watched.add_callback(KnnCallback(*digits))
    watched.train()
    assert len(evaluations(watched)) == 4
    for name, tensor in watched.model.state_dict().items():
        assert torch.equal(tensor, plain.model.state_dict()[name]), name


def test_what_people_read():
    logs = {"loss": 3.0, "eval_knn_top1": 63.06, "eval_patch_cls_cosine": 0.25, "eval_mine": 1234.5, "step": 3}
    assert described(logs) == {"kNN top-1": "63.1 %", "patch-CLS cosine": "0.250", "mine": "1234"}
    read_back = dict(sorted(logs.items()))
    assert list(described(read_back)) == list(described(logs))
    assert described({"loss": 3.0}) == {}


def test_drift_is_that_from_the_start(tmp_path):
    args = make_args(tmp_path)
    model = DINOv3ForPreTraining(args.pretraining_config())
    images = load_images("digits", split="train")
    callback = DriftCallback(images, model.teacher.backbone, args, num_images=6)
    found = callback.evaluate(model.teacher.backbone, args)
    assert (found["cls_drift"], found["patch_drift"]) == pytest.approx((0, 0), abs=1e-6)
    health = DenseHealthCallback(images, num_images=6).evaluate(model.teacher.backbone, args)
    assert health.items() <= found.items()
    torch.nn.init.normal_(model.teacher.backbone.norm.bias)
    moved = callback.evaluate(model.teacher.backbone, args)
    assert min(moved["cls_drift"], moved["patch_drift"]) > 0.01


def test_without_a_query_each_image_is_classified_by_all_the_others(tmp_path):
    args = make_args(tmp_path)
    backbone = DINOv3ForPreTraining(args.pretraining_config()).teacher.backbone
    digits = load_images("digits", split="test", labelled=True)
    features = extract_features(backbone, digits, image_processor(args), digits.labels)
    expected = leave_one_out_accuracies(features, [20])[20]
    assert KnnCallback(digits, None).evaluate(backbone, args) == expected
