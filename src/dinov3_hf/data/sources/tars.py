"""Images in tar files as WebDataset writes them: `KEY.jpg` beside `KEY.cls`. Nothing is unpacked.

The headers of a tar file are read once; then every image is read by its place. What the headers say is kept in
`$HF_HOME/dinov3_hf/tars`, so that the next run and the other processes need not read them again.
"""

import hashlib
import os
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dinov3_hf.data.sources.base import (
    ARRAY_SUFFIXES,
    IMAGE_SUFFIXES,
    NAMES_MUST_END,
    ImageSource,
    digest,
    one_line,
    part_and_row,
)

NO_LABEL = -1
LABEL_SUFFIX = ".cls"


@dataclass(frozen=True)
class TarIndex:
    """The images of one tar file, or its arrays (.npy) if it has no images, N in their order, 32 bytes each.

    Attributes:
        headers: where their headers begin, int64 (N,).
        starts: where their contents begin, int64 (N,).
        sizes: of their contents in bytes, int64 (N,).
        labels: their classes, int64 (N,); `NO_LABEL` where there is no `.cls` member of the same key.
        names: digest of their names.
    """

    headers: np.ndarray
    starts: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray
    names: str


class TarImages(ImageSource):
    """The images of tar files, in the order of the files and of their members.

    With `labelled`, the classes are the whole numbers in the `.cls` members.
    """

    def __init__(self, files: Sequence[Path], data: str, labelled: bool, num_channels: int):
        self.files = list(files)
        self.num_channels = num_channels
        indices = [tar_index(path) for path in self.files]
        self.ends = np.cumsum([len(index.starts) for index in indices])
        if self.ends[-1] == 0:
            raise FileNotFoundError(f"{data} holds no images; {NAMES_MUST_END}")
        self.headers = np.concatenate([index.headers for index in indices])
        self.starts = np.concatenate([index.starts for index in indices])
        self.sizes = np.concatenate([index.sizes for index in indices])
        self.digest = digest(index.names.encode() for index in indices)
        if labelled:
            labels = np.concatenate([index.labels for index in indices])
            if (labels == NO_LABEL).any():
                missing = self.name(int(np.argmax(labels == NO_LABEL)))
                raise ValueError(f"{missing} has no label; labels need a {LABEL_SUFFIX} member beside each image.")
            class_numbers, self.labels = np.unique(labels, return_inverse=True)
            self.class_names = [str(number) for number in class_numbers]

    def __len__(self) -> int:
        return len(self.starts)

    def _file(self, i: int) -> Path:
        return self.files[part_and_row(self.ends, i)[0]]

    def content(self, i: int) -> bytes:
        with self._file(i).open("rb") as file:
            file.seek(int(self.starts[i]))
            return file.read(int(self.sizes[i]))

    def name(self, i: int) -> str:
        path = self._file(i)
        with path.open("rb") as file:
            file.seek(int(self.headers[i]))
            with tarfile.open(fileobj=file, mode="r:") as tar:
                member = tar.next()
        return f"{path}/{member.name if member else i}"

    def fingerprint(self) -> dict[str, Any]:
        return {"images": len(self), "names": self.digest}


def tar_index(path: Path) -> TarIndex:
    """Return where the images of a tar file are.

    Raises:
        ValueError: it is not a tar file, compressed, or cut short.
    """
    cached = _cache_file(path)
    if cached.is_file():
        with np.load(cached, allow_pickle=False) as arrays:
            return TarIndex(
                **{name: arrays[name] for name in arrays.files if name != "names"}, names=str(arrays["names"])
            )
    index = _scan(path, IMAGE_SUFFIXES)
    if not len(index.starts):
        index = _scan(path, ARRAY_SUFFIXES)
    _save(index, cached)
    return index


def _scan(path: Path, suffixes: tuple[str, ...]) -> TarIndex:
    keys: list[str] = []
    places: list[tuple[int, int, int]] = []
    label_of: dict[str, int] = {}
    names = hashlib.sha256()
    with one_line(f"{path} cannot be read as a tar file", "copy it again, uncompressed, or leave it out"):
        for member in _members(path):
            folder, slash, file = member.name.rpartition("/")
            key = folder + slash + file.partition(".")[0]  # what the members of one sample share
            if is_file_of(member, suffixes):
                keys.append(key)
                places.append((member.offset, member.offset_data, member.size))
                names.update(f"{member.name}\n{member.size}\n".encode())
            elif is_file_of(member, (LABEL_SUFFIX,)):
                label_of[key] = _label(path, member)
    headers, starts, sizes = np.array(places, dtype=np.int64).reshape(-1, 3).T
    labels = np.array([label_of.get(key, NO_LABEL) for key in keys], dtype=np.int64)
    return TarIndex(headers, starts, sizes, labels, names.hexdigest())


def is_file_of(member: tarfile.TarInfo, suffixes: tuple[str, ...]) -> bool:
    """Whether a member is a file whose name ends in one of `suffixes` and is not hidden."""
    file = member.name.rpartition("/")[2].lower()
    return member.isreg() and not file.startswith(".") and file.endswith(suffixes)


def _members(path: Path) -> Iterator[tarfile.TarInfo]:
    """Yield the headers of a tar file."""
    size = path.stat().st_size
    with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
        while (member := tar.next()) is not None:
            if member.offset_data + member.size > size:
                raise tarfile.ReadError("it is cut short")
            yield member
        file.seek(tar.offset)
        if any(file.read(tarfile.BLOCKSIZE)):  # zeros or nothing at the end; it takes a broken header for that
            raise tarfile.ReadError("bad checksum")


def _label(path: Path, member: tarfile.TarInfo) -> int:
    with path.open("rb") as file:
        file.seek(member.offset_data)
        text = file.read(member.size).strip()
    if not text.isdigit():
        raise ValueError(f"{member.name} holds {text[:20]!r} and not a whole number")
    return int(text)


def _cache_file(path: Path) -> Path:
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    facts = path.stat()
    suffixes = " ".join(IMAGE_SUFFIXES + ARRAY_SUFFIXES)  # an index of fewer is not of all images
    names = [
        os.fsencode(path.resolve()),
        *(str(fact).encode() for fact in (facts.st_size, facts.st_mtime_ns, suffixes)),
    ]
    key = digest(names)
    return Path(home).expanduser() / "dinov3_hf" / "tars" / f"{key}.npz"


def _save(index: TarIndex, cached: Path) -> None:
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=cached.parent, suffix=".npz", delete=False) as file:
            np.savez(file, **vars(index))
        Path(file.name).replace(cached)  # another process may be writing the same
    except OSError:  # no place for a cache: the next run reads the headers again
        return
