"""From the tokens of a fixed teacher to what its students have to predict.

Between the two lies a [`TeacherAnswer`], image by image, so that images can travel between processes: the bottleneck
of a head is far narrower than its logits. Its last layer and Sinkhorn-Knopp run where the student is.

Letters: B images, G = 2 global crops of each, N patches of a crop on the students' grid, M masked patches, D width of
the teacher, d and d' bottleneck widths of its DINO and iBOT head.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dinov3_hf.models.dinov3_pretraining.configuration_dinov3_pretraining import NUM_GLOBAL_CROPS
from dinov3_hf.models.dinov3_pretraining.gram_anchor import resize_patches
from dinov3_hf.models.dinov3_pretraining.prototype_head import PrototypeHead
from dinov3_hf.models.dinov3_pretraining.teacher_targets import (
    TeacherLogits,
    TeacherTargets,
    balanced_targets_of_step,
)


class Tokens(Protocol):
    """What a teacher says of global crops, crop-major."""

    @property
    def cls(self) -> Tensor: ...  # (G*B, D)

    @property
    def patches(self) -> Tensor: ...  # (G*B, h * w, D), row by row

    @property
    def grid(self) -> tuple[int, int]: ...  # h, w


@dataclass
class TeacherAnswer:
    """What a teacher says of images, image-major; in its compute dtype, without gradient."""

    cls: Tensor  # (B, G, d) normalised bottlenecks of the DINO head; (B, G, D) CLS tokens for features
    masked: (
        Tensor | None
    )  # (M, d') normalised bottlenecks of the iBOT head, by image, crop, patch; None without L_iBOT
    patches: Tensor | None  # (B, G, N, D); None unless features or L_Gram ask for them


@torch.no_grad()
def teacher_answer(
    tokens: Tokens,
    dino_head: PrototypeHead | None,
    ibot_head: PrototypeHead | None,
    mask: Tensor | None,
    grid: tuple[int, int],
    *,
    objective: str,
    with_patches: bool,
) -> TeacherAnswer:
    """
    The part of a teacher's tokens that its students learn from.

    Args:
        tokens: of the global crops.
        dino_head, ibot_head: the teacher's; not read for features. No iBOT head is no L_iBOT.
        mask: (G*B, N) bool, the patches of L_iBOT; may be None without it.
        grid: rows and columns of the students' patches, N together. Patches of another grid are resized to it before
            anything else.
        objective: "prototypes" or "features".
        with_patches: whether all patches are needed.

    Raises:
        ValueError: prototypes of a teacher without a DINO head, or an iBOT head without a mask on `grid`.
    """
    cls = _image_major(tokens.cls)  # (B, G, D)
    wants_masked = objective == "prototypes" and ibot_head is not None
    patches = None
    if with_patches or wants_masked:
        resized = resize_patches(tokens.patches, tokens.grid, grid, antialias=False)
        patches = _image_major(resized.to(tokens.patches.dtype))  # (B, G, N, D)
    masked = None
    if objective == "prototypes":
        if dino_head is None:
            raise ValueError("the teacher has no heads, so it assigns no prototypes; set objective: features.")
        cls = dino_head.bottleneck(cls)  # (B, G, d)
        if ibot_head is not None and patches is not None:
            chosen = patches[_image_major(_checked(mask, len(tokens.cls), grid))]  # (M, D)
            masked = ibot_head.bottleneck(chosen)  # (M, d')
    return TeacherAnswer(cls, masked, patches if with_patches else None)


@torch.no_grad()
def distillation_targets(
    answers: list[TeacherAnswer],
    masks: list[Tensor] | list[None],
    dino_head: PrototypeHead | None,
    ibot_head: PrototypeHead | None,
    temperature: float,
    sinkhorn_iterations: int,
    objective: str,
) -> list[TeacherTargets]:
    """
    Targets of the micro-batches of a step, balanced over all of them and over all processes of the current group.

    Args:
        answers: one a micro-batch.
        masks: of each the (G*B, N) bool that its answer was made with, crop-major.
        dino_head, ibot_head: the teacher's, whose last layers are applied; not read for features.
        temperature: of the teacher's Sinkhorn-Knopp.
        sinkhorn_iterations: 0 is a plain softmax.
        objective: "prototypes" or "features".

    Returns:
        Crop-major targets; masked patches in the order of `mask.flatten().nonzero()`.
    """
    if objective == "features":
        return [
            TeacherTargets(None, None, _crop_major(answer.patches), cls=answer.cls.transpose(0, 1))
            for answer in answers
        ]
    assert dino_head is not None  # as in teacher_answer
    logits = [
        TeacherLogits(
            cls=dino_head.last_layer(answer.cls.transpose(0, 1)),  # (G, B, K)
            masked=_masked_logits(answer.masked, mask, ibot_head),
            patches=_crop_major(answer.patches),
        )
        for answer, mask in zip(answers, masks, strict=True)
    ]
    return balanced_targets_of_step(logits, temperature, sinkhorn_iterations)


def _masked_logits(masked: Tensor | None, mask: Tensor | None, ibot_head: PrototypeHead | None) -> Tensor | None:
    """(M, d') image-major -> (M, K') crop-major."""
    if masked is None or mask is None or ibot_head is None:
        return None
    by_image = _image_major(mask)  # (B, G, N)
    # At each masked patch its row in `masked`; read again in the order of crops.
    rows = (by_image.flatten().cumsum(0) - 1).view_as(by_image).transpose(0, 1).flatten(0, 1)[mask]  # (M,)
    logits: Tensor = ibot_head.last_layer(masked[rows])
    return logits


def _checked(mask: Tensor | None, num_crops: int, grid: tuple[int, int]) -> Tensor:
    expected = (num_crops, grid[0] * grid[1])
    if mask is None or mask.shape != expected:
        found = "there is no mask" if mask is None else f"the mask is {tuple(mask.shape)}"
        raise ValueError(f"{found}, but L_iBOT needs one of (crops, patches) {expected}.")
    return mask


def _image_major(crops: Tensor) -> Tensor:
    """(G*B, ...) -> (B, G, ...)."""
    return crops.unflatten(0, (NUM_GLOBAL_CROPS, -1)).transpose(0, 1)


def _crop_major(images: Tensor | None) -> Tensor | None:
    """(B, G, ...) -> (G*B, ...)."""
    return None if images is None else images.transpose(0, 1).flatten(0, 1)
