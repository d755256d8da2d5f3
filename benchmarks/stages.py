"""What the stages of DINOv3 cost: one optimizer step of pre-training, with Gram anchoring, and at high resolutions.

    python benchmarks/stages.py [--size vits16] [--layers 1] [--images 2 4] [--stages ...] [--seconds 60]

The published sizes of crops: pre-training at 256 / 112 px, Gram anchoring with a Gram teacher at 512 px, and the five
tuples (global / local / Gram) of the high-resolution stage. A step is the teachers' forwards, the student's forward on
2 global and 8 local crops, backward, AdamW and the moving average. Times are medians of interleaved steps of the first
number of --images; on a CPU with one thread they are processor time, which other programs disturb less. The heads are
kept small, so that the ratios are those of the blocks and few --layers say what many cost. Memory is measured in a
process of its own for each number of images: its peak, without what the process held before the model was built.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from harness import append_results, paired_times
from torch import Tensor

from dinov3_hf.data.masking import MaskSampler
from dinov3_hf.models.dinov3_pretraining.configuration_dinov3_pretraining import DINOv3PreTrainingConfig
from dinov3_hf.models.dinov3_pretraining.modeling_dinov3_pretraining import DINOv3ForPreTraining
from dinov3_hf.models.dinov3_vit.configuration_dinov3_vit import DINOv3ViTConfig
from dinov3_hf.training.ema import update_ema
from dinov3_hf.training.guards import peak_memory

NUM_LOCAL = 8
HEAD = {"num_prototypes": 1024, "hidden_dim": 256, "bottleneck_dim": 64}


@dataclass(frozen=True)
class Stage:
    """Sides of the crops in pixels, and who the Gram teacher is."""

    global_size: int
    local_size: int
    gram_size: int | None = None
    gram_teacher: str | None = None
    probability: float = 0.0  # in the mix of the high-resolution stage


STAGES = {
    "pre-training 256/112": Stage(256, 112),
    "Gram, EMA teacher": Stage(256, 112, None, "ema"),
    "Gram, own teacher, same crops": Stage(256, 112, None, "separate"),
    "Gram, own teacher at 512": Stage(256, 112, 512, "separate"),
    "high-res 512/112/768": Stage(512, 112, 768, "separate", 0.3),
    "high-res 768/112/1152": Stage(768, 112, 1152, "separate", 0.3),
    "high-res 768/160/1152": Stage(768, 160, 1152, "separate", 0.3),  # published: 168, of which 160 px are seen
    "high-res 768/224/1152": Stage(768, 224, 1152, "separate", 0.05),
    "high-res 768/336/1152": Stage(768, 336, 1152, "separate", 0.05),
}


def batch(stage: Stage, patch_size: int, num_images: int, device: str) -> dict[str, Tensor]:
    def crops(number: int, size: int) -> Tensor:
        return torch.randn(number * num_images, 3, size, size, device=device)

    sampler = MaskSampler(stage.global_size // patch_size, batch_size=num_images, seed=0)
    mask = torch.stack([sampler(i) for i in range(num_images)]).transpose(0, 1).flatten(0, 1)  # (2B, P), crop-major
    weight = (1 / mask.sum(1, keepdim=True).clamp(min=1)).expand_as(mask)[mask]
    entries = {"mask": mask, "mask_indices": mask.flatten().nonzero().flatten(), "mask_weight": weight}
    inputs = {name: tensor.to(device) for name, tensor in entries.items()}
    inputs |= {"global_crops": crops(2, stage.global_size), "local_crops": crops(NUM_LOCAL, stage.local_size)}
    return inputs if stage.gram_size is None else inputs | {"gram_crops": crops(2, stage.gram_size)}


def stepper(stage: Stage, args: argparse.Namespace, num_images: int) -> Callable[[], None]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    changes = {} if args.layers is None else {"num_hidden_layers": args.layers}
    backbone = DINOv3ViTConfig.from_preset(args.size, **changes)
    config = DINOv3PreTrainingConfig(
        backbone_config=backbone, dino_head=HEAD, ibot_head=HEAD, gram_teacher=stage.gram_teacher
    )
    torch.manual_seed(0)
    model = DINOv3ForPreTraining(config).to(device).train()
    if model.gram_teacher is not None:
        model.gram_teacher.to(torch.bfloat16)  # as in a run
    if args.checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.student.parameters(), lr=1e-4, fused=True)
    inputs = batch(stage, backbone.patch_size, num_images, device)
    gram_weight = 0.0 if stage.gram_teacher is None else 2.0

    def step() -> None:
        with torch.autocast(device, torch.bfloat16):
            loss = model(**inputs, teacher_temperature=0.07, gram_weight=gram_weight).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        update_ema(model.teacher, model.student, 0.99)

    return step


def print_memory(args: argparse.Namespace) -> None:
    """Print the GiB that two steps take at most, as JSON."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    before = peak_memory(device)
    step = stepper(STAGES[args.memory_of], args, args.images[0])
    step()
    step()
    print(json.dumps(peak_memory(device) - before))


def memory(name: str, num_images: int) -> float:
    """Peak memory in GiB of a process that takes steps of `num_images`."""
    command = [sys.executable, *sys.argv, "--memory_of", name, "--images", str(num_images)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="vits16", help="preset of the backbone")
    parser.add_argument("--layers", type=int, help="blocks of the backbone, if not all")
    parser.add_argument("--images", type=int, nargs="+", default=[2, 4], help="images of a step")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations, as published")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--memory_of", choices=STAGES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        print_memory(args)
        return

    peaks = {name: [memory(name, number) for number in args.images] for name in args.stages}
    steps = {name: stepper(STAGES[name], args, args.images[0]) for name in args.stages}
    alone = not torch.cuda.is_available() and torch.get_num_threads() == 1
    times = paired_times(steps, args.seconds, warmup=1, clock=time.process_time if alone else time.perf_counter)
    first = args.stages[0]
    rows = [
        [name, f"{1000 * times.median(name):.0f}", times.ratio_text(name, first), *(f"{x:.2f}" for x in peaks[name])]
        for name in args.stages
    ]
    mix = {name: STAGES[name].probability for name in args.stages if STAGES[name].probability}
    mean = sum(share * times.ratio(name, first) for name, share in mix.items()) / max(sum(mix.values()), 1e-9)
    append_results(
        f"Training step of each stage, {args.size}, {args.layers or 'all'} blocks, {args.images[0]} images, "
        f"bf16 autocast{', activations recomputed' if args.checkpointing else ''}",
        ["step", "ms", "/ first row", *(f"peak GiB, {number} images" for number in args.images)],
        rows,
        ["transformers"],
        f"Mean of the high-resolution rows by their published shares: {mean:.1f} times the first row." if mix else "",
    )


if __name__ == "__main__":
    main()
