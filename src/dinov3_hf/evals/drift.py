"""Drift: how far the features of a model have moved from what they were at the start.

Letters: N images, P patches of an image, D features.
"""

from torch import Tensor
from torch.nn.functional import cosine_similarity

from dinov3_hf.evals.features import Features


def drift(start: Features, now: Features) -> dict[str, float]:
    r"""One minus the mean cosine between features then and now of the same images.

    $$ \mathrm{cls} = 1 - \frac{1}{N} \sum_n \cos(c_n, c^0_n), \qquad
       \mathrm{patch} = 1 - \frac{1}{N P} \sum_{n, i} \cos(x_{ni}, x^0_{ni}) $$

    0 where nothing has moved; a network that has forgotten everything is near 1. Drift is no damage by itself: a model
    that learns has to move. Look at it together with accuracy and `dense_health`: patches that drift while the
    accuracy stands still have lost something for nothing. The number is ours.

    Args:
        start: of N images, with patches.
        now: of the same images in the same order, with patches.

    Returns:
        `{"cls_drift": 0.12, "patch_drift": 0.08}`, each in [0, 2].

    Raises:
        ValueError: features without patches, or of other numbers of images, patches or features.
    """
    if start.patches is None or now.patches is None:
        raise ValueError("drift is that of CLS and patches; ask extract_features for them with with_patches=True.")
    if start.cls.shape != now.cls.shape or start.patches.shape != now.patches.shape:
        raise ValueError(
            f"features of shape {tuple(start.patches.shape)} (images, patches, width) cannot be compared with "
            f"{tuple(now.patches.shape)}; take them of the same images at the same size."
        )
    return {"cls_drift": _moved(start.cls, now.cls), "patch_drift": _moved(start.patches, now.patches)}


def _moved(before: Tensor, now: Tensor) -> float:
    cosines = cosine_similarity(before.double(), now.double(), dim=-1)  # (N,) or (N, P)
    return max(0.0, 1.0 - float(cosines.mean()))  # rounding
