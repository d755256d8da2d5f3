"""Tensors that are read when they are written, so that a model larger than the memory can be converted."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LazyTensor:
    """
    A tensor whose values are not in memory yet.

    Args:
        shape: of what `read` returns.
        dtype: of what `read` returns.
        read: Returns the tensor, on the CPU; each call may read it anew.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> "LazyTensor":
        """A tensor that is there: in memory, or mapped from a file."""
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor)

    @classmethod
    def full(cls, shape: Sequence[int], value: float, dtype: torch.dtype) -> "LazyTensor":
        return cls(tuple(shape), dtype, lambda: torch.full(tuple(shape), value, dtype=dtype))

    @property
    def numel(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes that the values take."""
        return self.numel * self.dtype.itemsize

    def view(self, *shape: int) -> "LazyTensor":
        """The same values in another shape."""
        if math.prod(shape) != math.prod(self.shape):
            raise ValueError(f"{self.shape} has no view of shape {shape}; check the checkpoint's architecture.")
        return LazyTensor(shape, self.dtype, lambda: self.read().reshape(shape))

    def chunk(self, count: int) -> list["LazyTensor"]:
        """Equal parts along the first axis."""
        if not self.shape or self.shape[0] % count != 0:
            raise ValueError(f"{self.shape} cannot be cut into {count} parts; check the checkpoint's architecture.")
        rows = self.shape[0] // count

        def part(index: int) -> LazyTensor:
            return LazyTensor(
                (rows, *self.shape[1:]), self.dtype, lambda: self.read()[index * rows : (index + 1) * rows]
            )

        return [part(index) for index in range(count)]


def concatenate(parts: Sequence[LazyTensor]) -> LazyTensor:
    """
    The parts one after the other along the first axis.

    Raises:
        ValueError: They are not of one dtype.
    """
    dtypes = dict.fromkeys(str(part.dtype).removeprefix("torch.") for part in parts)
    if len(dtypes) > 1:
        raise ValueError(f"tensors of {' and '.join(dtypes)} are to be one tensor; save the model in one dtype.")
    rows = sum(part.shape[0] for part in parts)
    return LazyTensor((rows, *parts[0].shape[1:]), parts[0].dtype, lambda: torch.cat([part.read() for part in parts]))


def read_all(tensors: Mapping[str, LazyTensor]) -> dict[str, Tensor]:
    """Every tensor in memory."""
    return {name: tensor.read() for name, tensor in tensors.items()}


def main_dtype(tensors: Mapping[str, LazyTensor]) -> torch.dtype:
    """The dtype of most values."""
    counts = Counter[torch.dtype]()
    for tensor in tensors.values():
        counts[tensor.dtype] += tensor.numel
    return counts.most_common(1)[0][0]


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors are of one shape and dtype and have the same bits: NaN equals NaN, -0 does not equal 0."""
    return (
        first.shape == second.shape
        and first.dtype == second.dtype
        and torch.equal(first.reshape(-1).view(torch.uint8), second.reshape(-1).view(torch.uint8))
    )


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, row by row; without a copy where its values already lie so."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
