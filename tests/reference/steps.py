"""Kinds ssl_step and ssl_trajectory: optimizer steps of pre-training with the code that the trainer uses."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from dinov3_hf.convert.dinov3_vit import state_dict_from_native, state_dict_to_native
from dinov3_hf.models.dinov3_pretraining.configuration_dinov3_pretraining import DINOv3PreTrainingConfig
from dinov3_hf.models.dinov3_pretraining.modeling_dinov3_pretraining import (
    DINOv3ForPreTraining,
    DINOv3PreTrainingOutput,
    SSLNetwork,
)
from dinov3_hf.training.clipping import clip_gradients
from dinov3_hf.training.ema import update_ema
from dinov3_hf.training.param_groups import parameter_groups
from dinov3_hf.training.recipe_scheduler import RecipeScheduler

from .compare import Comparison, Declined, NotInThePackageYet, refuse_unknown
from .io import Case
from .native import RecordedDraws, vit_config
from .schedules import DEFAULT_OPTIM, DEFAULT_TEACHER, new_style_schedules, old_style_schedules, schedule

# Native constructor argument -> setting of the student that it is taken from.
BACKBONE_ARGUMENTS = {
    "layerscale_init": "layerscale",
    **{
        name: name
        for name in (
            *("patch_size", "drop_path_rate", "ffn_layer", "norm_layer", "qkv_bias", "proj_bias", "ffn_bias"),
            *("n_storage_tokens", "mask_k_bias", "untie_cls_and_patch_norms", "untie_global_and_local_cls_norm"),
            *("pos_embed_rope_base", "pos_embed_rope_min_period", "pos_embed_rope_max_period"),
            *("pos_embed_rope_normalize_coords", "pos_embed_rope_shift_coords", "pos_embed_rope_jitter_coords"),
            "pos_embed_rope_rescale_coords",
        )
    },
}
# The values that training takes for granted; others are declined.
FIXED: dict[str, dict[str, Any]] = {
    "student": {"pos_embed_type": "rope", "fp8_enabled": False},
    "dino": {"force_weight_norm": False},
    "ibot": {"separate_head": True},
    "optim": {"optimizer": "adamw"},
    "train": {"centering": "sinkhorn_knopp", "use_teacher_head": True, "learn_from_teacher_tokens": False},
    "crops": {"teacher_to_student_resolution_scale": 1.0},
}
# The same, but of a setting that counts only with dino.koleo_loss_distributed.
FIXED_KOLEO = {"koleo_distributed_replicas": 0, "koleo_distributed_loss_group_data": True}
HEAD = ("head_n_prototypes", "head_bottleneck_dim", "head_hidden_dim", "head_nlayers")
# Settings that a case may override. The last row of a section holds those without a say in a recorded step: ignored by
# the original, about speed, or about how the batch was made. Without its loss, nothing of `gram` acts.
HONOURED: dict[str, tuple[str, ...]] = {
    "student": (
        *("arch", *BACKBONE_ARGUMENTS.values(), *FIXED["student"]),
        *("ffn_ratio", "in_chans", "pos_embed_rope_dtype"),  # taken from the architecture
        *("pretrained_weights", "resume_from_teacher_chkpt", "fp8_filter"),
    ),
    "dino": (
        *("loss_weight", "global_ignore_diagonal", *HEAD, "koleo_loss_weight", "koleo_loss_distributed", "koleo_topk"),
        *("koleo_distributed_loss_group_size", "reweight_dino_local_loss", "local_loss_weight_schedule"),
        *(*FIXED["dino"], *FIXED_KOLEO, "head_norm_last_layer"),
    ),
    "ibot": (
        *("loss_weight", *HEAD, *FIXED["ibot"]),
        *("mask_sample_probability", "mask_ratio_min_max", "mask_random_circular_shift", "head_norm_last_layer"),
        "force_masking_even_with_zero_weight",
    ),
    "optim": (
        *("adamw_beta1", "adamw_beta2", "clip_grad", "layerwise_decay", "patch_embed_lr_mult", "scaling_rule"),
        *(*DEFAULT_OPTIM, "epochs", *FIXED["optim"]),
        *("dino_head_wd_multiplier", "multi_tensor_optim", "dump_fsdp_weights_path"),
    ),
    "teacher": tuple(DEFAULT_TEACHER),
    "train": (
        *("OFFICIAL_EPOCH_LENGTH", "batch_size_per_gpu", *FIXED["train"]),
        *("seed", "num_workers", "monitor_gradient_norm", "compile", "cudagraphs", "checkpointing"),
        *("checkpointing_full", "dataset_path", "data_config", "cache_dataset", "output_dir", "saveckp_freq"),
        "sharded_eval_checkpoint",
    ),
    "crops": (
        *("global_crops_size", "global_crops_scale", "local_crops_size", "local_crops_scale", "local_crops_number"),
        *("gram_teacher_crops_size", "horizontal_flips", "rgb_mean", "rgb_std", *FIXED["crops"]),
        *("localcrops_subset_of_globalcrops", "share_color_jitter", "gram_teacher_no_distortions"),
    ),
    "compute_precision": ("param_dtype",),  # the recorded steps are in float32 throughout
}
# Settings of the student that draw random numbers in a training step.
RANDOM = ("pos_embed_rope_shift_coords", "pos_embed_rope_jitter_coords", "pos_embed_rope_rescale_coords")
UNUSED_WEIGHTS = ("dino_loss", "ibot_patch_loss")  # centres of another way to balance targets
ADAM_EPS = 1e-8
GRADIENT_ROUNDING = 1e-6  # of an element, relative to the largest of its tensor
SUBMODULES = ("backbone", "dino_head", "ibot_head")


class GivenValues:
    """Schedules of a single step, whose values the case states."""

    def __init__(self, values: Mapping[str, float], local_loss_weight: float) -> None:
        self._values = {
            "lr": values["lr"],
            "last_layer_lr": values["last_layer_lr"],
            "weight_decay": values["wd"],
            "teacher_momentum": values["momentum"],
            "teacher_temperature": values["teacher_temp"],
            "local_loss_weight": local_loss_weight,
        }

    def at(self, step: int) -> dict[str, float]:
        return self._values


class Run:
    """Model, optimizer and schedules of a case; `forward`, `backward`, `clip`, `update` are one iteration of training.

    Args:
        case: a case whose weights are the state dict of student, teacher and heads.
        schedules: `at(step)` gives the values of a step.
    """

    def __init__(self, case: Case, schedules: Any) -> None:
        settings = case.spec["resolved_config"]
        self.case = case
        self.schedules = schedules
        self.model = DINOv3ForPreTraining(_model_config(case)).train()
        self.draws = RecordedDraws(case.inputs)
        networks = ("student", "teacher")
        refuse_unknown("weights", {name.split(".")[0] for name in case.weights}, (*networks, *UNUSED_WEIGHTS))
        for name in networks:
            _load(self._network(name), name, case.weights)
        submodules = self.submodules("student")
        optim = settings["optim"]
        groups = parameter_groups(
            submodules, layerwise_lr_decay=optim["layerwise_decay"], patch_embed_lr_mult=optim["patch_embed_lr_mult"]
        )
        betas = (optim["adamw_beta1"], optim["adamw_beta2"])
        self.optimizer = AdamW(groups, betas=betas, eps=ADAM_EPS, fused=True)
        self.scheduler = RecipeScheduler(self.optimizer, schedules)
        self.max_norm = optim["clip_grad"] or 0.0
        self.momentum_so_far = 1.0  # product of the momenta: what is left of the teacher's first weights

    def submodules(self, name: str) -> dict[str, nn.Module]:
        network = self._network(name)
        return {part: network.get_submodule(part) for part in SUBMODULES}

    def forward(self, batch: dict[str, Tensor], values: Mapping[str, float]) -> DINOv3PreTrainingOutput:
        """The loss of a native batch."""
        return self.model(
            **_our_batch(batch),
            teacher_temperature=values["teacher_temperature"],
            local_loss_weight=values["local_loss_weight"],
        )

    def backward(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()

    def clip(self) -> dict[str, Tensor]:
        """Norms before clipping."""
        return clip_gradients(self.submodules("student"), self.max_norm)

    def update(self, momentum: float) -> None:
        """The optimizer's step, the teacher's, and the schedules'."""
        self.optimizer.step()
        update_ema(self.model.teacher, self.model.student, momentum)
        self.momentum_so_far *= momentum
        self.scheduler.step()

    def native(self, name: str, pick: Callable[[nn.Parameter], Tensor]) -> dict[str, Tensor]:
        """`pick` of every parameter of student or teacher, under native names."""
        tensors: dict[str, Tensor] = {}
        for part, module in self.submodules(name).items():
            picked = {key: pick(parameter).detach() for key, parameter in module.named_parameters()}
            if part == "backbone":
                picked = state_dict_to_native(picked, module.config)
            tensors.update({f"{part}.{key}": tensor for key, tensor in picked.items()})
        return tensors

    def native_weights(self, name: str) -> dict[str, Tensor]:
        """Weights under native names, with the key biases that the original carries along behind its mask."""
        tensors = self.native(name, lambda parameter: parameter)
        if self.model.config.backbone_config.key_bias:
            return tensors
        for key in tensors:
            if key.endswith("attn.qkv.bias"):
                student, first = (self.case.weights[f"{network}.{key}"].chunk(3)[1] for network in ("student", name))
                # Masked biases have no gradient and no weight decay: the student keeps them, the teacher averages.
                masked = torch.lerp(student, first, self.momentum_so_far)
                query, _, value = tensors[key].chunk(3)
                tensors[key] = torch.cat([query, masked, value])
        return tensors

    def rounding_of_first_step(self) -> dict[str, Tensor]:
        """How far rounding of the gradients may move each weight in AdamW's first step, under native names.

        That step is lr g / (|g| + eps): it magnifies a gradient of nearly zero, and what was rounded in it.
        """
        lr = {id(parameter): group["lr"] for group in self.optimizer.param_groups for parameter in group["params"]}

        def movement(parameter: nn.Parameter) -> Tensor:
            size = _gradient(parameter).abs()
            rounding = GRADIENT_ROUNDING * (size.max() if size.numel() > 0 else 0.0)
            slope = ADAM_EPS / ((size - rounding).clamp(min=0) + ADAM_EPS) ** 2
            return lr[id(parameter)] * (slope * rounding).clamp(max=2)

        return self.native("student", movement)

    def _network(self, name: str) -> SSLNetwork:
        return self.model.get_submodule(name)


