"""One optimizer step of pre-training: float32 against bf16 autocast, packed crops against a forward for each size.

    python benchmarks/train_step.py [--size vits16] [--batch 4] [--seconds 60]

A step is teacher forward, student forward on 2 x 224 px and 8 x 96 px crops, backward, AdamW and the teacher's moving
average. Prints milliseconds (median of interleaved steps) and the ratio to the first row: below 1 is faster.
"""

import argparse
from collections.abc import Callable

import torch
from harness import append_results, paired_times
from torch import Tensor

from dinov3_hf.data.masking import MaskSampler
from dinov3_hf.models.dinov3_pretraining.configuration_dinov3_pretraining import DINOv3PreTrainingConfig
from dinov3_hf.models.dinov3_pretraining.modeling_dinov3_pretraining import DINOv3ForPreTraining
from dinov3_hf.models.dinov3_vit.configuration_dinov3_vit import DINOv3ViTConfig
from dinov3_hf.training.ema import update_ema

GLOBAL_SIZE, LOCAL_SIZE, NUM_LOCAL = 224, 96, 8


class SeparateForwards(DINOv3ForPreTraining):
    """The student sees global and local crops one after the other, as two forwards of the backbone."""

    def student_predictions(self, global_crops, local_crops, mask, mask_indices):
        backbone = self.student.backbone
        forward = backbone.forward
        backbone.forward = lambda crops, bool_masked_pos: [
            forward([crop], bool_masked_pos=[crop_mask])[0]
            for crop, crop_mask in zip(crops, bool_masked_pos, strict=True)
        ]
        try:
            return super().student_predictions(global_crops, local_crops, mask, mask_indices)
        finally:
            del backbone.forward


def batch(config: DINOv3ViTConfig, size: int, device: str) -> dict[str, Tensor]:
    sampler = MaskSampler(GLOBAL_SIZE // config.patch_size, batch_size=size, seed=0)
    mask = torch.stack([sampler(i) for i in range(size)]).transpose(0, 1).flatten(0, 1)  # (2B, P), crop-major
    counts = mask.sum(1, keepdim=True).clamp(min=1)
    entries = {
        "global_crops": torch.randn(2 * size, 3, GLOBAL_SIZE, GLOBAL_SIZE),
        "local_crops": torch.randn(NUM_LOCAL * size, 3, LOCAL_SIZE, LOCAL_SIZE),
        "mask": mask,
        "mask_indices": mask.flatten().nonzero().flatten(),
        "mask_weight": (mask / counts)[mask],
    }
    return {name: tensor.to(device) for name, tensor in entries.items()}


def stepper(
    model_class: type[DINOv3ForPreTraining], config: DINOv3PreTrainingConfig, inputs: dict[str, Tensor], bf16: bool
) -> Callable[[], None]:
    device = inputs["mask"].device
    torch.manual_seed(0)
    model = model_class(config).to(device).train()
    optimizer = torch.optim.AdamW(model.student.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = model(**inputs, teacher_temperature=0.07).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        update_ema(model.teacher, model.student, 0.99)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="vits16", help="preset of the backbone")
    parser.add_argument("--batch", type=int, default=4, help="images of a step")
    parser.add_argument("--prototypes", type=int, default=8192, help="published: 65536")
    parser.add_argument("--seconds", type=float, default=60)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"

    backbone = DINOv3ViTConfig.from_preset(args.size)
    head = {"num_prototypes": args.prototypes}
    config = DINOv3PreTrainingConfig(backbone_config=backbone, dino_head=head, ibot_head=head)
    inputs = batch(backbone, args.batch, device)
    steps = {
        "float32, packed": stepper(DINOv3ForPreTraining, config, inputs, bf16=False),
        "float32, separate forwards": stepper(SeparateForwards, config, inputs, bf16=False),
        "bf16 autocast, packed": stepper(DINOv3ForPreTraining, config, inputs, bf16=True),
        "bf16 autocast, separate forwards": stepper(SeparateForwards, config, inputs, bf16=True),
    }
    times = paired_times(steps, args.seconds)
    first = next(iter(steps))
    rows = [[name, f"{1000 * times.median(name):.0f}", times.ratio_text(name, first)] for name in steps]
    append_results(
        f"Training step, {args.size}, {args.batch} images, {args.prototypes} prototypes",
        ["step", "ms", "/ first row"],
        rows,
        ["transformers"],
    )


if __name__ == "__main__":
    main()
