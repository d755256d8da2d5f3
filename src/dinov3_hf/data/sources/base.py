"""What every source of images offers: encoded images, names and labels by row number."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, Protocol

import numpy as np
from PIL import Image

from dinov3_hf.data.decoding import MODES, Content, UnreadableImage, UnsuitableImage, open_image

Split = Literal["train", "test"]

# What the splits are called in the names of folders and files and on the Hub; the first that exists is taken.
SPLIT_NAMES: dict[Split, tuple[str, ...]] = {"train": ("train",), "test": ("test", "val", "validation")}
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
ARRAY_SUFFIXES = (".npy",)  # images where there are no others; beside images they are more often something else
NAMES_MUST_END = f"their names must end in {' '.join(IMAGE_SUFFIXES)} or {' '.join(ARRAY_SUFFIXES)}."
NUM_TRIED = 8  # images of a source that are looked at before a run begins


class NoSuchSplit(FileNotFoundError):
    """The data exist but have no images of the split that was asked for."""


class Images(Protocol):
    """The least that can be trained on: images by row number, each PIL or uint8 (H, W[, C])."""

    def __len__(self) -> int: ...

    def image(self, i: int) -> Image.Image | np.ndarray: ...


class ImageSource(ABC):
    """Images by row number, decoded when they are asked for, some with a class label each.

    Attributes:
        labels: class of each image, int64 (len,); None where there are no labels or none were asked for.
        class_names: what the labels stand for; None without labels.
        num_channels: 3 for RGB, 1 for grey, or as many as the images have.
    """

    labels: np.ndarray | None = None
    class_names: list[str] | None = None
    num_channels: int = 3

    @abstractmethod
    def __len__(self) -> int: ...

    @property
    def num_images(self) -> int | None:
        """How many images there are; None if that cannot be known."""
        return len(self)

    @abstractmethod
    def content(self, i: int) -> Content:
        """Return image `i` as it is stored: encoded bytes, the path of a file, or pixels uint8 (H, W, C)."""

    @abstractmethod
    def name(self, i: int) -> str:
        """Return what image `i` is called in messages and reports."""

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """Return the number of images and a digest of their names: the same after a move, another for other images."""

    def image(self, i: int) -> np.ndarray:
        """Return the pixels of image `i`: uint8 (H, W, num_channels).

        Raises:
            ValueError: it cannot be read; the message names it.
        """
        try:
            return open_image(self.content(i), self.num_channels).decode(1)
        except UnreadableImage as error:
            raise ValueError(f"cannot read image {self.name(i)} ({error}); repair or remove it.") from error

    def check_channels(self) -> None:
        """Look at the first images until one can be read with `num_channels`.

        Raises:
            ValueError: none of them can, and not because they are broken.
        """
        unsuitable: str | None = None
        for i in range(min(NUM_TRIED, len(self))):
            try:
                open_image(self.content(i), self.num_channels)
            except UnsuitableImage as error:
                unsuitable = (
                    unsuitable or f"{self.name(i)} cannot be read with num_channels {self.num_channels} ({error})"
                )
            except UnreadableImage:
                continue  # reported when its turn comes
            else:
                return
        if unsuitable is not None:
            raise ValueError(f"{unsuitable}, nor can other images beside it; set num_channels to what they have.")


class GivenImages(ImageSource):
    """Images that a program brings along: any object with `len()` and `image(i)`."""

    def __init__(self, images: Images, num_channels: int):
        self.images = images
        self.num_channels = num_channels

    def __len__(self) -> int:
        return len(self.images)

    def content(self, i: int) -> np.ndarray:
        image = self.images.image(i)
        if isinstance(image, Image.Image) and self.num_channels in MODES:
            image = image.convert(MODES[self.num_channels])
        pixels = np.asarray(image)
        return pixels[..., None] if pixels.ndim == 2 else pixels

    def name(self, i: int) -> str:
        return f"image {i}"

    def fingerprint(self) -> dict[str, Any]:
        return {"images": len(self)}


def as_source(images: Images, num_channels: int) -> ImageSource:
    """Return `images` as an `ImageSource`, which most are already.

    Raises:
        ValueError: they are read with, or have, another number of channels.
    """
    if not isinstance(images, ImageSource):
        given = GivenImages(images, num_channels)
        given.check_channels()  # as load_images has done with the others
        return given
    if images.num_channels != num_channels:
        raise ValueError(
            f"the images are read with {images.num_channels} channels, and the model takes {num_channels}; open them "
            f"with load_images(..., num_channels={num_channels})."
        )
    return images


def part_and_row(ends: np.ndarray, i: int) -> tuple[int, int]:
    """Where row `i` of several parts in a row is: the number of its part, and its row there.

    Args:
        ends: rows up to and with each part, int64 (parts,), ascending.
    """
    part = int(np.searchsorted(ends, i, side="right"))
    return part, i - (int(ends[part - 1]) if part else 0)


def digest(parts: Iterable[bytes]) -> str:
    """A short name for a sequence of names: 16 hexadecimal digits."""
    hasher = hashlib.sha256()
    for part in parts:
        hasher.update(len(part).to_bytes(8, "little") + part)
    return hasher.hexdigest()[:16]


@contextmanager
def one_line(problem: str, remedy: str) -> Iterator[None]:
    """Turn what libraries raise over a broken file, of many types and lengths, into a ValueError of one line."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{problem} ({first_line(error.__cause__ or error)}); {remedy}.") from error


def first_line(error: BaseException | None) -> str:
    """The first line of an exception's message, without its full stop."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")