def check_ssl_step(case: Case, compare: Comparison) -> None:
    """One step: intermediate results, loss terms, gradients, norms, weights of student and teacher afterwards."""
    settings, iteration = case.spec["resolved_config"], case.config["iteration"]
    weight = _local_loss_weight(settings)
    local_loss_weight = 1.0 if weight is None else weight.at(iteration, _max_steps(settings))
    run = Run(case, GivenValues(case.config["schedule_values"], local_loss_weight))
    values = run.schedules.at(iteration)
    _check_intermediate(run, values["teacher_temperature"], compare)

    with run.draws.replayed():
        output = run.forward(case.inputs, values)
    run.backward(output.loss)
    compare.check("loss/total", output.loss)
    for name, value in _native_metrics(output, case.inputs, values).items():
        compare.check(f"metrics/{name}", value)
    gradients = run.native("student", _gradient)
    for name, gradient in gradients.items():
        compare.check(f"grad_before_clip/{name}", gradient)
    # The recorded flags are in the order of the parameters, which is that of the list of outputs.
    names = [name.split("/")[1] for name in case.spec["outputs"] if name.startswith("grad_before_clip/")]
    missing = run.native("student", lambda parameter: torch.full_like(parameter, parameter.grad is None))
    compare.check("student_params_without_gradient", torch.tensor([bool(missing[name].any()) for name in names]))

    for name, norm in run.clip().items():
        compare.check(f"grad_norm_before_clip/{name}", norm)
    slack = run.rounding_of_first_step()
    run.update(values["teacher_momentum"])
    _check_weights(run, compare, "after_step", slack)


