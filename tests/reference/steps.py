"""Kinds ssl_step and ssl_trajectory: optimizer steps of pre-training with the code that the trainer uses; what they
share with those of distillation."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from dinov3_hf.convert.dinov3_vit import state_dict_from_native, state_dict_to_native
from dinov3_hf.distributed.engine import Engine
from dinov3_hf.models.dinov3_pretraining.configuration_dinov3_pretraining import DINOv3PreTrainingConfig
from dinov3_hf.models.dinov3_pretraining.gram_anchor import gram_anchor_loss
from dinov3_hf.models.dinov3_pretraining.modeling_dinov3_pretraining import DINOv3ForPreTraining
from dinov3_hf.models.dinov3_pretraining.student_step import DINOv3PreTrainingOutput, StudentPredictions
from dinov3_hf.models.dinov3_pretraining.teacher_targets import TeacherTargets
from dinov3_hf.training.ema import update_ema
from dinov3_hf.training.param_groups import parameter_groups
from dinov3_hf.training.recipe_scheduler import RecipeScheduler

from .compare import Comparison, Unknown, refuse_unknown
from .io import Case
from .native import RecordedDraws
from .step_settings import max_steps_of, model_config, schedules_of, weight_schedules

UNUSED_WEIGHTS = ("dino_loss", "ibot_patch_loss")  # centres of another way to balance targets
ADAM_EPS = 1e-8
GRADIENT_ROUNDING = 1e-6  # of an element, relative to the largest of its tensor


class GivenValues:
    """Schedules of a single step, whose values the case states, but for the weights of loss terms."""

    def __init__(self, values: Mapping[str, float], weights: Mapping[str, float]) -> None:
        self._values = {
            "lr": values["lr"],
            "last_layer_lr": values["last_layer_lr"],
            "weight_decay": values["wd"],
            "teacher_momentum": values["momentum"],
            "teacher_temperature": values["teacher_temp"],
            **weights,
        }

    def at(self, step: int) -> dict[str, float]:
        return self._values


class Run:
    """Model, optimizer and schedules of a case; `forward`, `backward`, `clip`, `update` are one iteration of training.

    Args:
        case: a case whose weights are the state dict of all networks.
        schedules: `at(step)` gives the values of a step.
        model: with a `student`.
        networks: first part of native names -> network; `student` among them.
        average: first part of the native names of the student's moving average.
    """

    def __init__(
        self, case: Case, schedules: Any, model: nn.Module, networks: Mapping[str, nn.Module], average: str
    ) -> None:
        self.settings = settings = case.spec["resolved_config"]
        self.case = case
        self.schedules = schedules
        self.model = model
        self.draws = RecordedDraws(case.inputs)
        self.average = average
        self.networks = {name: submodules_of(network) for name, network in networks.items()}
        refuse_unknown("weights", {name.split(".")[0] for name in case.weights}, (*self.networks, *UNUSED_WEIGHTS))
        for name, submodules in self.networks.items():
            load(submodules, name, case.weights)
        optim = settings["optim"]
        groups = parameter_groups(
            self.networks["student"],
            layerwise_lr_decay=optim["layerwise_decay"],
            patch_embed_lr_mult=optim["patch_embed_lr_mult"],
        )
        betas = (optim["adamw_beta1"], optim["adamw_beta2"])
        self.optimizer = AdamW(groups, betas=betas, eps=ADAM_EPS, fused=True)
        self.scheduler = RecipeScheduler(self.optimizer, schedules)
        self.max_norm = optim["clip_grad"] or 0.0
        self.momentum_so_far = 1.0  # product of the momenta: what is left of the average's first weights

    def forward(self, batch: dict[str, Tensor], values: Mapping[str, float]) -> DINOv3PreTrainingOutput:
        """The loss of a native batch."""
        raise NotImplementedError

    def intermediate(self, batch: dict[str, Tensor], temperature: float) -> dict[str, Tensor]:
        """What the networks say of a native batch, before the loss, under native names."""
        raise NotImplementedError

    def statistics(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """What is recorded of a native batch beside the loss, under native names."""
        return {}

    def backward(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()

    def clip(self) -> dict[str, Tensor]:
        """Norms before clipping."""
        return Engine().clip_gradients(self.networks["student"], self.max_norm)

    def update(self, momentum: float) -> None:
        """The optimizer's step, the teacher's, and the schedules'."""
        self.optimizer.step()
        for part, student in self.networks["student"].items():
            update_ema(self.networks[self.average][part], student, momentum)
        self.momentum_so_far *= momentum
        self.scheduler.step()

    def native(self, name: str, pick: Callable[[nn.Parameter], Tensor]) -> dict[str, Tensor]:
        """`pick` of every parameter of a network, under native names."""
        return native_tensors(self.networks[name], pick)

    def native_weights(self, name: str) -> dict[str, Tensor]:
        """
        Weights under native names, with the key biases that the original carries along behind its mask. Those of a
        Gram teacher are as after a refresh in this step.
        """
        tensors = self.native(name, lambda parameter: parameter)
        if self.model.config.backbone_config.key_bias:
            return tensors
        for key in tensors:
            if key.endswith("attn.qkv.bias"):
                source = "student" if name == "student" else self.average
                student, first = (self.case.weights[f"{network}.{key}"].chunk(3)[1] for network in ("student", source))
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
            size = gradient(parameter).abs()
            rounding = GRADIENT_ROUNDING * (size.max() if size.numel() > 0 else 0.0)
            slope = ADAM_EPS / ((size - rounding).clamp(min=0) + ADAM_EPS) ** 2
            return lr[id(parameter)] * (slope * rounding).clamp(max=2)

        return self.native("student", movement)


