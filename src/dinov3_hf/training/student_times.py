"""How long students take on this machine, by which ranks are given to them."""

import time
from typing import Any

import torch
from torch import nn

from dinov3_hf.data.collators import mask_entries
from dinov3_hf.distributed.reductions import all_reduce_sum, world_size
from dinov3_hf.models.dinov3_pretraining.configuration_dinov3_pretraining import NUM_GLOBAL_CROPS
from dinov3_hf.models.dinov3_pretraining.teacher_targets import TeacherTargets
from dinov3_hf.training.distillation_config import DistillationConfig
from dinov3_hf.training.student import new_student, prepare_blocks
from dinov3_hf.training.student_config import StudentConfig

REPETITIONS = 3


def measure_students(args: DistillationConfig) -> dict[str, float]:
    """
    Seconds of a step of each student on one rank with the whole global batch: forward and backward pass on random
    crops of a micro-batch, the best of three, the mean over the ranks; without the last layers of the teacher's heads,
    which each group applies for itself. All ranks call it.

    Args:
        args: of the run.
    """
    seconds = {name: _seconds_of_image(student, args) for name, student in args.student_args.items()}
    if args.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(args.device)  # of the run, these were other networks
    total = all_reduce_sum(torch.tensor(list(seconds.values()), device=args.device)) / world_size()
    return dict(zip(seconds, (total * args.global_batch_size).tolist(), strict=True))


def _seconds_of_image(student: StudentConfig, args: DistillationConfig) -> float:
    model = new_student(student)
    prepare_blocks(model, student)
    nn.Module.to(model, args.device).train()
    num_images = max(args.train_batch_size, student.gram_group_size or 1)
    inputs = _inputs(student, args, num_images)
    best = float("inf")
    for _ in range(1 + REPETITIONS):  # the first to warm up
        _finish(args.device)
        start = time.perf_counter()
        with torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16):
            loss = model(**inputs).loss
        loss.backward()
        _finish(args.device)
        best = min(best, time.perf_counter() - start)
        model.zero_grad()
    return best / num_images


def _inputs(student: StudentConfig, args: DistillationConfig, num_images: int) -> dict[str, Any]:
    device, description = args.device, args.description
    sampler = args.masks(args.crop_size_mix().sizes[0])
    mask = torch.stack([sampler(position) for position in range(num_images)], dim=1).flatten(0, 1)  # (G*B, N)
    entries = mask_entries(mask)
    num_masked, num_patches = len(entries["mask_indices"]), mask.shape[1]
    size, local_size, num_channels = student.global_crop_size, student.local_crop_size, description.num_channels

    def evenly(*shape: int) -> torch.Tensor:
        return torch.full(shape, 1 / shape[-1], device=device)

    prototypes = student.objective == "prototypes"
    target = TeacherTargets(
        cls_probs=evenly(NUM_GLOBAL_CROPS, num_images, student.dino_head["num_prototypes"]) if prototypes else None,
        masked_probs=evenly(num_masked, student.ibot_head["num_prototypes"]) if prototypes else None,
        patches=evenly(len(mask), num_patches, description.width),
        cls=None if prototypes else evenly(NUM_GLOBAL_CROPS, num_images, description.width),
    )
    return {
        "global_crops": torch.randn(len(mask), num_channels, size, size, device=device),
        "local_crops": torch.randn(
            args.num_local_crops * num_images, num_channels, local_size, local_size, device=device
        ),
        "target": target,
        "gram_weight": 0.0 if student.gram_teacher is None else 1.0,
        **{name: values.to(device) for name, values in entries.items()},
    }


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