def check_ssl_trajectory(case: Case, compare: Comparison) -> None:
    """Many steps: every recorded value of every step, some weights after the last."""
    run = Run(case, _schedules(case))
    num_batches = case.config["num_batches"]
    curves: dict[str, list[float]] = {}
    for step in range(case.config["num_steps"]):
        prefix = f"batch{step % num_batches}/"
        batch = {name.removeprefix(prefix): value for name, value in case.inputs.items() if name.startswith(prefix)}
        values = run.schedules.at(step)
        output = run.forward(batch, values)
        run.backward(output.loss)
        norms = run.clip()
        run.update(values["teacher_momentum"])
        record = {
            "loss/total": output.loss,
            "lr": values["lr"],
            "last_layer_lr": values["last_layer_lr"],
            "weight_decay": values["weight_decay"],
            "momentum": values["teacher_momentum"],
            "teacher_temp": values["teacher_temperature"],
            **{f"metrics/{name}": value for name, value in _native_metrics(output, batch, values).items()},
            **{f"grad_norm_before_clip/{name}": norm for name, norm in norms.items()},
        }
        for name, value in record.items():
            curves.setdefault(name, []).append(value.item() if isinstance(value, Tensor) else value)
    for name, curve in curves.items():
        compare.check(f"trajectory/{name}", torch.tensor(curve, dtype=torch.float64))
    _check_weights(run, compare, "final")


