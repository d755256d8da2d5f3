"""Training state on disk, in pieces: files that any number of ranks writes side by side and any other number reads.

    state/rank-00002-of-00008.safetensors

A tensor is flattened row by row; a piece is a range of it. Every way of sharding that the engines know cuts tensors
into such ranges: by rows (FSDP2), or anywhere (ZeRO). Key of a piece in its file: `NAME@START`. The metadata of a file
has the shapes of the whole tensors.
"""

import copy
import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

_SHAPES = "shapes"


class Piece(NamedTuple):
    """A range of a flattened tensor."""

    name: str
    shape: tuple[int, ...]  # of the whole tensor
    start: int
    values: Tensor  # (n,)

    def of_network(self, network: str) -> "Piece":
        """The same piece where several networks with equal names inside are saved together; see `StateReader.of`."""
        return self._replace(name=_name_in(network, self.name))


def _name_in(network: str, name: str) -> str:
    kind, has_parameter, parameter = name.partition("/")  # param/student.backbone..., or num_steps
    return f"{kind}/{network}.{parameter}" if has_parameter else f"{kind}/{network}"


def state_file(folder: Path, rank: int, world_size: int) -> Path:
    """Where a rank writes its pieces."""
    return folder / f"rank-{rank:05}-of-{world_size:05}.safetensors"


def on_host(pieces: Iterable[Piece]) -> list[Piece]:
    """Copies in the memory of the host, which stay as they are while training goes on."""
    return [piece._replace(values=piece.values.detach().to("cpu", copy=True)) for piece in pieces]


def write_pieces(path: Path, pieces: Iterable[Piece]) -> None:
    """
    Write pieces to a safetensors file.

    Args:
        path: see `state_file`; its folder is created when absent.
        pieces: on the host, see `on_host`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    pieces = list(pieces)
    shapes = {piece.name: piece.shape for piece in pieces}
    tensors = {f"{piece.name}@{piece.start}": piece.values for piece in pieces}
    save_file(tensors, path, metadata={"format": "pt", _SHAPES: json.dumps(shapes)})


class _Stored(NamedTuple):
    start: int
    stop: int
    path: Path
    key: str


class StateReader:
    """
    The tensors of a folder of pieces; reading takes what is asked for from the disk and no more.

    Args:
        folder: that all ranks of a run have written their file to.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._stored: dict[str, list[_Stored]] = {}
        paths = sorted(folder.glob("rank-*-of-*.safetensors"))
        if not paths:
            raise FileNotFoundError(
                f"{folder} holds no training state (rank-*.safetensors), as those of earlier versions do not; name "
                "another one, or begin a stage with its teacher: --start_from and --start_with teacher."
            )
        for path in paths:
            self._index(path)
        for stored in self._stored.values():
            stored.sort()

    def _index(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                for name, shape in json.loads(file.metadata()[_SHAPES]).items():
                    self._shapes[name] = tuple(shape)
                for key in file.keys():  # noqa: SIM118  (no mapping)
                    name, _, start = key.rpartition("@")
                    (count,) = file.get_slice(key).get_shape()
                    self._stored.setdefault(name, []).append(_Stored(int(start), int(start) + count, path, key))
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no file of a training state ({error}); name another checkpoint.") from error

    def of(self, network: str) -> "StateReader":
        """What `Piece.of_network` has saved, under the names that it has by itself."""
        part, prefix = copy.copy(self), f"{network}."

        def own(name: str) -> str | None:
            kind, _, rest = name.partition("/")
            if rest == network:
                return kind
            return f"{kind}/{rest.removeprefix(prefix)}" if rest.startswith(prefix) else None

        part._shapes = {mine: shape for name, shape in self._shapes.items() if (mine := own(name)) is not None}
        part._stored = {mine: stored for name, stored in self._stored.items() if (mine := own(name)) is not None}
        return part

    def names(self) -> list[str]:
        """Of all tensors."""
        return list(self._shapes)

    def has(self, name: str) -> bool:
        """Whether there is a tensor of this name."""
        return name in self._shapes

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a whole tensor."""
        return self._shapes[name]

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """
        Values `start` to `stop` of a flattened tensor, (stop - start,) on the host.

        Raises:
            ValueError: they are not all there.
        """
        parts = []
        position = start
        for piece in self._stored.get(name, []):
            if piece.start <= position < piece.stop and position < stop:
                until = min(stop, piece.stop)
                parts.append(_slice(piece, position, until))
                position = until
        if position < stop:
            raise ValueError(f"{self.folder} has not all of {name}; name another checkpoint.")
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def tensor(self, name: str) -> Tensor:
        """A whole tensor, on the host."""
        shape = self._shapes[name]
        return self.read(name, 0, torch.Size(shape).numel()).view(shape)


def _slice(piece: _Stored, start: int, stop: int) -> Tensor:
    with safe_open(piece.path, framework="pt") as file:
        values: Tensor = file.get_slice(piece.key)[start - piece.start : stop - piece.start]
    return values
