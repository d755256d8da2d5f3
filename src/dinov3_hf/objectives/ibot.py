"""iBOT: cross entropy of predictions at masked patches.

Legend: M masked patches of all crops of this process, K prototypes.
"""

import torch
from torch import Tensor
from torch.nn.functional import log_softmax


def ibot_loss(
    student_logits: Tensor,
    teacher_probs: Tensor,
    mask_weight: Tensor,
    num_images: int,
    student_temperature: float = 0.1,
) -> Tensor:
    r"""Cross entropy at masked patches: mean over the patches of a crop, then over crops.

    .. math::
        L_\mathrm{iBOT} = -\frac{1}{I} \sum_{i=1}^{M} w_i \sum_{k=1}^{K}
            p_{ik} \, \log \operatorname{softmax}(z_i / \tau)_k,
        \qquad w_i = \frac{1}{\text{masked patches of the crop of } i}

    I counts every global crop, with or without masked patches: when half of them are masked, the loss is half of the
    mean over masked crops.

    iBOT (arXiv 2111.07832, section 3.1, L_MIM); L_iBOT, the second term of L_Pre in DINOv3 (arXiv 2508.10104,
    equation 1).

    Args:
        student_logits: (M, K), any floating dtype, at the masked patches in the order of `mask.flatten().nonzero()`;
            M may be 0.
        teacher_probs: (M, K), rows sum to 1, at the same patches; no gradient is expected.
        mask_weight: (M,), w_i.
        num_images: I, the global crops (two an image) of this process.
        student_temperature: tau > 0.

    Returns:
        () float32; with M = 0 a zero that still depends on `student_logits`, so that every parameter gets a gradient.

    Raises:
        ValueError: shapes disagree, or `num_images` is below 1.
    """
    if (
        student_logits.ndim != 2
        or student_logits.shape != teacher_probs.shape
        or mask_weight.shape != student_logits.shape[:1]
    ):
        raise ValueError(
            f"student_logits {tuple(student_logits.shape)} and teacher_probs {tuple(teacher_probs.shape)} must be "
            f"(masked patches, prototypes), and mask_weight {tuple(mask_weight.shape)} (masked patches,)."
        )
    if num_images < 1:
        raise ValueError(
            f"num_images is {num_images}; pass the number of global crops, with or without masked patches."
        )
    with torch.autocast(student_logits.device.type, enabled=False):
        log_p = log_softmax(student_logits.float() / student_temperature, dim=-1)  # (M, K)
        cross_entropy = -(teacher_probs.float() * log_p).sum(dim=-1)  # (M,)
        return (mask_weight.float() * cross_entropy).sum() / num_images
