"""Image files in a folder and its sub-folders."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from dinov3_hf.data.sources.base import ARRAY_SUFFIXES, IMAGE_SUFFIXES, NAMES_MUST_END, ImageSource, digest
from dinov3_hf.data.sources.files import files_below


class FolderImages(ImageSource):
    """All image files below `root`, or all arrays (.npy) where there are none, in the order of their names.

    Hidden files are left out.

    With `labelled`, the class of an image is the sub-folder of `root` that it lies in, at whatever depth.
    """

    def __init__(self, root: Path, labelled: bool, num_channels: int):
        self.root = root
        self.num_channels = num_channels
        names = files_below(root, IMAGE_SUFFIXES) or files_below(root, ARRAY_SUFFIXES)
        if not names and not any(root.iterdir()):
            raise FileNotFoundError(f"folder {root} is empty; put images into it or name another folder.")
        if not names:
            raise FileNotFoundError(f"folder {root} holds no images; {NAMES_MUST_END}")
        # One array of bytes: millions of Python strings would be copied into each worker, page by page.
        self.names = np.array([os.fsencode(name) for name in names])
        if labelled:
            self.labels, self.class_names = _folder_labels(root, names)

    def __len__(self) -> int:
        return len(self.names)

    def content(self, i: int) -> Path:
        return self.root / os.fsdecode(self.names[i])

    def name(self, i: int) -> str:
        return str(self.content(i))

    def fingerprint(self) -> dict[str, Any]:
        return {"images": len(self), "names": digest([self.names.tobytes()])}


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
