"""Kinds distillation_step, distillation_trajectory and multi_distillation_step: a fixed teacher and its students."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dinov3_hf.distributed.exchange import Exchange, Layout
from dinov3_hf.distributed.reductions import process_group, rank
from dinov3_hf.models.dinov3_pretraining.backbones import patch_side
from dinov3_hf.models.dinov3_pretraining.distillation_targets import (
    TeacherAnswer,
    distillation_targets,
    teacher_answer,
)
from dinov3_hf.models.dinov3_pretraining.modeling_dinov3_distillation import DINOv3ForDistillation
from dinov3_hf.models.dinov3_pretraining.student_step import DINOv3PreTrainingOutput, SSLNetwork
from dinov3_hf.models.dinov3_pretraining.teacher_targets import TeacherTargets
from dinov3_hf.models.image_channels import ChannelStatistics
from dinov3_hf.training.distillation_teacher import DistillationTeacher, TeacherDescription, TeacherTokens

from .compare import Comparison
from .io import Case
from .processes import run_in_processes
from .step_settings import distillation_config, schedules_of, teacher_config
from .steps import (
    Run,
    check_step,
    check_trajectory,
    given_values,
    gradient,
    load,
    native_metrics,
    native_predictions,
    native_tensors,
    our_batch,
    submodules_of,
)

SINKHORN_ITERATIONS = 3  # the only number that the original has


class DistillationRun(Run):
    """A student, its moving average, and the teacher."""

    def __init__(self, case: Case, schedules: Any) -> None:
        arch = case.spec["resolved_config"]["student"]["arch"]
        model = DINOv3ForDistillation(distillation_config(case, arch, case.config["batch_size"])).train()
        self.teacher = build_teacher(case)
        networks = {"student": model.student, "model_ema": model.ema, "teacher": self.teacher}
        super().__init__(case, schedules, model, networks, average="model_ema")

    def forward(self, batch: dict[str, Tensor], values: Mapping[str, float]) -> DINOv3PreTrainingOutput:
        inputs = our_batch(batch)
        _, inputs["target"] = self.target(inputs, inputs.pop("mask"), values["teacher_temperature"])
        return self.model(**inputs, local_loss_weight=values["local_loss_weight"])

    def target(
        self, inputs: Mapping[str, Tensor], mask: Tensor, temperature: float
    ) -> tuple[TeacherAnswer, TeacherTargets]:
        """What the teacher says, and what the student has to predict."""
        crops = inputs["global_crops"]
        answer = answer_of(self.teacher, self.teacher(crops), mask)
        return answer, target_of(self.teacher, answer, mask, temperature)

    def intermediate(self, batch: dict[str, Tensor], temperature: float) -> dict[str, Tensor]:
        inputs = our_batch(batch)
        answer, target = self.target(inputs, inputs["mask"], temperature)
        cls_logits = self.teacher.dino_head.last_layer(answer.cls.transpose(0, 1))
        with torch.no_grad(), self.draws.replayed():
            student = self.model.student_predictions(
                inputs["global_crops"], inputs["local_crops"], None, inputs["mask_indices"]
            )
        return native_predictions(cls_logits, target, student)


def check_distillation_step(case: Case, compare: Comparison) -> None:
    """One step of distillation."""
    check_step(DistillationRun(case, given_values(case)), compare)


def check_distillation_trajectory(case: Case, compare: Comparison) -> None:
    """Many steps of distillation."""
    check_trajectory(DistillationRun(case, schedules_of(case)), compare)


def check_multi_distillation_step(case: Case, compare: Comparison) -> None:
    """Each process runs the teacher on its share of the images, and one student on all of them."""
    results = run_in_processes(_student_of_a_process, case.config["world_size"], case.folder)
    for result in results:
        for name, value in result.items():
            compare.check(name, value)


def _student_of_a_process(folder: Path) -> dict[str, Tensor]:
    """Loss, metrics, intermediate results and gradients of the student of this process, under native names."""
    case, me = Case(folder), rank()
    archs, num_images = case.config["student_archs"], case.config["global_batch_size"]
    batches = [_batch_of_rank(case, index) for index in range(len(archs))]
    ranks = range(case.config["world_size"])
    source = Layout(tuple(ranks), size=num_images // len(ranks), num_images=num_images)
    exchange = Exchange(source, [Layout((index,), size=num_images, num_images=num_images) for index in ranks])
    groups = [dist.new_group([index]) for index in ranks]

    teacher = build_teacher(case)
    load(submodules_of(teacher), "teacher", case.weights)
    tokens = teacher(batches[me]["collated_global_crops"])
    mine = source.positions(me)
    for index, batch in enumerate(batches):  # each student has masks of its own, for all images
        mask = _of_images(batch["collated_masks"], mine)
        answer = answer_of(teacher, tokens, mask)
        cls = exchange.send(answer.cls)
        masked, _ = exchange.send_ragged(answer.masked, mask.unflatten(0, (2, -1)).sum(dim=(0, 2)))
        if index == me:
            whole = TeacherAnswer(cls, masked, patches=None)
    batch = dict(batches[me])
    for crops in ("collated_global_crops", "collated_local_crops"):
        by_image = batch[crops].unflatten(0, (-1, source.size)).transpose(0, 1)  # (images, crops, C, H, W)
        batch[crops] = exchange.send(by_image).transpose(0, 1).flatten(0, 1)

    inputs = our_batch(batch)
    model = DINOv3ForDistillation(distillation_config(case, archs[me], num_images)).train()
    parts = submodules_of(model.student)
    load(parts, f"student{me}", case.weights)
    with process_group(groups[me]):
        target = target_of(teacher, whole, inputs.pop("mask"), case.config["teacher_temp"])
        output = model(**inputs, target=target)
        output.loss.backward()
        with torch.no_grad():
            student = model.student_predictions(
                inputs["global_crops"], inputs["local_crops"], None, inputs["mask_indices"]
            )
    metrics = native_metrics(output, batch, {"local_loss_weight": 1.0})
    metrics["batch_size"] = float(source.size)
    predictions = native_predictions(teacher.dino_head.last_layer(whole.cls.transpose(0, 1)), target, student)
    named = {
        "loss/total": output.loss,
        **{f"metrics/{name}": value for name, value in metrics.items()},
        **{f"intermediate/{name}": value for name, value in predictions.items()},
        **{f"grad/{name}": value for name, value in native_tensors(parts, gradient).items()},
    }
    return {
        f"student{me}/{name}": torch.as_tensor(value, dtype=None if isinstance(value, Tensor) else torch.float64)
        for name, value in named.items()
    }


def build_teacher(case: Case) -> DistillationTeacher:
    """The teacher that the trainer would read from a folder, without its weights."""
    config = teacher_config(case)
    network, backbone = SSLNetwork(config), config.backbone_config
    description = TeacherDescription(
        source="a recorded teacher",
        summary="",
        width=backbone.hidden_size,
        patch_size=patch_side(backbone),
        stride=patch_side(backbone),
        num_channels=backbone.num_channels,
        statistics=ChannelStatistics((0.0,) * backbone.num_channels, (1.0,) * backbone.num_channels),
        heads={"dino_head": config.dino_head, "ibot_head": config.ibot_head},
        model_type=backbone.model_type,
        has_cls=True,
    )
    return DistillationTeacher(description, network.backbone, network.dino_head, network.ibot_head)


def answer_of(teacher: DistillationTeacher, tokens: TeacherTokens, mask: Tensor) -> TeacherAnswer:
    """`mask` (2 * images, patches), crop-major, on the grid of teacher and student."""
    return teacher_answer(
        tokens, teacher.dino_head, teacher.ibot_head, mask, tokens.grid, objective="prototypes", with_patches=False
    )


def target_of(teacher: DistillationTeacher, answer: TeacherAnswer, mask: Tensor, temperature: float) -> TeacherTargets:
    """What a student has to predict of the images of an answer."""
    (target,) = distillation_targets(
        [answer], [mask], teacher.dino_head, teacher.ibot_head, temperature, SINKHORN_ITERATIONS, "prototypes"
    )
    return target


def _batch_of_rank(case: Case, index: int) -> dict[str, Tensor]:
    prefix = f"rank{index}/"
    return {name.removeprefix(prefix): value for name, value in case.inputs.items() if name.startswith(prefix)}


def _of_images(crops: Tensor, images: Tensor) -> Tensor:
    """(2 * B, ...) crop-major -> (2 * images, ...)."""
    return crops.unflatten(0, (2, -1))[:, images].flatten(0, 1)
