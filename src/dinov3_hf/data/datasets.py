"""Sources of images, and the data set of multi-crop samples on top of them."""

import os
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from PIL import Image, ImageOps
from torch.utils.data import Dataset

from dinov3_hf.data.masking import MaskSampler
from dinov3_hf.data.multicrop import MultiCropViews
from dinov3_hf.data.seeding import Stream, random_generator
from dinov3_hf.errors import did_you_mean

Split = Literal["train", "test"]

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
# Sub-folders that are a split of a folder of images; the first that exists is taken.
SPLIT_FOLDERS: dict[Split, tuple[str, ...]] = {"train": ("train",), "test": ("test", "val", "validation")}


class ImageSource(Protocol):
    """Images by row number, some with a class label each."""

    labels: np.ndarray | None  # int64 (len,)
    class_names: list[str] | None

    def __len__(self) -> int: ...

    def image(self, i: int) -> Image.Image | np.ndarray:
        """Return image `i`: PIL in mode RGB or L, or uint8 (H, W, C)."""


class DigitImages:
    """Handwritten digits that come with scikit-learn: 1797 images of 8 x 8 pixels in 10 classes, labels included.

    Source: https://archive.ics.uci.edu/dataset/80. Every fifth image of a class belongs to the split "test" (355
    images), the others to "train" (1442).
    """

    def __init__(self, split: Split | None, num_channels: int):
        try:
            from sklearn.datasets import load_digits  # takes a second to import
        except ImportError as error:
            raise ImportError(
                "digits are part of scikit-learn, which is not installed; run pip install 'dinov3-hf[train]'."
            ) from error

        digits = load_digits()
        rank_in_class = np.zeros(len(digits.target), dtype=np.int64)
        for label in range(10):
            members = digits.target == label
            rank_in_class[members] = np.arange(members.sum())
        is_test = rank_in_class % 5 == 4
        rows = {"train": ~is_test, "test": is_test, None: np.ones_like(is_test)}[split]
        grey = np.round(digits.images[rows] * (255 / 16)).astype(np.uint8)  # values 0 to 16
        self.pixels = np.repeat(grey[..., None], num_channels, axis=-1)  # (len, 8, 8, C)
        self.labels: np.ndarray | None = digits.target[rows].astype(np.int64)
        self.class_names: list[str] | None = [str(label) for label in range(10)]

    def __len__(self) -> int:
        return len(self.pixels)

    def image(self, i: int) -> np.ndarray:
        pixels: np.ndarray = self.pixels[i]
        return pixels


class FolderImages:
    """Image files in a folder and its sub-folders, in the order of their names; hidden files are left out.

    With `labelled`, the class of an image is the sub-folder of `root` that it lies in, at whatever depth.
    """

    def __init__(self, root: Path, labelled: bool, num_channels: int):
        self.root = root
        self.mode = {1: "L", 3: "RGB"}[num_channels]
        names = _image_names(root)
        if not names and not any(root.iterdir()):
            raise FileNotFoundError(f"folder {root} is empty; put images into it or name another folder.")
        if not names:
            raise FileNotFoundError(
                f"folder {root} holds no images; their names must end in {' '.join(IMAGE_SUFFIXES)}."
            )
        # One array of bytes: millions of Python strings would be copied into each worker, page by page.
        self.names = np.array([os.fsencode(name) for name in names])
        self.labels: np.ndarray | None = None
        self.class_names: list[str] | None = None
        if labelled:
            self.labels, self.class_names = _folder_labels(root, names)

    def __len__(self) -> int:
        return len(self.names)

    def path(self, i: int) -> Path:
        return self.root / os.fsdecode(self.names[i])

    def image(self, i: int) -> Image.Image:
        path = self.path(i)
        try:
            with Image.open(path) as image:
                image.load()
                ImageOps.exif_transpose(image, in_place=True)
                return image if image.mode == self.mode else image.convert(self.mode)  # convert() would copy
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # SyntaxError: a broken PNG
            raise ValueError(f"cannot read image {path} ({error}); repair or remove it.") from error


