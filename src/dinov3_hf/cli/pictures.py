"""Reading the images of the `visualize` commands and computing their patch features."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm
from transformers import BaseImageProcessor, PreTrainedModel

from dinov3_hf.data.decoding import UnreadableImage, open_image
from dinov3_hf.data.sources.files import PACKED_SUFFIXES
from dinov3_hf.data.sources.recipe import RECIPE_SUFFIXES
from dinov3_hf.data.sources.spec import load_images
from dinov3_hf.evals.features import (
    Features,
    ImageList,
    check_divisible,
    extract_features,
    input_size,
    patch_size,
    to_picture,
)

# Input size of a picture in units of the image processor's, when none is given: more patches show more, and features
# keep their meaning at sizes not too far from those of the training.
DEFAULT_ENLARGEMENT = 3


def read_pictures(source: str, limit: int) -> list[Image.Image]:
    """The RGB image in the file `source`, or up to `limit` images spread over what `load_images` takes.

    Raises:
        FileNotFoundError: if there is no such file or folder, or no image in it.
        ValueError: if an image cannot be read.
    """
    path = Path(source).expanduser()
    if path.is_file() and path.suffix.lower() not in (*PACKED_SUFFIXES, *RECIPE_SUFFIXES):
        try:
            return [to_picture(open_image(path, num_channels=3).decode())]
        except UnreadableImage as error:
            raise ValueError(
                f"{path} cannot be read as an image ({error}); give a JPEG or PNG file, for example."
            ) from error
    images = load_images(source, "test" if source == "digits" else None)
    if images.labels is None:
        rows = np.linspace(0, len(images) - 1, min(limit, len(images))).round().astype(int)
    else:  # one image of each class, then a second of each, and so on
        order = np.argsort(images.labels, kind="stable")
        first = np.searchsorted(images.labels[order], images.labels[order])  # of the same class
        rows = order[np.lexsort((images.labels[order], np.arange(len(images)) - first))][:limit]
    return [to_picture(images.image(int(row))) for row in rows]


def patch_features(
    model: PreTrainedModel, processor: BaseImageProcessor, pictures: Sequence[Image.Image], size: int | None
) -> list[np.ndarray]:
    """Patch features of pictures, float32 (h, w, D) of each; see `picture_features`."""
    return [patch_map(features) for features in picture_features(model, processor, pictures, size)]


def patch_map(features: Features) -> np.ndarray:
    """Patch features of a single picture, float32 (h, w, D)."""
    patches: np.ndarray = features.patch_maps()[0].numpy()
    return patches


def picture_features(
    model: PreTrainedModel, processor: BaseImageProcessor, pictures: Sequence[Image.Image], size: int | None
) -> list[Features]:
    """Features of pictures in their own proportions, with patches.

    Args:
        model: a model with patches.
        processor: its image processor; its size is replaced.
        pictures: RGB, any sizes.
        size: short side of the model's input in pixels; the long side becomes the nearest multiple of the patch size.

    Returns:
        Of each picture.

    Raises:
        ValueError: if `size` is no multiple of the patch size, or the model has no patches or not 1 or 3 channels.
    """
    side = patch_size(model)
    if side is None:
        raise ValueError(f"a model of type {model.config.model_type} has no patches of one size to show.")
    if model.config.num_channels not in (1, 3):
        raise ValueError(f"pictures have 1 or 3 channels; this model takes {model.config.num_channels}.")
    short = size or DEFAULT_ENLARGEMENT * input_size(processor)
    check_divisible(short, side)
    found = []
    for picture in tqdm(pictures, unit=" images", disable=None):  # shown in a terminal only
        width, height = (round(length * short / min(picture.size) / side) * side for length in picture.size)
        seen = picture.resize((width, height), Image.Resampling.BICUBIC)
        seen = seen if model.config.num_channels == 3 else seen.convert("L")
        found.append(extract_features(model, ImageList([seen]), processor, size=(height, width), with_patches=True))
    return found
