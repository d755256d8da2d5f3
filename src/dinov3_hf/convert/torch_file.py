"""Files of `torch.save`: read without running code or taking memory, written one tensor at a time.

A file is a zip archive, uncompressed: `data.pkl` with everything but the numbers, and one `data/N` for each storage.
"""

import io
import mmap
import pickle
import re
import struct
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dinov3_hf.convert.lazy_tensor import LazyTensor, raw_bytes

# The name of a dtype in the pickle; readers of every version know these.
_STORAGES: dict[torch.dtype, Any] = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.int64: torch.LongStorage,
    torch.int32: torch.IntStorage,
    torch.uint8: torch.ByteStorage,
    torch.bool: torch.BoolStorage,
}
_ALIGNMENT = 64  # bytes, of a storage in the file; as torch.save does, for readers that map it
_CHUNK = 1 << 22  # bytes
_HEADER_SIZE = 30  # bytes before the name of a record in a zip archive
_LENGTHS_IN_HEADER = 26  # where the header says how long the name and what follows it are


def read_torch_file(path: Path) -> dict[str, LazyTensor | None]:
    """
    The tensors that `torch.save` wrote. Code in the file is refused, never run.

    Returns:
        Entries of the nested dictionaries in the file under dotted names; `None` for what is no plain tensor.

    Raises:
        ValueError: The file is damaged, holds code, or was not written by `torch.save`.
    """
    try:
        # Before zip archives torch wrote formats that cannot be mapped; these are read whole.
        content = _read_archive(path) if zipfile.is_zipfile(path) else _by_name(_load(path), LazyTensor.of)
    except pickle.UnpicklingError as error:
        forbidden = re.search(r"GLOBAL (\w+(?:\.\w+)*)(?![\w.])", str(error))
        if forbidden is None:
            raise ValueError(f"{path} is damaged, or is no file of torch.save; copy it again.") from error
        raise ValueError(
            f"{path} holds more than tensors ({forbidden[1]}), and opening it could run code; nothing of it was run. "
            "If you trust it, save its tensors alone with torch and convert that file."
        ) from error
    except Exception as error:  # what torch and pickle raise for damaged files is of many types
        if isinstance(error, OSError) and error.filename is not None:  # not for what stands in it
            raise
        reason = (" ".join(str(error).split()) or type(error).__name__)[:160]
        raise ValueError(f"{path} is damaged, or is no file of torch.save ({reason}); copy it again.") from error
    if "" in content:
        raise ValueError(f"{path} holds one object and no tensors by name; save a state dict.")
    return content


def _load(path: Path) -> object:
    with warnings.catch_warnings(action="ignore"):  # about pickles that then turn out to be damaged
        return torch.load(path, map_location="cpu", weights_only=True)


def _read_archive(path: Path) -> dict[str, LazyTensor | None]:
    records = _checked_records(path)
    # Fake tensors have a place in the file and no values. Letting torch map the file fails where it is larger than the
    # memory, because torch maps it for writing.
    with FakeTensorMode():
        content = _load(path)
    with path.open("rb") as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        memory = torch.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=torch.uint8)

    def mapped(tensor: Tensor) -> LazyTensor:
        storage: Any = tensor.untyped_storage()
        start, size = storage._checkpoint_offset, storage.nbytes()
        if records.get(start) != size:
            raise _DisplacedError
        shape, dtype, strides, first = tuple(tensor.shape), tensor.dtype, tensor.stride(), tensor.storage_offset()
        last = first + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
        if 0 not in shape and not 0 <= first <= last < size // dtype.itemsize:
            raise ValueError("a tensor lies outside of its record")
        values = memory[start : start + size]

        def read() -> Tensor:
            typed = values.view(dtype)
            return typed.as_strided(shape, strides, typed.storage_offset() + first)

        return LazyTensor(shape, dtype, read)

    try:
        return _by_name(content, mapped)
    except _DisplacedError:
        # Their places are computed, for archives that torch itself has laid out. Others are read whole.
        return _by_name(_load(path), LazyTensor.of)


