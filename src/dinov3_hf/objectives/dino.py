"""DINO: cross entropy of CLS predictions across crops.

Legend: S student crops, T teacher crops, B images, K prototypes.
"""

import torch
from torch import Tensor
from torch.nn.functional import log_softmax


def dino_loss(
    student_logits: Tensor, teacher_probs: Tensor, student_temperature: float = 0.1, ignore_diagonal: bool = False
) -> Tensor:
    r"""Mean cross entropy between the teacher's assignments and the student's predictions of every pair of crops.

    .. math::
        L_\mathrm{DINO} = -\frac{1}{B \, |\mathcal P|} \sum_{(s, t) \in \mathcal P} \sum_{b=1}^{B} \sum_{k=1}^{K}
            p_{tbk} \, \log \operatorname{softmax}(z_{sb} / \tau)_k

    with all S T pairs in P, or without the pairs s = t (`ignore_diagonal`), of which there are min(S, T).

    DINO (arXiv 2104.14294, equation 3); L_DINO, the first term of L_Pre in DINOv3 (arXiv 2508.10104, equation 1).

    Args:
        student_logits: (S, B, K), any floating dtype.
        teacher_probs: (T, B, K), rows sum to 1; no gradient is expected.
        student_temperature: tau > 0.
        ignore_diagonal: leave out the pairs s = t: crop i of the student is crop i of the teacher.

    Returns:
        () float32.

    Raises:
        ValueError: the images or prototypes of both differ, or no pair is left.
    """
    if student_logits.ndim != 3 or teacher_probs.ndim != 3 or student_logits.shape[1:] != teacher_probs.shape[1:]:
        raise ValueError(
            f"student_logits {tuple(student_logits.shape)} and teacher_probs {tuple(teacher_probs.shape)} must be "
            "(crops, images, prototypes) with the same images and prototypes."
        )
    num_student_crops, num_images, _ = student_logits.shape
    num_teacher_crops = teacher_probs.shape[0]
    num_diagonal = min(num_student_crops, num_teacher_crops) if ignore_diagonal else 0
    num_pairs = num_student_crops * num_teacher_crops - num_diagonal
    if num_pairs == 0:
        raise ValueError(
            f"dino_loss has no pair of {num_student_crops} student and {num_teacher_crops} teacher crops to compare; "
            "give more crops or set ignore_diagonal to False."
        )
    with torch.autocast(student_logits.device.type, enabled=False):
        log_p = log_softmax(student_logits.float() / student_temperature, dim=-1)  # (S, B, K)
        targets = teacher_probs.float()  # (T, B, K)
        # The sum over t comes first: one product a student crop instead of S * T.
        total = (log_p * targets.sum(dim=0)).sum()
        if ignore_diagonal:
            total = total - (log_p[:num_diagonal] * targets[:num_diagonal]).sum()
        return -total / (num_images * num_pairs)