def _model_config(case: Case) -> DINOv3PreTrainingConfig:
    """Our configuration for native settings.

    Raises:
        Declined, NotInThePackageYet: a setting that the package does not have.
        Unknown: an override of a setting that this program does not know.
    """
    settings = case.spec["resolved_config"]
    dino, ibot, student = settings["dino"], settings["ibot"], settings["student"]
    if settings["gram"]["use_loss"]:
        raise NotInThePackageYet("Gram anchoring in the training step")
    for section, values in FIXED.items():
        _decline_others(section, settings[section], values)
    if dino["koleo_loss_distributed"]:
        _decline_others("dino", dino, FIXED_KOLEO)
    for section, overrides in case.config["config_overrides"].items():
        if section != "gram":
            refuse_unknown(f"config_overrides.{section}", overrides, HONOURED.get(section, ()))
    draws_numbers = student["drop_path_rate"] > 0 or any(student[name] for name in RANDOM)
    if draws_numbers and not RecordedDraws(case.inputs):
        raise Declined("a random step (stochastic depth or RoPE augmentation) whose draws were not recorded")
    backbone = {argument: student[setting] for argument, setting in BACKBONE_ARGUMENTS.items()}
    koleo: dict[str, Any] = {"koleo_group_size": case.config["batch_size"], "koleo_topk": 1}
    if dino["koleo_loss_distributed"]:
        koleo = {"koleo_group_size": dino["koleo_distributed_loss_group_size"], "koleo_topk": dino["koleo_topk"]}
    return DINOv3PreTrainingConfig(
        backbone_config=vit_config(backbone | case.config["architectures"][student["arch"]]),
        dino_head=_head(dino),
        ibot_head=_head(ibot),
        dino_weight=dino["loss_weight"],
        dino_global_ignore_diagonal=dino["global_ignore_diagonal"],
        ibot_weight=ibot["loss_weight"],
        koleo_weight=dino["koleo_loss_weight"],
        **koleo,
    )


