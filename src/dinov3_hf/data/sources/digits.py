"""Handwritten digits that come with scikit-learn: real images without a download."""

from typing import Any

import numpy as np

from dinov3_hf.data.sources.base import ImageSource, Split


class DigitImages(ImageSource):
    """1797 images of 8 x 8 pixels in 10 classes, labels included.

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
        self.num_channels = num_channels
        self.pixels = np.repeat(grey[..., None], num_channels, axis=-1)  # (len, 8, 8, C)
        self.labels = digits.target[rows].astype(np.int64)
        self.class_names = [str(label) for label in range(10)]

    def __len__(self) -> int:
        return len(self.pixels)

    def content(self, i: int) -> np.ndarray:
        pixels: np.ndarray = self.pixels[i]
        return pixels

    def name(self, i: int) -> str:
        return f"digits row {i}"

    def fingerprint(self) -> dict[str, Any]:
        return {"images": len(self), "names": "digits"}
