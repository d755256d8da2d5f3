"""What `dinov3-hf plan` reads of a recipe: the part of it that memory and time depend on."""

from dataclasses import replace
from math import lcm
from typing import TYPE_CHECKING, Any, NamedTuple

from dinov3_hf.errors import ArgumentError
from dinov3_hf.plan.backbones import backbone_of
from dinov3_hf.plan.distillation import Distillation
from dinov3_hf.plan.workload import NUM_GLOBAL_CROPS, FixedTeacher, Head, Projection, Resolution, Workload
from dinov3_hf.recipes.pages import read_recipe

if TYPE_CHECKING:
    from dinov3_hf.training.distillation_config import DistillationConfig
    from dinov3_hf.training.distillation_teacher import TeacherDescription
    from dinov3_hf.training.ssl_config import SSLConfig

# Fields that the machine which trains has to check, not the one that plans.
ELSEWHERE = ("fp8", "engine", "deepspeed", "per_device_train_batch_size", "student_ranks")


class Asked(NamedTuple):
    """
    Args:
        recipe: its name.
        args: a configuration of the class that the recipe's script takes; without what depends on the machine:
        engine: as in the recipe.
        micro_batch: images of a forward pass of a rank.
        student_ranks: of a distillation.
    """

    recipe: str
    args: "SSLConfig"
    engine: str
    micro_batch: int | None
    student_ranks: dict[str, int] | str | None

    @property
    def is_distillation(self) -> bool:
        from dinov3_hf.training.distillation_config import DistillationConfig

        return isinstance(self.args, DistillationConfig)


def read_words(words: list[str]) -> Asked:
    """
    Args:
        words: `RECIPE --field value ...`, as the training scripts take them.

    Raises:
        ArgumentError: no recipe, an unknown recipe or field, a value of the wrong type.
        ValueError: a value is refused by the configuration.
    """
    from dinov3_hf.training.arguments import merge_fields, split_words
    from dinov3_hf.training.continued_config import ContinuedConfig
    from dinov3_hf.training.distillation_config import DistillationConfig
    from dinov3_hf.training.ssl_config import SSLConfig

    recipe, overrides = split_words(words)
    if recipe is None:
        raise ArgumentError("plan needs a recipe; give its name or a YAML file first, then --FIELD VALUE.")
    fields = read_recipe(recipe)
    named = {*fields, *(override.path[0] for override in overrides)}
    config_class: type[SSLConfig] = SSLConfig
    if named & {"model", "head_steps"}:
        config_class = ContinuedConfig
    elif named & {"teacher", "students"}:
        config_class = DistillationConfig
    merged = merge_fields(config_class, recipe, fields, overrides)
    elsewhere = {name: merged.pop(name, None) for name in ELSEWHERE}
    # One process plans for many: how they cut the batch is checked here, not by the configuration.
    for entry in merged.get("crop_sizes") or []:
        entry.pop("per_device_train_batch_size", None)
    if merged.pop("offload_optimizer", False):
        raise ValueError("offload_optimizer cannot be planned: its time depends on the host; set it to false.")
    return Asked(
        recipe,
        config_class(**{**merged, "use_cpu": True}),
        elsewhere["engine"] or "auto",
        elsewhere["per_device_train_batch_size"],
        elsewhere["student_ranks"],
    )


def workload_of(args: "SSLConfig", micro_batch: int | None = None) -> Workload:
    """What one network asks for."""
    from dinov3_hf.models.dinov3_pretraining.backbones import WITHOUT_MASK_TOKEN, own_annotations

    backbone = args.backbone_config()
    image_groups = [1]
    if backbone.model_type not in WITHOUT_MASK_TOKEN and backbone.drop_path_rate > 0:
        image_groups.append(args.drop_path_group_size)
    if args.gram_teacher is not None and not args.gram_per_image:
        image_groups.append(args.gram_group_size or args.global_batch_size)
    gram_teacher = args.pretraining_config().gram_teacher
    return Workload(
        backbone=backbone_of(
            backbone.model_type, {name: backbone.__dict__[name] for name in own_annotations(type(backbone))}
        ),
        dino_head=Head(**args.dino_head),
        ibot_head=None if args.mask_free else Head(**args.ibot_head),
        resolutions=tuple(
            Resolution(sizes.global_crop_size, sizes.local_crop_size, sizes.gram_crop_size, sizes.probability)
            for sizes in args.crop_size_mix().sizes
        ),
        num_local_crops=args.num_local_crops,
        masked_share=_masked_share(args),
        gram_teacher=gram_teacher,  # type: ignore[arg-type]  # checked by its configuration
        global_batch_size=args.global_batch_size,
        max_steps=args.max_steps,
        image_group=lcm(*image_groups),
        koleo_group=args.koleo_group_size or args.global_batch_size,
        drop_path_group=args.drop_path_group_size,
        bf16=args.precision != "fp32",
        recomputation=args.gradient_checkpointing,  # type: ignore[arg-type]  # no boolean any more
        micro_batch=micro_batch,
    )


