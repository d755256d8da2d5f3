"""Gram anchoring in the step: from two sets of patch tokens to L_Gram (DINOv3, arXiv 2508.10104, section 4).

Letters: B images of the batch, G = 2 global crops of each, N patches of a crop, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3_hf.models.dinov3_pretraining.configuration_dinov3_pretraining import (
    NUM_GLOBAL_CROPS,
    DINOv3PreTrainingConfig,
)
from dinov3_hf.objectives.gram import gram_loss


def resize_patches(patches: Tensor, grid: tuple[int, int], new_grid: tuple[int, int], antialias: bool) -> Tensor:
    """
    Patch tokens on another grid, bicubic, corners not aligned: what makes similarities of a larger crop smoother than
    those of a crop of the student's size (section 4.3).

    Args:
        patches: (I, h * w, D), row by row.
        grid: h, w.
        new_grid: h', w'.
        antialias: low-pass before going to a coarser grid.

    Returns:
        (I, h' * w', D): `patches` itself on an equal grid, float32 otherwise.
    """
    if grid == new_grid:
        return patches
    maps = patches.float().transpose(1, 2).unflatten(2, grid)  # (I, D, h, w)
    resized = F.interpolate(maps, new_grid, mode="bicubic", align_corners=False, antialias=antialias)
    return resized.flatten(2).transpose(1, 2)  # (I, h' * w', D)


def gram_anchor_loss(student: Tensor, teacher: Tensor, mask: Tensor | None, config: DINOv3PreTrainingConfig) -> Tensor:
    """
    L_Gram over each crop, or over groups of images: the mean over the groups of the mean over a group's similarities.

    Args:
        student, teacher: (G*B, N, D) patch tokens, crop-major.
        mask: (G*B, N) bool, needed when `config.gram_tokens` is not "all".
        config: how patches are compared.

    Returns:
        () float32.

    Raises:
        ValueError: `config.gram_group_size` does not divide B.
    """
    if config.gram_per_image:
        return gram_loss(student, teacher, config.gram_normalize, negatives=config.gram_negatives)
    if mask is not None and config.gram_tokens != "all":
        chosen = mask if config.gram_tokens == "masked" else ~mask
    else:
        chosen = torch.ones(student.shape[:2], dtype=torch.bool, device=student.device)  # (G*B, N)
    groups = zip(*(_image_groups(x, config.gram_group_size) for x in (student, teacher, chosen)), strict=True)
    losses = [
        gram_loss(s[of_group][None], t[of_group][None], config.gram_normalize, negatives=config.gram_negatives)
        for s, t, of_group in groups
    ]
    return torch.stack(losses).mean()


def _image_groups(crops: Tensor, group_size: int | None) -> tuple[Tensor, ...]:
    """(G*B, ...) crop-major -> B / group_size tensors (G, group_size, ...)."""
    by_image = crops.unflatten(0, (NUM_GLOBAL_CROPS, -1))  # (G, B, ...)
    batch_size = by_image.shape[1]
    if group_size is None:
        return (by_image,)
    if batch_size % group_size != 0:
        raise ValueError(
            f"gram_group_size {group_size} does not divide the {batch_size} images of a forward; choose a divisor, or "
            "None for all of them."
        )
    return by_image.split(group_size, dim=1)
