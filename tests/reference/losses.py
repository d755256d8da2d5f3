"""Kinds dino_loss, ibot_loss, koleo_loss, gram_loss, losses_two_processes."""

import re

import torch
from torch import Tensor

from dinov3_hf.distributed.reductions import rank
from dinov3_hf.objectives.dino import dino_loss
from dinov3_hf.objectives.gram import gram_loss
from dinov3_hf.objectives.ibot import ibot_loss
from dinov3_hf.objectives.koleo import koleo_loss
from dinov3_hf.objectives.sinkhorn import sinkhorn_knopp

from .compare import Comparison
from .io import Case
from .processes import run_in_processes

CENTERING = "declined: centring of the teacher by a moving average (training requires Sinkhorn-Knopp)"
LEFT_OUT = {"softmax_center/*": CENTERING, "center/*": CENTERING}


def check_dino_loss(case: Case, compare: Comparison) -> None:
    """Targets at every temperature and number of iterations; the loss against those of the first, 3 iterations."""
    student, teacher = case.inputs["student_logits"], case.inputs["teacher_logits"]  # (S, B, K), (T, B, K)
    _check_sinkhorn(compare, teacher.flatten(0, 1))
    target = sinkhorn_knopp(teacher.flatten(0, 1), case.config["teacher_temps"][0], 3).view_as(teacher)
    for ignore_diagonal in (False, True):
        logits = student.clone().requires_grad_()
        loss = dino_loss(logits, target, case.config["student_temp"], ignore_diagonal)
        compare.check(f"loss/ignore_diagonal_{ignore_diagonal}", loss)
        compare.check(f"grad_student_logits/ignore_diagonal_{ignore_diagonal}", _gradient(loss, logits))


def check_ibot_loss(case: Case, compare: Comparison) -> None:
    """Masked form with given, derived and padded rows; the dense form as a masked form on the masked positions."""
    temperature, teacher_temperature = case.config["student_temp"], case.config["teacher_temps"][0]
    inputs = case.inputs
    mask = inputs["masks"]  # (I, P)
    _check_sinkhorn(compare, inputs["teacher_masked"])
    weight = (1 / mask.sum(dim=1, keepdim=True).clamp(min=1)).expand_as(mask)[mask]  # (M,)
    compare.check("masks_weight", weight)

    target = sinkhorn_knopp(inputs["teacher_masked"], teacher_temperature, 3)
    student = torch.cat([inputs["student_masked"], inputs["padding_rows"]])  # (M + padding, K)
    num_masked = len(target)
    given_weight = case.outputs["masks_weight"]
    for form, form_weight in (("given_weight", given_weight), ("default_weight", weight), ("padded", given_weight)):
        rows = student if form == "padded" else student[:num_masked]
        logits = rows.clone().requires_grad_()
        loss = ibot_loss(logits[:num_masked], target, form_weight, len(mask), temperature)
        compare.check(f"forward_masked/{form}/loss", loss)
        compare.check(f"forward_masked/{form}/grad_student", _gradient(loss, logits))

    dense = inputs["student_dense"].clone().requires_grad_()  # (I, P, K)
    dense_target = (inputs["teacher_dense"] / teacher_temperature).softmax(dim=-1)[mask]
    loss = ibot_loss(dense[mask], dense_target, weight, len(mask), temperature)
    compare.check("forward_dense/loss", loss)
    compare.check("forward_dense/grad_student", _gradient(loss, dense))


def check_koleo_loss(case: Case, compare: Comparison) -> None:
    """The plain loss, and the distributed one in a single process, which is the same function here."""
    for name, features in case.inputs.items():
        for prefix, topk in [("koleo", 1), *((f"koleo_distributed/topk_{k}", k) for k in case.config["topk"])]:
            x = features.clone().requires_grad_()
            loss = koleo_loss(x, topk=topk)
            compare.check(f"{prefix}/{name}/loss", loss)
            compare.check(f"{prefix}/{name}/grad", _gradient(loss, x))


def check_gram_loss(case: Case, compare: Comparison) -> None:
    """Every recorded combination of options, read from the names of the outputs."""
    options = re.compile(
        r"normalized_(True|False)/remove_neg_(True|False)/remove_only_teacher_neg_(True|False)/img_level_(True|False)"
    )
    for prefix in sorted({name.rsplit("/", 1)[0] for name in case.outputs}):
        match = options.fullmatch(prefix)
        if match is None:
            continue  # counted as not compared
        normalize, remove, remove_teacher, per_image = (value == "True" for value in match.groups())
        x = case.inputs["student"].clone().requires_grad_()
        negatives = "remove" if remove else "remove_teacher" if remove_teacher else "keep"
        loss = gram_loss(x, case.inputs["teacher"], normalize, per_image, negatives)
        compare.check(f"{prefix}/loss", loss)
        compare.check(f"{prefix}/grad_student", _gradient(loss, x))


def check_losses_two_processes(case: Case, compare: Comparison) -> None:
    """KoLeo and Sinkhorn-Knopp in as many gloo processes as the case has ranks."""
    world_size = case.config["world_size"]
    results = run_in_processes(_losses_of_a_process, world_size, dict(case.inputs), case.config)
    for rank_index, result in enumerate(results):
        for name, value in result.items():
            compare.check(name.format(rank=f"rank{rank_index}"), value)


def _losses_of_a_process(inputs: dict[str, Tensor], config: dict[str, object]) -> dict[str, Tensor]:
    results = {}
    num_ranks, index = config["world_size"], rank()
    for topk in config["topk"]:
        for group_size in config["loss_group_sizes"]:
            x = inputs["x"].chunk(num_ranks)[index].clone().requires_grad_()
            loss = koleo_loss(x, group_size, topk)
            prefix = f"topk_{topk}/group_{group_size}/{{rank}}"
            results[f"{prefix}/loss"] = loss.detach()
            results[f"{prefix}/grad_local"] = _gradient(loss, x)
    logits = inputs["teacher_logits"]
    split = config["ibot_split"]
    splits = split if isinstance(split, list) else [split]
    # Temperature and iterations are fixed for this kind of case.
    results["dino_sinkhorn/{rank}"] = sinkhorn_knopp(logits.chunk(num_ranks)[index], 0.06, 3)
    results["ibot_sinkhorn_uneven/{rank}"] = sinkhorn_knopp(logits.tensor_split(splits)[index], 0.06, 3)
    return results


def _check_sinkhorn(compare: Comparison, logits: Tensor) -> None:
    """Every recorded `sinkhorn/temp_T/iters_n`."""
    for name in compare.expected:
        if match := re.fullmatch(r"sinkhorn/temp_([\d.e-]+)/iters_(\d+)", name):
            compare.check(name, sinkhorn_knopp(logits, float(match[1]), int(match[2])))


def _gradient(loss: Tensor, x: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(loss, x)
    return gradient