def _decline_others(section: str, settings: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    for name, value in fixed.items():
        if settings[name] != value:
            raise Declined(f"{section}.{name}: {settings[name]}")


def _head(section: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "num_prototypes": section["head_n_prototypes"],
        "bottleneck_dim": section["head_bottleneck_dim"],
        "hidden_dim": section["head_hidden_dim"],
        "num_layers": section["head_nlayers"],
    }


def _load(network: SSLNetwork, name: str, weights: Mapping[str, Tensor]) -> None:
    parts = tuple(f"{name}.{part}." for part in SUBMODULES)
    refuse_unknown("weights", (key for key in weights if key.startswith(f"{name}.") and not key.startswith(parts)), ())
    for part in SUBMODULES:
        prefix = f"{name}.{part}."
        native = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
        module = network.get_submodule(part)
        module.load_state_dict(state_dict_from_native(native, module.config) if part == "backbone" else native)


def _our_batch(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    global_crops = batch["collated_global_crops"]
    return {
        "global_crops": global_crops,
        "local_crops": batch.get("collated_local_crops", global_crops[:0]),
        "mask": batch["collated_masks"],
        "mask_indices": batch["mask_indices_list"],
        "mask_weight": batch["masks_weight"],
    }


def _check_intermediate(run: Run, teacher_temperature: float, compare: Comparison) -> None:
    """What student and teacher predict, before the loss."""
    batch = _our_batch(run.case.inputs)
    mask_weight = batch.pop("mask_weight")
    logits = run.model.teacher_logits(batch["global_crops"], batch["mask_indices"])
    targets = run.model.teacher_targets(logits, teacher_temperature)
    with torch.no_grad(), run.draws.replayed():
        student = run.model.student_predictions(**batch)
    compare.check("intermediate/masks_weight", mask_weight)
    for name, value in {
        "teacher_global/cls_after_head": logits.cls,
        "teacher_global/masked_patch_after_head": logits.masked,
        "teacher_global/cls_centered": targets.cls_probs,
        "teacher_global/masked_patch_centered": targets.masked_probs,
        "student_global/cls_pre_head": student.cls,
        "student_global/cls_after_head": student.global_logits,
        "student_global/masked_patch_after_head": student.masked_logits,
        "student_local/cls_after_head": student.local_logits,
    }.items():
        compare.check(f"intermediate/{name}", value)


def _native_metrics(
    output: DINOv3PreTrainingOutput, batch: Mapping[str, Tensor], values: Mapping[str, float]
) -> dict[str, Tensor | float]:
    """The unweighted terms under native names."""
    batch_size = float(len(batch["collated_masks"]) // 2)
    return {
        "local_batch_size": batch_size,
        "global_batch_size": batch_size,
        "dino_local_crops_loss": output.losses.get("dino_local", 0.0),
        "dino_local_loss_weight": values["local_loss_weight"],
        "dino_global_crops_loss": output.losses["dino_global"],
        "koleo_loss": output.losses["koleo"],
        "ibot_loss": output.losses["ibot"],
    }


def _check_weights(run: Run, compare: Comparison, suffix: str, slack: Mapping[str, Tensor] | None = None) -> None:
    for native, name in (("student", "student"), ("ema", "teacher")):
        for key, value in run.native_weights(name).items():
            compare.check(f"{native}_{suffix}/{key}", value, 0.0 if slack is None else slack[key])


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _max_steps(settings: Mapping[str, Any]) -> int:
    return settings["optim"]["epochs"] * settings["train"]["OFFICIAL_EPOCH_LENGTH"]


def _local_loss_weight(settings: Mapping[str, Any]) -> Any:
    """Schedule of the local DINO term's weight; None when it is 1 throughout."""
    dino = settings["dino"]
    if not dino["reweight_dino_local_loss"]:
        return None
    return schedule(dino["local_loss_weight_schedule"], settings["train"]["OFFICIAL_EPOCH_LENGTH"])


def _schedules(case: Case) -> Any:
    settings = case.spec["resolved_config"]
    global_batch_size = settings["train"]["batch_size_per_gpu"]  # one process
    epoch_length, max_steps = settings["train"]["OFFICIAL_EPOCH_LENGTH"], _max_steps(settings)
    weight = _local_loss_weight(settings)
    if case.config.get("schedules"):
        rule = settings["optim"]["scaling_rule"]
        return new_style_schedules(case.config["schedules"], rule, global_batch_size, epoch_length, max_steps, weight)
    optim = DEFAULT_OPTIM | settings["optim"]
    teacher = DEFAULT_TEACHER | settings.get("teacher", {}) | case.config["config_overrides"].get("teacher", {})
    return old_style_schedules(optim, teacher, global_batch_size, epoch_length, max_steps, weight)
