"""A whole step of a distillation as the trainer takes it, students in turn, with every tensor counted."""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

from dinov3_hf.models.dinov3_pretraining.distillation_targets import distillation_targets, teacher_answer
from dinov3_hf.models.dinov3_pretraining.modeling_dinov3_distillation import DINOv3ForDistillation
from dinov3_hf.models.dinov3_pretraining.prototype_head import PrototypeHead
from dinov3_hf.models.dinov3_vit.configuration_dinov3_vit import DINOv3ViTConfig
from dinov3_hf.models.dinov3_vit.image_processing import build_image_processor
from dinov3_hf.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTModel
from dinov3_hf.training.distillation_config import DistillationConfig
from dinov3_hf.training.distillation_teacher import load_teacher
from tests.plan.training_step import LiveBytes, Measured, convolution_backward_flop

WIDTH = 256
HEADS = {
    "dino_head": {"num_prototypes": 4096, "bottleneck_dim": 96, "hidden_dim": 320, "num_layers": 3, "mlp_bias": True},
    "ibot_head": {"num_prototypes": 2048, "bottleneck_dim": 64, "hidden_dim": 192, "num_layers": 2, "mlp_bias": False},
}


def write_teacher(folder: Path) -> None:
    """A small ViT with prototype heads, as a run leaves one."""
    config = DINOv3ViTConfig.from_preset(
        "vits16", hidden_size=WIDTH, intermediate_size=768, num_attention_heads=4, num_hidden_layers=6
    )
    DINOv3ViTModel(config).save_pretrained(folder)
    build_image_processor(image_size=96, image_mean=[0.5] * 3, image_std=[0.25] * 3).save_pretrained(folder)
    tensors = {
        f"{name}.{key}": tensor.contiguous()
        for name, shape in HEADS.items()
        for key, tensor in PrototypeHead(WIDTH, **shape).state_dict().items()
    }
    shapes = {name: json.dumps(shape) for name, shape in HEADS.items()}
    save_file(tensors, folder / "heads.safetensors", metadata={"format": "pt", **shapes})


def take_distillation_steps(args: DistillationConfig, num_images: int) -> tuple[dict[str, int], Measured]:
    """
    Two optimizer steps of all students.

    Returns:
        Operations of an image by network, and what the second step has at most.
    """
    bf16, scale = args.precision != "fp32", args.teacher_to_student_scale
    side = args.mask_grid(args.crop_size_mix().sizes[0])
    num_masked = 0 if args.mask_free else round(args.mask_probability * sum(args.mask_ratio) / 2 * 2 * side**2)
    mask = torch.zeros(2 * num_images, side**2, dtype=torch.bool)
    mask.view(2, num_images, -1)[0, :, :num_masked] = True
    flop = {}
    live = LiveBytes()
    with live:
        teacher = load_teacher(args.description, bf16=bf16)
        students = {name: DINOv3ForDistillation(own.pretraining_config()) for name, own in args.student_args.items()}
        optimizers = {name: torch.optim.AdamW(s.student.parameters(), fused=True) for name, s in students.items()}

        def counter():
            return FlopCounterMode(
                display=False, custom_mapping={torch.ops.aten.convolution_backward: convolution_backward_flop}
            )

        def step():
            crops = [torch.randn(2 * num_images, 3, args.global_crop_size, args.global_crop_size)]
            crops += [torch.randn(args.num_local_crops * num_images, 3, args.local_crop_size, args.local_crop_size)]
            with counter() as counted:
                answer = teacher_answer(
                    teacher(crops[0]),
                    teacher.dino_head,
                    None if args.mask_free else teacher.ibot_head,
                    mask,
                    (side, side),
                    objective=args.objective,
                    with_patches=args.objective == "features" or args.gram_teacher is not None,
                )
                heads = (teacher.dino_head, teacher.ibot_head)
                (target,) = distillation_targets([answer], [mask], *heads, 0.07, 3, args.objective)
            flop["teacher"] = counted.get_total_flops() // num_images
            if scale != 1:
                sides = [int(crop.shape[-1] / scale) for crop in crops]
                crops += [
                    F.interpolate(crop, (side, side), mode="bilinear", antialias=True)
                    for crop, side in zip(crops, sides, strict=True)
                ]
            for name, model in students.items():
                own = args.student_args[name]
                draws = own.student_draws().at(0, range(num_images), torch.device("cpu"))
                with counter() as counted:
                    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                        output = model.train()(
                            global_crops=crops[-2],
                            local_crops=crops[-1],
                            target=target,
                            mask_indices=mask.flatten().nonzero()[:, 0] if num_masked else None,
                            mask_weight=torch.ones(int(mask.sum())) if num_masked else None,
                            gram_weight=1.0 if own.gram_teacher else 0.0,
                            draws=draws,
                        )
                    output.loss.backward()
                flop[name] = counted.get_total_flops() // num_images
                del output
            for name, model in students.items():
                optimizers[name].step()
                optimizers[name].zero_grad()
                with torch.no_grad():
                    torch._foreach_lerp_(list(model.ema.parameters()), list(model.student.parameters()), 0.01)

        step()
        live.peak = 0
        step()
    num_parameters = sum(p.numel() for model in students.values() for p in model.student.parameters())
    return flop, Measured(num_parameters, sum(flop.values()), live.peak)