class PreTrainingRun(Run):
    """Student, EMA teacher and Gram teacher."""

    def __init__(self, case: Case, schedules: Any) -> None:
        model = DINOv3ForPreTraining(model_config(case)).train()
        networks = {"student": model.student, "teacher": model.teacher}
        if model.gram_teacher is not None:
            networks["gram_teacher"] = nn.ModuleDict({"backbone": model.gram_teacher})
        super().__init__(case, schedules, model, networks, average="teacher")

    def forward(self, batch: dict[str, Tensor], values: Mapping[str, float]) -> DINOv3PreTrainingOutput:
        return self.model(
            **our_batch(batch),
            gram_crops=self.gram_crops(batch),
            teacher_temperature=values["teacher_temperature"],
            local_loss_weight=values["local_loss_weight"],
            gram_weight=values.get("gram_weight", 0.0),
        )

    def gram_crops(self, batch: Mapping[str, Tensor]) -> Tensor | None:
        """The Gram teacher's own crops in a native batch."""
        crops, size = batch.get("collated_gram_teacher_crops"), self.settings["crops"]["gram_teacher_crops_size"]
        if (None if crops is None else crops.shape[-1]) != size:
            raise Unknown(f"crops.gram_teacher_crops_size {size} is not the size of the recorded Gram crops")
        return crops

    def intermediate(self, batch: dict[str, Tensor], temperature: float) -> dict[str, Tensor]:
        inputs = our_batch(batch)
        logits = self.model.teacher_logits(inputs["global_crops"], inputs["mask_indices"])
        targets = self.model.teacher_targets(logits, temperature)
        student = self.student(batch)
        tensors = {"teacher_global/masked_patch_after_head": logits.masked}
        if self.settings["gram"]["use_loss"]:
            patches = self.model.gram_targets(targets, inputs["global_crops"], self.gram_crops(batch))
            tensors["gram_global/teacher_patches"] = patches
            tensors["gram_global/student_patches"] = student.patches
        return tensors | native_predictions(logits.cls, targets, student)

    def student(self, batch: Mapping[str, Tensor]) -> StudentPredictions:
        """What the student says of a native batch, apart from the step."""
        inputs = our_batch(batch)
        del inputs["mask_weight"]
        with torch.no_grad(), self.draws.replayed():
            return self.model.student_predictions(**inputs)

    def statistics(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """L_Gram over the masked, and over the other patches."""
        gram = self.settings["gram"]
        if not gram["use_loss"] or not gram["compute_stats"]:
            return {}
        inputs, student = our_batch(batch), self.student(batch)
        logits = self.model.teacher_logits(inputs["global_crops"], inputs["mask_indices"])
        targets = self.model.teacher_targets(logits, temperature=1.0)  # of which only the patches are looked at
        patches = self.model.gram_targets(targets, inputs["global_crops"], self.gram_crops(batch))
        statistics = {}
        for tokens in ("masked", "unmasked"):
            config = DINOv3PreTrainingConfig(
                **{**self.model.config.to_dict(), "gram_per_image": False, "gram_tokens": tokens}
            )
            statistics[f"stats_only/{tokens}_gram_loss"] = gram_anchor_loss(
                student.patches, patches, inputs["mask"], config
            )
        return statistics


def check_ssl_step(case: Case, compare: Comparison) -> None:
    """One step of pre-training."""
    run = PreTrainingRun(case, given_values(case))
    slack = check_step(run, compare)
    if case.config.get("also_update_gram"):
        run.model.refresh_gram_teacher()
        for key, value in run.native_weights("gram_teacher").items():
            compare.check(f"gram_teacher_after_update/{key}", value, slack[key])


def check_ssl_trajectory(case: Case, compare: Comparison) -> None:
    """Many steps of pre-training."""
    run = PreTrainingRun(case, schedules_of(case))
    refreshes = case.config.get("gram_teacher_updates", [])

    def after_step(step: int) -> None:
        if step + 1 in refreshes:
            run.model.refresh_gram_teacher()

    check_trajectory(run, compare, after_step)


def given_values(case: Case) -> GivenValues:
    """The schedules of a case of one step."""
    settings, iteration = case.spec["resolved_config"], case.config["iteration"]
    max_steps = max_steps_of(settings)
    weights = {name: weight.at(iteration, max_steps) for name, weight in weight_schedules(settings).items()}
    return GivenValues(case.config["schedule_values"], weights)


def check_step(run: Run, compare: Comparison) -> dict[str, Tensor]:
    """
    One step: intermediate results, loss terms, gradients, norms, weights of student and average afterwards.

    Returns:
        How far rounding may have moved each of the student's weights.
    """
    case = run.case
    values = run.schedules.at(case.config["iteration"])
    for name, value in run.intermediate(case.inputs, values["teacher_temperature"]).items():
        compare.check(f"intermediate/{name}", value)
    compare.check("intermediate/masks_weight", case.inputs["masks_weight"])

    statistics = run.statistics(case.inputs)
    with run.draws.replayed():
        output = run.forward(case.inputs, values)
    run.backward(output.loss)
    compare.check("loss/total", output.loss)
    for name, value in {**native_metrics(output, case.inputs, values), **statistics}.items():
        compare.check(f"metrics/{name}", value)
    for name, value in run.native("student", gradient).items():
        compare.check(f"grad_before_clip/{name}", value)
    # The recorded flags are in the order of the parameters, which is that of the list of outputs.
    names = [name.split("/")[1] for name in case.spec["outputs"] if name.startswith("grad_before_clip/")]
    missing = run.native("student", lambda parameter: torch.full_like(parameter, parameter.grad is None))
    compare.check("student_params_without_gradient", torch.tensor([bool(missing[name].any()) for name in names]))

    for name, norm in run.clip().items():
        compare.check(f"grad_norm_before_clip/{name}", norm)
    slack = run.rounding_of_first_step()
    run.update(values["teacher_momentum"])
    _check_weights(run, compare, "after_step", slack)
    return slack


def check_trajectory(run: Run, compare: Comparison, after_step: Callable[[int], None] = lambda step: None) -> None:
    """Many steps: every recorded value of every step, some weights after the last."""
    case = run.case
    num_batches = case.config["num_batches"]
    curves: dict[str, list[float]] = {}
    for step in range(case.config["num_steps"]):
        prefix = f"batch{step % num_batches}/"
        batch = {name.removeprefix(prefix): value for name, value in case.inputs.items() if name.startswith(prefix)}
        values = run.schedules.at(step)
        statistics = run.statistics(batch)
        output = run.forward(batch, values)
        run.backward(output.loss)
        norms = run.clip()
        run.update(values["teacher_momentum"])
        after_step(step)
        metrics = {**native_metrics(output, batch, values), **statistics}
        record = {
            "loss/total": output.loss,
            "lr": values["lr"],
            "last_layer_lr": values["last_layer_lr"],
            "weight_decay": values["weight_decay"],
            "momentum": values["teacher_momentum"],
            "teacher_temp": values["teacher_temperature"],
            **{f"metrics/{name}": value for name, value in metrics.items()},
            **{f"grad_norm_before_clip/{name}": norm for name, norm in norms.items()},
        }
        for name, value in record.items():
            curves.setdefault(name, []).append(value.item() if isinstance(value, Tensor) else value)
    for name, curve in curves.items():
        compare.check(f"trajectory/{name}", torch.tensor(curve, dtype=torch.float64))
    _check_weights(run, compare, "final")


def submodules_of(network: nn.Module) -> dict[str, nn.Module]:
    """The parts that have gradient norms and parameter groups of their own."""
    return dict(network.named_children())


def load(submodules: Mapping[str, nn.Module], name: str, weights: Mapping[str, Tensor]) -> None:
    """Native weights `name.<part>.<...>`, all of them, into the parts of a network."""
    parts = tuple(f"{name}.{part}." for part in submodules)
    refuse_unknown("weights", (key for key in weights if key.startswith(f"{name}.") and not key.startswith(parts)), ())
    for part, module in submodules.items():
        prefix = f"{name}.{part}."
        native = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
        module.load_state_dict(state_dict_from_native(native, module.config) if part == "backbone" else native)


def native_tensors(submodules: Mapping[str, nn.Module], pick: Callable[[nn.Parameter], Tensor]) -> dict[str, Tensor]:
    """`pick` of every parameter of a network's parts, under native names."""
    tensors: dict[str, Tensor] = {}
    for part, module in submodules.items():
        picked = {key: pick(parameter).detach() for key, parameter in module.named_parameters()}
        if part == "backbone":
            picked = state_dict_to_native(picked, module.config)
        tensors.update({f"{part}.{key}": tensor for key, tensor in picked.items()})
    return tensors


def our_batch(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A native batch under our names."""
    global_crops = batch["collated_global_crops"]
    return {
        "global_crops": global_crops,
        "local_crops": batch.get("collated_local_crops", global_crops[:0]),
        "mask": batch["collated_masks"],
        "mask_indices": batch["mask_indices_list"],
        "mask_weight": batch["masks_weight"],
    }


def native_predictions(
    cls_logits: Tensor, targets: TeacherTargets, student: StudentPredictions
) -> dict[str, Tensor | None]:
    """What teacher and student say before the loss, under native names."""
    return {
        "teacher_global/cls_after_head": cls_logits,
        "teacher_global/cls_centered": targets.cls_probs,
        "teacher_global/masked_patch_centered": targets.masked_probs,
        "student_global/cls_pre_head": student.cls,
        "student_global/cls_after_head": student.global_logits,
        "student_global/masked_patch_after_head": student.masked_logits,
        "student_local/cls_after_head": student.local_logits,
    }


def native_metrics(
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
        "gram_loss_weight": values.get("gram_weight", 0.0),
        **{f"{name}_loss": output.losses[name] for name in ("koleo", "ibot", "gram") if name in output.losses},
    }


def _check_weights(run: Run, compare: Comparison, suffix: str, slack: Mapping[str, Tensor] | None = None) -> None:
    for native, name in (("student", "student"), ("ema", run.average)):
        for key, value in run.native_weights(name).items():
            compare.check(f"{native}_{suffix}/{key}", value, 0.0 if slack is None else slack[key])


def gradient(parameter: nn.Parameter) -> Tensor:
    """That of a parameter, zeros where it has none."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
