"""Data sets of a few small images in every kind of file."""

import io
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ["cat", "dog", "owl"]


def encoded(number: int, format: str = "PNG", size: tuple[int, int] = (24, 20)) -> bytes:
    """An image whose grey value is `number`, up to 255."""
    buffer = io.BytesIO()
    Image.new("RGB", size, (number, number, number)).save(buffer, format)
    return buffer.getvalue()


def number_of(image: np.ndarray) -> int:
    """The number that `encoded` put into an image."""
    return int(image[0, 0, 0])


def write_parquet(
    path: Path, numbers: Iterable[int], column: str = "image", labels: Sequence[int] | None = None, **options
) -> Path:
    import datasets

    numbers = list(numbers)
    path.parent.mkdir(parents=True, exist_ok=True)
    classes = [number % len(CLASSES) for number in numbers] if labels is None else list(labels)
    features = {
        "id": datasets.Value("int64"),
        column: datasets.Image(),
        "label": datasets.ClassLabel(names=CLASSES),
    }
    rows = {
        "id": numbers,
        column: [{"bytes": encoded(number), "path": None} for number in numbers],
        "label": classes,
    }
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(path, **options)
    return path


def write_tar(path: Path, numbers: Iterable[int], labelled: bool = True, prefix: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number in numbers:
            members = {"png": encoded(number), "json": b"{}"}
            if labelled:
                members["cls"] = str(number % len(CLASSES)).encode()
            for suffix, content in members.items():
                info = tarfile.TarInfo(f"{prefix}{number:04}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def write_folder(folder: Path, numbers: Iterable[int]) -> Path:
    for number in numbers:
        path = folder / CLASSES[number % len(CLASSES)] / f"{number:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(number))
    return folder
