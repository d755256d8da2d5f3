"""The shards of a stream: files, on this machine or at a remote address, that are read from front to back."""

import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol, TypeVar

from dinov3_hf.data.sources.arrow import cell, find_image_column, import_datasets, value_type
from dinov3_hf.data.sources.base import (
    ARRAY_SUFFIXES,
    IMAGE_SUFFIXES,
    NAMES_MUST_END,
    NUM_TRIED,
    first_line,
)
from dinov3_hf.data.sources.tars import is_file_of

if TYPE_CHECKING:
    import datasets

CHECK = "check the address and the files"
ROWS_AT_ONCE = 16  # of a parquet file, for a row group may be larger than the memory
BUFFER_BYTES = 2**20
# A sample of a tar file is a few members in a row, so that these tell whether it holds images or arrays.
NUM_MEMBERS_TRIED = 100

Found = TypeVar("Found")


class Shard(Protocol):
    """A part of a stream.

    Attributes:
        name: in messages and reports.
    """

    @property
    def name(self) -> str: ...

    def read(self, start: int) -> Iterator[bytes]:
        """Yield the encoded images from row `start` on; raises whatever goes wrong."""


@dataclass(frozen=True)
class TarShard:
    """The images of a tar file.

    Attributes:
        name: its path or address.
        suffixes: of the members that are images.
    """

    name: str
    suffixes: tuple[str, ...]

    def read(self, start: int) -> Iterator[bytes]:
        with _opened(self.name) as file, _opened_tar(file, self.name) as tar:
            for member in islice(_members(tar, self.suffixes), start, None):
                content = tar.extractfile(member)
                assert content is not None  # it is a file
                yield content.read()


@dataclass(frozen=True)
class ParquetShard:
    """The rows of a parquet file; row groups before the first that is asked for are not read.

    Attributes:
        name: its path or address.
        column: of the images.
        dtype: of arrays, see `value_type`.
    """

    name: str
    column: str
    dtype: str | None

    def read(self, start: int) -> Iterator[bytes]:
        import pyarrow.parquet

        with _opened(self.name) as file:
            table = pyarrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=BUFFER_BYTES)
            if self.column not in table.schema_arrow.names:
                raise ValueError(f"it has no column {self.column}")
            for group in range(table.num_row_groups):
                num_rows = table.metadata.row_group(group).num_rows
                if start >= num_rows:
                    start -= num_rows
                    continue
                for batch in table.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=[self.column]):
                    for value in batch.column(self.column)[start:]:
                        yield _encoded(value.as_py(), self.dtype)
                    start = max(0, start - len(batch))


@dataclass(frozen=True)
class RowsShard:
    """A shard of a `datasets.IterableDataset`.

    Attributes:
        name: of the data set, and the number of the shard.
        rows: the data set.
        number: of the shard.
        column: of the images.
        dtype: of arrays, see `value_type`.
    """

    name: str
    rows: "datasets.IterableDataset"
    number: int
    column: str
    dtype: str | None

    def read(self, start: int) -> Iterator[bytes]:
        for sample in self.rows.shard(self.rows.num_shards, self.number).skip(start):
            yield _encoded(sample[self.column], self.dtype)


def tar_shards(files: Sequence[str], data: str) -> list[TarShard]:
    """Return tar files as shards.

    Args:
        files: paths or addresses.
        data: what they are called in messages.

    Raises:
        ValueError: the first of them cannot be read, or the first that can be read holds no images.
    """
    names = _first_readable(files, data, _first_names)
    for suffixes in (IMAGE_SUFFIXES, ARRAY_SUFFIXES):
        if any(name.lower().endswith(suffixes) for name in names):
            return [TarShard(file, suffixes) for file in files]
    raise ValueError(f"{data} holds no images; {NAMES_MUST_END}")