def _image_names(root: Path) -> list[str]:
    """Return the paths of all image files below `root`, relative to it, sorted. Linked folders count once."""
    names: list[str] = []
    visited = set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        target = Path(folder).resolve()
        if target in visited:
            subfolders.clear()  # a link to a folder above would never end
            continue
        visited.add(target)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        prefix = "" if Path(folder) == root else f"{Path(folder).relative_to(root)}{os.sep}"
        names += [
            f"{prefix}{name}" for name in files if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")
        ]
    return sorted(names)


def _folder_labels(root: Path, names: list[str]) -> tuple[np.ndarray, list[str]]:
    classes = []
    for name in names:
        folder, separator, _ = name.partition(os.sep)
        if not separator:
            raise ValueError(
                f"image {root / name} lies in no class sub-folder; labels need one folder a class: "
                f"{root / 'CLASS' / 'IMAGE'}."
            )
        classes.append(folder)
    class_names, labels = np.unique(classes, return_inverse=True)
    return labels.astype(np.int64), class_names.tolist()


def load_images(
    source: str | os.PathLike[str], split: Split | None = None, labelled: bool = False, num_channels: int = 3
) -> ImageSource:
    """Open a set of images.

    Args:
        source: "digits" (see `DigitImages`) or a folder of images in any layout (see `FolderImages`).
        split: "train" or "test"; None takes everything. In a folder a split is the sub-folder of that name ("val" and
            "validation" also serve as "test"); a folder without a sub-folder "train" is all "train".
        labelled: whether `labels` and `class_names` are needed; a folder then has one sub-folder for each class.
        num_channels: 3 for RGB, 1 for grey.

    Raises:
        FileNotFoundError: no such data set, folder or split, or no images in it.
        ValueError: unknown split, no class sub-folders, `num_channels` other than 1 and 3.
    """
    if num_channels not in (1, 3):
        raise ValueError(f"images can be read with 1 or 3 channels, not {num_channels}.")
    if split not in (None, *SPLIT_FOLDERS):
        raise ValueError(f"unknown split {split!r}; use {' or '.join(SPLIT_FOLDERS)}.")
    if source == "digits":
        return DigitImages(split, num_channels)
    root = Path(source).expanduser()
    if root.is_dir():
        return FolderImages(_split_folder(root, split), labelled, num_channels)
    if root.exists():
        raise ValueError(f"{root} is a file; name the folder that holds the images.")
    if len(root.parts) > 1:
        raise FileNotFoundError(f"there is no folder {root}; name one that holds images, or use digits.")
    known = ["digits", *(path.name for path in Path().iterdir() if path.is_dir())]
    remedy = did_you_mean(source, known, otherwise="use digits or the path of a folder of images.")
    raise FileNotFoundError(f"{source} is neither a folder nor a known data set; {remedy}")


def _split_folder(root: Path, split: Split | None) -> Path:
    if split is None:
        return root
    for name in SPLIT_FOLDERS[split]:
        if (root / name).is_dir():
            return root / name
    if split == "train":
        return root
    expected = " or ".join(SPLIT_FOLDERS[split])
    raise FileNotFoundError(f"folder {root} has no {split} images; put them into a sub-folder {expected}.")


class SSLDataset(Dataset[dict[str, Any]]):
    """Multi-crop views and masks of one image each, for keys `(position, index)` as `StreamSampler` yields them.

    Args:
        images: the pictures.
        views: cuts the crops and draws their photometric parameters.
        masks: gives the masks of both global crops.
        seed: of the run.
    """

    def __init__(self, images: ImageSource, views: MultiCropViews, masks: MaskSampler, seed: int):
        self.images = images
        self.views = views
        self.masks = masks
        self.seed = seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        """Return what `MultiCropViews` returns and `mask`: bool (2, P)."""
        position, index = key
        epoch = position // len(self.images)
        rng = random_generator(self.seed, Stream.VIEWS, epoch, index)
        return self.views(self.images.image(index), rng) | {"mask": self.masks(position)}
