"""Files of safetensors: read lazily, written one tensor at a time, cut into shards with an index."""

import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from dinov3_hf.convert.lazy_tensor import LazyTensor, raw_bytes

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def read_safetensors(path: Path) -> dict[str, LazyTensor]:
    """
    The tensors of a file, mapped.

    Raises:
        ValueError: The file is damaged, or holds a dtype that no model of ours has.
    """
    try:
        with path.open("rb"):
            pass  # safetensors does not name a file that it cannot open
        file: Any = safe_open(path, framework="pt")
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        described = {name: (part.get_shape(), part.get_dtype()) for name, part in slices.items()}
    except (SafetensorError, UnicodeDecodeError, OverflowError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"{path} is damaged, or is no safetensors file ({reason}); copy it again.") from error
    tensors = {}
    for name, (shape, dtype) in described.items():
        if dtype not in _DTYPES:
            raise ValueError(f"{name} in {path} has the dtype {dtype}; convert it to F32 or BF16 first.")
        tensors[name] = LazyTensor(tuple(shape), _DTYPES[dtype], partial(file.get_tensor, name))
    return tensors


def write_safetensors(
    tensors: Mapping[str, LazyTensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """
    Write a file that holds one tensor in memory at a time.

    Args:
        tensors: Name -> values, read when written.
        path: New file.
        metadata: Text beside the tensors; `format` is "pt".
    """
    # Wide dtypes first, so that each tensor lies at a multiple of its item size.
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name in names:
        tensor = tensors[name]
        start, end = end, end + tensor.num_bytes
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.write(raw_bytes(tensors[name].read()))


def write_shards(tensors: Mapping[str, LazyTensor], folder: Path, max_shard_size: int) -> None:
    """
    Write `model.safetensors`, or `model-00001-of-0000N.safetensors` ... and `model.safetensors.index.json`.

    Args:
        tensors: In the order in which they are to stand in the shards.
        folder: that exists.
        max_shard_size: Bytes; a tensor that is larger has a shard of its own.
    """
    shards = list(_shards(tensors, max_shard_size))
    if len(shards) == 1:
        write_safetensors(tensors, folder / "model.safetensors")
        return
    files: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_safetensors(shard, folder / name)
        files |= dict.fromkeys(shard, name)
    index = {
        "metadata": {
            "total_parameters": sum(tensor.numel for tensor in tensors.values()),
            "total_size": sum(tensor.num_bytes for tensor in tensors.values()),
        },
        "weight_map": dict(sorted(files.items())),
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(tensors: Mapping[str, LazyTensor], max_shard_size: int) -> Iterator[dict[str, LazyTensor]]:
    shard: dict[str, LazyTensor] = {}
    size = 0
    for name, tensor in tensors.items():
        if shard and size + tensor.num_bytes > max_shard_size:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.num_bytes
    yield shard
