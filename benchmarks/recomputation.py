"""What `gradient_checkpointing` and `torch_compile` save and cost, in one optimizer step of pre-training.

    python benchmarks/recomputation.py [--size vits16] [--layers 12] [--batch 4] [--seconds 60]

A step is the one of train_step.py under bf16 autocast. Prints milliseconds (median of interleaved steps; on a CPU with
one thread processor time, which other programs disturb less) and what the student's backbone keeps between its forward
and its backward pass: bytes that torch has allocated and not freed when the forward is over, outputs included, of all
crops and for each block and token. Compiling happens before the clock starts; its seconds are of the first step.
"""

import argparse
import time
from types import SimpleNamespace

import torch
from harness import append_results, paired_times
from torch import Tensor, nn
from torch.profiler import profile
from train_step import batch

from dinov3_hf.models.dinov3_pretraining.configuration_dinov3_pretraining import DINOv3PreTrainingConfig
from dinov3_hf.models.dinov3_pretraining.modeling_dinov3_pretraining import DINOv3ForPreTraining
from dinov3_hf.models.dinov3_vit.configuration_dinov3_vit import DINOv3ViTConfig
from dinov3_hf.training.ema import update_ema
from dinov3_hf.training.memory import prepare_blocks


class Step:
    """A model with its optimizer, prepared as a recipe says."""

    def __init__(self, config: DINOv3PreTrainingConfig, inputs: dict[str, Tensor], **recipe) -> None:
        self.inputs, self.device = inputs, inputs["mask"].device
        torch.manual_seed(0)
        self.model = DINOv3ForPreTraining(config).to(self.device).train()
        prepare_blocks(self.model, SimpleNamespace(**recipe))
        self.optimizer = torch.optim.AdamW(self.model.student.parameters(), lr=1e-4, fused=True)

    def __call__(self) -> None:
        with torch.autocast(self.device.type, torch.bfloat16):
            loss = self.model(**self.inputs, teacher_temperature=0.07).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        update_ema(self.model.teacher, self.model.student, 0.99)

    def kept_bytes(self) -> int:
        """What a forward of the student's backbone leaves behind."""
        backbone: nn.Module = self.model.student.backbone
        crops = [self.inputs["global_crops"], self.inputs["local_crops"]]
        with profile(profile_memory=True) as recorded:
            with torch.autocast(self.device.type, torch.bfloat16):
                outputs = backbone(crops, bool_masked_pos=[self.inputs["mask"], None])
            assert len(outputs) == 2  # they live until here
        events = recorded.key_averages()
        if self.device.type == "cuda":
            return sum(event.self_device_memory_usage for event in events)
        return sum(event.self_cpu_memory_usage for event in events)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="vits16", help="preset of the backbone")
    parser.add_argument("--layers", type=int, help="blocks of the backbone, if not all")
    parser.add_argument("--batch", type=int, default=4, help="images of a step")
    parser.add_argument("--prototypes", type=int, default=1024, help="published: 65536")
    parser.add_argument("--seconds", type=float, default=60)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"

    changes = {} if args.layers is None else {"num_hidden_layers": args.layers}
    backbone = DINOv3ViTConfig.from_preset(args.size, **changes)
    head = {"num_prototypes": args.prototypes}
    config = DINOv3PreTrainingConfig(backbone_config=backbone, dino_head=head, ibot_head=head)
    inputs = batch(backbone, args.batch, device)
    patches = [
        (crops.shape[-1] // backbone.patch_size) ** 2 for crops in (inputs["global_crops"], inputs["local_crops"])
    ]
    prefix = 1 + backbone.num_register_tokens
    tokens = sum(
        len(inputs[name]) * (prefix + count)
        for name, count in zip(("global_crops", "local_crops"), patches, strict=True)
    )

    steps, kept, first_step = {}, {}, {}
    for compiled in (False, True):
        for recomputation in ("none", "selective", "full"):
            name = f"{recomputation}{', compiled' if compiled else ''}"
            steps[name] = Step(config, inputs, gradient_checkpointing=recomputation, torch_compile=compiled, fp8=False)
            begin = time.perf_counter()
            steps[name]()
            first_step[name] = time.perf_counter() - begin
            kept[name] = steps[name].kept_bytes()
    alone = device == "cpu" and torch.get_num_threads() == 1
    times = paired_times(steps, args.seconds, clock=time.process_time if alone else time.perf_counter)
    rows = [
        [
            name,
            f"{1000 * times.median(name):.0f}",
            times.ratio_text(name, "none"),
            f"{kept[name] / 2**20:.0f}",
            f"{kept[name] / kept['none']:.2f}",
            f"{kept[name] / (tokens * backbone.num_hidden_layers * backbone.hidden_size):.1f}",
            f"{first_step[name]:.0f}",
        ]
        for name in steps
    ]
    append_results(
        f"Recomputation and compiling, {args.size}, {backbone.num_hidden_layers} blocks, {args.batch} images, "
        "bf16 autocast",
        ["gradient_checkpointing", "ms", "/ none", "kept MiB", "/ none", "bytes / (token x block x width)", "first s"],
        rows,
        ["transformers"],
    )


if __name__ == "__main__":
    main()
