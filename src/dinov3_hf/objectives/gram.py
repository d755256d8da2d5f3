"""Gram anchoring: the patch similarities of the student follow those of an earlier teacher.

Legend: B images, P patches, D features.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def gram_loss(
    student: Tensor,
    teacher: Tensor,
    normalize: bool = True,
    per_image: bool = True,
    negatives: Literal["keep", "remove", "remove_teacher"] = "keep",
) -> Tensor:
    r"""Mean squared difference of the Gram matrices of patch features.

    .. math::
        L_\mathrm{Gram} = \frac{1}{B P^2} \sum_{b=1}^{B}
            \big\lVert X_{S,b} X_{S,b}^\top - X_{G,b} X_{G,b}^\top \big\rVert_F^2,
        \qquad X_{S,b}, X_{G,b} \in \mathbb{R}^{P \times D} \text{ with rows of length 1}

    Without `per_image`, one matrix holds the patches of all images: (B P)^2 similarities, and the mean runs over all
    of them. The diagonal takes part.

    DINOv3 (arXiv 2508.10104, section 4.2, equation 2; there without the mean).

    Args:
        student: (B, P, D), any floating dtype.
        teacher: (B, P, D'), the Gram teacher's features on the student's grid; D' may differ from D; no gradient is
            expected.
        normalize: L2-normalise every patch first (eps 1e-12).
        per_image: compare the patches of an image with one another only.
        negatives: "keep" all similarities; "remove": negative ones become 0 on both sides; "remove_teacher": only the
            teacher's do, the student's negative similarities are kept and pulled towards 0.

    Returns:
        () float32; 0 where there are no patches.

    Raises:
        ValueError: the images or patches of both differ, or `negatives` is none of the three.
    """
    if student.ndim != 3 or teacher.ndim != 3 or student.shape[:2] != teacher.shape[:2]:
        raise ValueError(
            f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must be (images, patches, features) "
            "with the same images and patches; resize the teacher's patch grid to the student's first."
        )
    if negatives not in ("keep", "remove", "remove_teacher"):
        raise ValueError(f"negatives {negatives!r} is unknown; choose 'keep', 'remove' or 'remove_teacher'.")
    with torch.autocast(student.device.type, enabled=False):
        student_similarity = _similarity(student.float(), normalize, per_image)  # (B, P, P) or (1, B P, B P)
        teacher_similarity = _similarity(teacher.float(), normalize, per_image)
        if negatives != "keep":
            teacher_similarity = teacher_similarity.relu()
        if negatives == "remove":
            student_similarity = student_similarity.relu()
        difference = student_similarity - teacher_similarity
        return difference.square().sum() / max(difference.numel(), 1)


def _similarity(features: Tensor, normalize: bool, per_image: bool) -> Tensor:
    if normalize:
        features = F.normalize(features, dim=-1)
    if not per_image:
        features = features.flatten(0, 1)[None]  # (1, B P, D)
    return features @ features.transpose(1, 2)
