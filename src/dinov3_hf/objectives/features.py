"""Feature distillation: the student's projected tokens follow the tokens of a teacher.

Legend: `...` any leading dimensions, D width of the teacher.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def feature_loss(predictions: Tensor, targets: Tensor, distance: str = "cosine") -> Tensor:
    r"""Mean distance of predictions to the teacher's tokens.

    .. math::
        L_\mathrm{cosine} = \frac{1}{R} \sum_{r=1}^{R} \Big(1 - \frac{x_r \cdot y_r}{\|x_r\| \|y_r\|}\Big), \qquad
        L_\mathrm{smooth\ L1} = \frac{1}{R D} \sum_{r=1}^{R} \sum_{d=1}^{D}
            h\big(x_{rd} - \operatorname{LN}(y_r)_d\big),

    with h(e) = e^2 / 2 for |e| < 1, |e| - 1/2 elsewhere, over R tokens. LN has no parameters: neither distance depends
    on the scale of the teacher's tokens.

    Cosine and smooth L1 are the distances of AM-RADIO (arXiv 2312.06709); smooth L1 to targets after such a norm is
    that of data2vec (arXiv 2202.03555).

    Args:
        predictions: (..., D), any floating dtype.
        targets: (..., D), any floating dtype; no gradient passes to them.
        distance: "cosine" or "smooth_l1".

    Returns:
        () float32.

    Raises:
        ValueError: shapes differ, or `distance` is neither of the two.
    """
    if predictions.shape != targets.shape:
        raise ValueError(
            f"predictions {tuple(predictions.shape)} and targets {tuple(targets.shape)} must have the same shape; "
            "project the student's tokens to the teacher's width, and bring both to one grid."
        )
    with torch.autocast(predictions.device.type, enabled=False):
        predictions, targets = predictions.float(), targets.detach().float()
        if distance == "cosine":
            cosine = (F.normalize(predictions, dim=-1) * F.normalize(targets, dim=-1)).sum(dim=-1)  # (...)
            return 1 - cosine.mean()
        if distance == "smooth_l1":
            return F.smooth_l1_loss(predictions, F.layer_norm(targets, targets.shape[-1:]))
    raise ValueError(f"distance {distance!r} is unknown; choose 'cosine' or 'smooth_l1'.")