def distillation_of(args: "DistillationConfig", micro_batch: int | None = None) -> Distillation:
    """What a teacher and its students ask for."""
    teacher = _fixed_teacher(args)
    students = {}
    for name, student in args.student_args.items():
        workload = workload_of(student, micro_batch)
        if args.objective == "features":
            projection = Projection(teacher.width)
            patches = projection if student.patch_weight > 0 else None
            workload = replace(workload, dino_head=projection, ibot_head=patches, masked_share=1.0)
        students[name] = replace(
            workload,
            fixed_teacher=teacher,
            patch_size=args.patch_size,
            gram_teacher=None if student.gram_teacher is None else "fixed",
            bf16=args.precision != "fp32",  # the student's has been chosen for this machine
        )
    return Distillation(teacher, students)


def _masked_share(args: "SSLConfig") -> float:
    return args.mask_probability * sum(args.mask_ratio) / 2


def _fixed_teacher(args: "DistillationConfig") -> FixedTeacher:
    description, side = args.description, args.global_crop_size
    b = 4 if args.precision == "fp32" else 2
    num_patches = NUM_GLOBAL_CROPS * args.mask_grid(args.crop_size_mix().sizes[0]) ** 2
    asks_heads = args.objective == "prototypes"
    asks_for_patches = args.objective == "features" or args.gram_teacher is not None
    return FixedTeacher(
        **_forward_pass(description, side, b),
        width=description.width,
        masked_patches=0.0 if args.mask_free else _masked_share(args) * num_patches,
        asked_patches=num_patches if asks_for_patches else 0,
        scale=args.teacher_to_student_scale,
        dino_head=Head(**description.heads["dino_head"]) if asks_heads else None,
        ibot_head=Head(**description.heads["ibot_head"]) if asks_heads and not args.mask_free else None,
    )


def _forward_pass(description: "TeacherDescription", side: int, b: int) -> dict[str, Any]:
    """`num_parameters`, and operations and bytes of a crop."""
    from dinov3_hf.models.dinov3_pretraining.backbones import BACKBONES
    from dinov3_hf.training.teacher_networks import network_config

    config = network_config(description.source)
    if description.model_type in BACKBONES:
        backbone = backbone_of(description.model_type, config.to_dict())
        return {
            "num_parameters": backbone.num_parameters,
            "crop_flop": backbone.flop(side).forward,
            "crop_bytes": backbone.passing_bytes(1, side, b),
        }
    return _counted(description, config, side, b)


def _counted(description: "TeacherDescription", config: Any, side: int, b: int) -> dict[str, Any]:
    """Of a network that is not this package's: by a forward pass without numbers."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModel

    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        network = AutoModel.from_config(config).eval()
        sizes: list[int] = []
        for module in network.modules():
            module.register_forward_hook(lambda module, inputs, output: sizes.extend(_sizes(output)))
        description.tokens(network, torch.empty(1, description.num_channels, side, side))
    return {
        "num_parameters": sum(parameter.numel() for parameter in network.parameters()),
        "crop_flop": counter.get_total_flops(),
        "crop_bytes": 4 * b * max(sizes),  # of the largest result, what it is made of and the residual stream beside
    }


def _sizes(output: Any) -> list[int]:
    from torch import Tensor

    return [output.numel()] if isinstance(output, Tensor) else []