def _checked_records(path: Path) -> dict[int, int]:
    """Where the bytes of each record begin -> how many they are. Their checksums are compared: nobody else does."""
    records = {}
    with zipfile.ZipFile(path) as archive, path.open("rb") as raw:
        for record in archive.infolist():
            if record.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{record.filename} is compressed")
            with archive.open(record) as file:
                while file.read(_CHUNK):
                    pass  # raises BadZipFile at the end of a record that is not what was written
            raw.seek(record.header_offset + _LENGTHS_IN_HEADER)
            name_length, extra_length = struct.unpack("<HH", raw.read(4))
            records[record.header_offset + _HEADER_SIZE + name_length + extra_length] = record.file_size
    return records


def _by_name(content: object, lazy: Callable[[Tensor], LazyTensor]) -> dict[str, LazyTensor | None]:
    entries: dict[str, LazyTensor | None] = {}
    for name, entry in _flatten(content, lazy):
        if name in entries:
            raise ValueError(f"two entries have the name {name}")
        entries[name] = entry
    return entries


def _flatten(
    content: object, lazy: Callable[[Tensor], LazyTensor], prefix: str = ""
) -> Iterator[tuple[str, LazyTensor | None]]:
    if isinstance(content, Mapping):
        for key, value in content.items():
            yield from _flatten(value, lazy, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(content, Tensor) and _is_plain(content):
        yield prefix, lazy(content.detach())
    else:
        yield prefix, None


def _is_plain(tensor: Tensor) -> bool:
    # One on the meta device has no values.
    return tensor.layout == torch.strided and tensor.dtype in _STORAGES and tensor.device.type == "cpu"


class _DisplacedError(Exception):
    """A tensor is not at the place where torch expects it."""


@dataclass(frozen=True)
class _Storage:
    """Stands in the pickle for the numbers of one tensor."""

    key: str
    tensor: LazyTensor


class _Pickler(pickle.Pickler):
    """Pickles lazy tensors as torch pickles tensors; collects them in the order of their storages."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, protocol=2)
        self.tensors: list[LazyTensor] = []

    def reducer_override(self, value: object) -> Any:
        if not isinstance(value, LazyTensor):
            return NotImplemented
        strides = [1]
        for length in reversed(value.shape[1:]):
            strides.insert(0, strides[0] * max(length, 1))
        storage = _Storage(str(len(self.tensors)), value)
        self.tensors.append(value)
        no_hooks: OrderedDict[str, object] = OrderedDict()
        arguments = (storage, 0, value.shape, tuple(strides[: len(value.shape)]), False, no_hooks)
        return torch._utils._rebuild_tensor_v2, arguments

    def persistent_id(self, value: object) -> Any:
        if not isinstance(value, _Storage):
            return None
        return ("storage", _STORAGES[value.tensor.dtype], value.key, "cpu", value.tensor.numel)


def write_torch_file(content: Mapping[str, Any], path: Path) -> None:
    """
    Write what `torch.load(path, weights_only=True)` reads, mapped or not, holding one tensor in memory at a time.

    Args:
        content: Lazy tensors by name, or such dictionaries by name.
        path: New file.

    Raises:
        ValueError: A tensor's dtype has no storage in such files.
    """
    pickled = io.BytesIO()
    pickler = _Pickler(pickled)
    try:
        pickler.dump(content)
    except KeyError as error:
        raise ValueError(f"a tensor of dtype {error.args[0]} cannot be written to {path.name}.") from error
    with zipfile.ZipFile(path, "x", allowZip64=True) as archive:
        folder = path.stem
        archive.writestr(zipfile.ZipInfo(f"{folder}/data.pkl"), pickled.getvalue())
        archive.writestr(zipfile.ZipInfo(f"{folder}/byteorder"), b"little")
        for key, tensor in enumerate(pickler.tensors):
            record = zipfile.ZipInfo(f"{folder}/data/{key}")
            record.file_size = tensor.num_bytes
            zip64 = tensor.num_bytes > zipfile.ZIP64_LIMIT
            start = archive.fp.tell() + _HEADER_SIZE + len(record.filename) + (20 if zip64 else 0)  # type: ignore[union-attr]
            padding = -(start + 4) % _ALIGNMENT
            record.extra = b"FB" + padding.to_bytes(2, "little") + bytes(padding)
            with archive.open(record, "w", force_zip64=zip64) as file:
                file.write(raw_bytes(tensor.read()))
        archive.writestr(zipfile.ZipInfo(f"{folder}/version"), b"3\n")