def parquet_shards(files: Sequence[str], data: str, column: str | None = None) -> list[ParquetShard]:
    """Return parquet files as shards; the images are in `column`, by default `image` or the only one of that type.

    Raises:
        ValueError: the first of them cannot be read, or there is no image column.
    """
    features = import_datasets().Features.from_arrow_schema(_first_readable(files, data, _schema))
    column = find_image_column(features, data, column)
    return [ParquetShard(file, column, value_type(features[column])) for file in files]


def row_shards(rows: "datasets.IterableDataset", data: str, column: str | None = None) -> list[RowsShard]:
    """Return the shards of a data set of the Hub; for `column` see `parquet_shards`.

    Raises:
        ValueError: it is empty, cannot be read, or has no image column.
    """
    try:
        first = next(iter(rows.take(1)), None)
    except Exception as error:
        raise ValueError(f"{data} cannot be streamed ({reason(error)}); {CHECK}.") from error
    if first is None:
        raise ValueError(f"{data} is empty; name another data set.")
    load = import_datasets()
    features = rows.features or dict.fromkeys(first)
    column = find_image_column(features, data, column)
    rows = rows.select_columns([column])
    if isinstance(features[column], load.Image):
        rows = rows.cast_column(column, load.Image(decode=False))
    dtype = value_type(features[column])
    return [RowsShard(f"{data} shard {i}", rows, i, column, dtype) for i in range(rows.num_shards)]


def reason(error: Exception) -> str:
    """In a few words, why a shard cannot be read."""
    # What failed at a remote address is the cause of an error that only repeats the address.
    cause = error.__cause__
    return first_line(cause if isinstance(cause, Exception) else error)


def _first_readable(files: Sequence[str], data: str, look: Callable[[str], Found]) -> Found:
    """What `look` sees in the first file that can be read."""
    problem: Exception | None = None
    for file in files[:NUM_TRIED]:
        try:
            return look(file)
        except Exception as error:
            problem = problem or error
    assert problem is not None  # there are files
    raise ValueError(f"{data} cannot be streamed ({reason(problem)}); {CHECK}.") from problem


def _first_names(file: str) -> list[str]:
    names: list[str] = []
    with _opened(file) as opened, _opened_tar(opened, file) as tar:
        try:
            for member in islice(_members(tar, IMAGE_SUFFIXES + ARRAY_SUFFIXES), NUM_MEMBERS_TRIED):
                names.append(member.name)
        except Exception:
            if not names:
                raise
    return names


def _schema(file: str) -> Any:
    import pyarrow.parquet

    with _opened(file) as opened:
        return pyarrow.parquet.read_schema(opened)


def _is_remote(file: str) -> bool:
    return "://" in file


def _opened(file: str) -> IO[bytes]:
    if not _is_remote(file):
        return Path(file).open("rb")
    import fsspec  # a dependency of datasets

    opened: IO[bytes] = fsspec.open(file).open()
    return opened


class _Member(tarfile.TarInfo):
    """A header that must be whole: tarfile takes one that is broken or cut short for the end of the file."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> "_Member":
        try:
            return super().fromtarfile(tarfile_)  # type: ignore[return-value]
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError(str(error)) from None


def _opened_tar(file: IO[bytes], name: str) -> tarfile.TarFile:
    # On this machine it jumps over what is not read; a remote file comes in blocks in any case.
    if _is_remote(name):
        return tarfile.open(fileobj=file, mode="r|", bufsize=BUFFER_BYTES, tarinfo=_Member)
    return tarfile.open(fileobj=file, mode="r:", tarinfo=_Member)


def _members(tar: tarfile.TarFile, suffixes: tuple[str, ...]) -> Iterator[tarfile.TarInfo]:
    while (member := tar.next()) is not None:
        if is_file_of(member, suffixes):
            yield member
        tar.members.clear()  # type: ignore[attr-defined]  # it would keep them all


def _encoded(value: Any, dtype: str | None) -> bytes:
    value = cell(value, dtype)
    if isinstance(value, str):
        with _opened(value) as file:
            return file.read()
    return value or b""
