"""Reading the images of the `visualize` commands and computing their patch features."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from transformers import BaseImageProcessor, PreTrainedModel

from dinov3_hf.data.datasets import load_images
from dinov3_hf.evals.features import ImageList, check_divisible, extract_features, input_size, patch_size, to_picture

# Input size of a picture in units of the image processor's, when none is given: more patches show more, and features
# keep their meaning at sizes not too far from those of the training.
DEFAULT_ENLARGEMENT = 3


def read_pictures(source: str, limit: int) -> list[Image.Image]:
    """The RGB image in the file `source`, or up to `limit` images spread over a folder or over the bundled digits.

    Raises:
        FileNotFoundError: if there is no such file or folder, or no image in it.
        ValueError: if the file is no image.
    """
    path = Path(source).expanduser()
    if path.is_file():
        try:
            with Image.open(path) as image:
                return [ImageOps.exif_transpose(image).convert("RGB")]
        except OSError as error:
            raise ValueError(f"{path} cannot be read as an image; give a JPEG or PNG file, for example.") from error
    if source != "digits" and not path.is_dir():
        raise FileNotFoundError(f"there is no image file or folder {source}.")
    images = load_images(source, "test" if source == "digits" else None)
    if images.labels is None:
        rows = np.linspace(0, len(images) - 1, min(limit, len(images))).round().astype(int)
    else:  # one image of each class, then a second of each, and so on
        rank = np.array([(images.labels[:i] == label).sum() for i, label in enumerate(images.labels)])
        rows = np.lexsort((images.labels, rank))[:limit]
    return [to_picture(images.image(int(row))) for row in rows]


def patch_features(
    model: PreTrainedModel, processor: BaseImageProcessor, pictures: Sequence[Image.Image], size: int | None
) -> tuple[list[Image.Image], list[np.ndarray]]:
    """Patch features of pictures in their own proportions.

    Args:
        model: a model with patches.
        processor: its image processor; its size is replaced.
        pictures: RGB, any sizes.
        size: short side of the model's input in pixels; the long side becomes the nearest multiple of the patch size.

    Returns:
        The pictures as the model saw them, and of each float32 features (h, w, D).

    Raises:
        ValueError: if `size` is no multiple of the patch size, or the model has no patches.
    """
    side = patch_size(model)
    if side is None:
        raise ValueError(f"a model of type {model.config.model_type} has no patches of one size to show.")
    short = size or DEFAULT_ENLARGEMENT * input_size(processor)
    check_divisible(short, side)
    resized, patches = [], []
    for picture in pictures:
        width, height = (round(length * short / min(picture.size) / side) * side for length in picture.size)
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
        seen = picture.convert("L") if model.config.num_channels == 1 else picture
        features = extract_features(model, ImageList([seen]), processor, size=(height, width), with_patches=True)
        resized.append(picture)
        patches.append(features.patch_maps()[0].numpy())  # (h, w, D)
    return resized, patches
