"""What a shared teacher saves: three students trained together, against three distillations of one student each.

    python benchmarks/distillation.py [--teachers vits16 vitb16 vitl16] [--images 2] [--seconds 60]

A step is the teacher's forward on 2 global crops of 224 px, its targets, and of each student forward on these and 8
local crops of 96 px, backward, AdamW and the moving average. `together` runs the teacher once for all students, `one
by one` once for each. `teacher` is what the two differ in, its forward and its targets, timed on its own in the same
rounds: if nothing else is shared, n students together take 1 - (n - 1) teacher / one by one of the time. Times are
medians of interleaved steps; on a CPU with one thread they are processor time, which other programs disturb less.
Weights are random, the teacher's in bfloat16, the students' in float32 under autocast, as in a run. The heads are kept
small, so that the ratios are those of the backbones.
"""

import argparse
import time
from collections.abc import Callable

import torch
from harness import append_results, paired_times
from torch import Tensor

from dinov3_hf.data.masking import MaskSampler
from dinov3_hf.models.dinov3_convnext.configuration_dinov3_convnext import DINOv3ConvNextConfig
from dinov3_hf.models.dinov3_convnext.presets import PRESETS as CONVNEXT_PRESETS
from dinov3_hf.models.dinov3_pretraining.backbones import build_backbone
from dinov3_hf.models.dinov3_pretraining.configuration_dinov3_distillation import DINOv3DistillationConfig
from dinov3_hf.models.dinov3_pretraining.distillation_targets import distillation_targets, teacher_answer
from dinov3_hf.models.dinov3_pretraining.modeling_dinov3_distillation import DINOv3ForDistillation
from dinov3_hf.models.dinov3_pretraining.prototype_head import PrototypeHead
from dinov3_hf.models.dinov3_pretraining.teacher_targets import TeacherTargets
from dinov3_hf.models.dinov3_vit.configuration_dinov3_vit import DINOv3ViTConfig
from dinov3_hf.training.distillation_teacher import TeacherTokens
from dinov3_hf.training.ema import update_ema

GLOBAL_SIZE, LOCAL_SIZE, NUM_LOCAL, PATCH = 224, 96, 8, 16
GRID = (GLOBAL_SIZE // PATCH, GLOBAL_SIZE // PATCH)
HEAD = {"num_prototypes": 1024, "hidden_dim": 256, "bottleneck_dim": 64}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def backbone_config(preset: str) -> DINOv3ViTConfig | DINOv3ConvNextConfig:
    family = DINOv3ConvNextConfig if preset in CONVNEXT_PRESETS else DINOv3ViTConfig
    return family.from_preset(preset)


def batch(num_images: int) -> dict[str, Tensor]:
    sampler = MaskSampler(GRID[0], batch_size=num_images, seed=0)
    mask = torch.stack([sampler(i) for i in range(num_images)]).transpose(0, 1).flatten(0, 1)  # (2B, P), crop-major
    entries = {
        "global_crops": torch.randn(2 * num_images, 3, GLOBAL_SIZE, GLOBAL_SIZE),
        "local_crops": torch.randn(NUM_LOCAL * num_images, 3, LOCAL_SIZE, LOCAL_SIZE),
        "mask": mask,
        "mask_indices": mask.flatten().nonzero().flatten(),
        "mask_weight": (1 / mask.sum(1, keepdim=True).clamp(min=1)).expand_as(mask)[mask],
    }
    return {name: tensor.to(DEVICE) for name, tensor in entries.items()}


def teacher(preset: str, inputs: dict[str, Tensor]) -> Callable[[], TeacherTargets]:
    """The targets of a step."""
    config = backbone_config(preset)
    backbone = build_backbone(config).to(DEVICE, torch.bfloat16).eval()
    dino_head, ibot_head = (PrototypeHead(config.hidden_size, **HEAD).to(DEVICE, torch.bfloat16) for _ in range(2))

    @torch.no_grad()
    def targets() -> TeacherTargets:
        output = backbone(inputs["global_crops"].to(torch.bfloat16))
        patches = output.last_hidden_state[:, -GRID[0] * GRID[1] :]
        tokens = TeacherTokens(output.pooler_output, patches, GRID)
        answer = teacher_answer(
            tokens, dino_head, ibot_head, inputs["mask"], GRID, objective="prototypes", with_patches=False
        )
        return distillation_targets([answer], [inputs["mask"]], dino_head, ibot_head, 0.07, 3, "prototypes")[0]

    return targets


def student(preset: str, inputs: dict[str, Tensor]) -> Callable[[TeacherTargets], None]:
    """The step of one student, given its targets."""
    config = DINOv3DistillationConfig(
        backbone_config=backbone_config(preset), dino_head=HEAD, ibot_head=HEAD, patch_size=PATCH
    )
    model = DINOv3ForDistillation(config).to(DEVICE).train()
    optimizer = torch.optim.AdamW(model.student.parameters(), lr=1e-4, fused=True)
    views = {name: tensor for name, tensor in inputs.items() if name != "mask"}

    def step(target: TeacherTargets) -> None:
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = model(**views, target=target).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        update_ema(model.ema, model.student, 0.99)

    return step


def candidates(
    name: str, targets: Callable[[], TeacherTargets], students: list[Callable[[TeacherTargets], None]]
) -> dict[str, Callable[[], object]]:
    def together() -> None:
        target = targets()
        for step in students:
            step(target)

    def one_by_one() -> None:
        for step in students:
            step(targets())

    return {f"{name} teacher": targets, f"{name} together": together, f"{name} one by one": one_by_one}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teachers", nargs="+", default=["vits16", "vitb16", "vitl16"], help="presets with patches")
    parser.add_argument("--students", nargs="+", default=["vits16", "vits16plus", "convnext_tiny"], help="presets")
    parser.add_argument("--images", type=int, default=2, help="images of a step")
    parser.add_argument("--seconds", type=float, default=60)
    args = parser.parse_args()

    torch.manual_seed(0)
    inputs = batch(args.images)
    students = [student(preset, inputs) for preset in args.students]
    steps: dict[str, Callable[[], object]] = {}
    for name in args.teachers:
        steps |= candidates(name, teacher(name, inputs), students)
    alone = DEVICE == "cpu" and torch.get_num_threads() == 1
    times = paired_times(steps, args.seconds, warmup=1, clock=time.process_time if alone else time.perf_counter)

    rows = []
    for name in args.teachers:
        share = times.ratio(f"{name} teacher", f"{name} one by one")
        rows.append(
            [
                name,
                *(f"{1000 * times.median(f'{name} {way}'):.0f}" for way in ("teacher", "together", "one by one")),
                times.ratio_text(f"{name} together", f"{name} one by one"),
                f"{1 - (len(students) - 1) * share:.3f}",
            ]
        )
    append_results(
        f"Distillation step of {', '.join(args.students)}, {args.images} images, bf16",
        ["teacher", "teacher ms", "together ms", "one by one ms", "together / one by one", "expected"],
        rows,
        ["transformers"],
    )


if __name__ == "__main__":
    main()
