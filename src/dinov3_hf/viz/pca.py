"""Principal components of patch features as colours.

Letters: h*w patches of an image, D features, S patches of all images together.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from dinov3_hf.viz.sheet import Pair, contact_sheet


def pca_colors(patches: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Red, green and blue from the first three principal components of the patches of all images together.

    Fitting all images at once gives equal things equal colours across them. Each component is stretched so that its
    1st and 99th percentile become 0 and 255: a few patches with huge norms do not darken the rest.

    Args:
        patches: of each image, features (h, w, D); h and w may differ.

    Returns:
        Of each image, uint8 (h, w, 3).

    Raises:
        ValueError: if there are fewer than three features.
    """
    dim = patches[0].shape[-1]
    if dim < 3:
        raise ValueError(f"three colours need at least 3 features a patch; these have {dim}.")
    rows = np.concatenate([image.reshape(-1, dim) for image in patches]).astype(np.float64)  # (S, D)
    # Differences that float32 features cannot hold are none: equal patches get equal colours, not amplified rounding.
    resolution = np.finfo(np.float32).eps * np.linalg.norm(rows, axis=-1).mean()
    rows -= rows.mean(axis=0)
    _, directions = np.linalg.eigh(rows.T @ rows)  # (D, D), columns by ascending variance
    directions = directions[:, :-4:-1]  # (D, 3)
    components = rows @ directions  # (S, 3)
    # The sign of a component is arbitrary; with this one few patches are bright among many dark ones, not the reverse.
    components *= np.where((components**3).sum(axis=0) < 0, -1, 1)
    low, high = np.percentile(components, [1, 99], axis=0)  # (3,), (3,)
    scaled = (components - low) / np.maximum(high - low, resolution)
    colors = (scaled.clip(0, 1) * 255).round().astype(np.uint8)  # (S, 3)
    ends = np.cumsum([image.shape[0] * image.shape[1] for image in patches])
    parts = np.split(colors, ends[:-1])
    return [part.reshape(*image.shape[:2], 3) for part, image in zip(parts, patches, strict=True)]


def pca_figure(pictures: Sequence[Image.Image], patches: Sequence[np.ndarray]) -> Image.Image:
    """A sheet of pictures, each with the colours of its patches.

    Args:
        pictures: RGB pictures.
        patches: of each picture, features (h, w, D).
    """
    return contact_sheet([Pair(*pair) for pair in zip(pictures, pca_colors(patches), strict=True)])
