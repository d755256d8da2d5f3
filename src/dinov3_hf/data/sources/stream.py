"""Images that are read from front to back, for data sets that do not fit on the machine."""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from queue import Full, Queue
from threading import Event, Thread
from typing import TYPE_CHECKING, Any, TypeVar

from dinov3_hf.data.seeding import Stream, random_generator
from dinov3_hf.data.sources.arrow import cell, find_image_column, import_datasets, value_type
from dinov3_hf.data.sources.base import ImageSource, first_line

if TYPE_CHECKING:
    import datasets

STREAM_PREFIX = "stream:"
SHUFFLE_BUFFER = 1000
# So many images from the front of a stream stay in memory: they stand in for images that cannot be read.
NUM_KEPT = 64
# More than a shard has: `index` of an image is its shard times this and its row, the same in every epoch.
ROWS_OF_A_SHARD = 2**32

Item = TypeVar("Item")


class ImageStream(ImageSource):
    """The images of a `datasets.IterableDataset`, encoded.

    `samples` reads them pass after pass. The rows of the source are the first `NUM_KEPT` of them.

    Args:
        dataset: what is read.
        data: what it is called in messages.
        shuffle_buffer: images that are shuffled among themselves.
        column: of the images; by default `image`, or the only one of that type.

    Raises:
        ValueError: nothing to read, or no image column.
    """

    def __init__(
        self,
        dataset: "datasets.IterableDataset",
        data: str,
        num_channels: int,
        shuffle_buffer: int = SHUFFLE_BUFFER,
        column: str | None = None,
    ):
        if shuffle_buffer < 1:
            raise ValueError(f"shuffle_buffer {shuffle_buffer} is not positive; use 1 for no shuffling.")
        self.data = data
        self.num_channels = num_channels
        self.shuffle_buffer = shuffle_buffer
        try:
            first = next(iter(dataset.take(1)), None)
        except Exception as error:
            raise ValueError(f"{data} cannot be streamed ({first_line(error)}).") from error
        if first is None:
            raise ValueError(f"{data} is empty; name another data set.")
        load = import_datasets()
        features = dataset.features or dict.fromkeys(first)
        self.column = find_image_column(features, data, column)
        dataset = dataset.select_columns([self.column])
        if isinstance(features[self.column], load.Image):
            dataset = dataset.cast_column(self.column, load.Image(decode=False))
        self.dataset = dataset
        self.dtype = value_type(features[self.column])
        self.num_samples: int | None = None  # of one pass, known after the first
        self.kept = list(islice(self._read(range(dataset.num_shards)), NUM_KEPT))

    def __len__(self) -> int:
        return len(self.kept)

    @property
    def num_images(self) -> None:
        return None

    def content(self, i: int) -> bytes:
        return self.kept[i][1]

    def name(self, i: int) -> str:
        shard, row = divmod(self.kept[i][0] if i < len(self.kept) else i, ROWS_OF_A_SHARD)
        return f"{self.data} shard {shard} row {row}"

    def fingerprint(self) -> dict[str, Any]:
        name = Path(self.data).name  # without the folder, which may move
        return {"stream": name, "shards": self.dataset.num_shards, "shuffle_buffer": self.shuffle_buffer}

    def samples(self, seed: int, source: int, start: int) -> Iterator[tuple[int, int, bytes]]:
        """Yield (epoch, index, encoded image) without end, from the image number `start` of the run on.

        An epoch reads the shards in an order of its own and shuffles each `shuffle_buffer` images; `index` tells shard
        and row. What comes before `start` is read and dropped.
        """
        epoch, offset = 0, start
        while True:
            if self.num_samples is not None:
                epoch, offset = epoch + offset // self.num_samples, offset % self.num_samples
            num_read = 0
            for index, content in self._epoch(seed, source, epoch):
                num_read += 1
                if num_read > offset:
                    yield epoch, index, content
            self.num_samples = num_read
            epoch, offset = epoch + 1, max(0, offset - num_read)

    def _epoch(self, seed: int, source: int, epoch: int) -> Iterator[tuple[int, bytes]]:
        shards = random_generator(seed, Stream.ORDER, source, epoch).permutation(self.dataset.num_shards)
        images = read_ahead(self._read(shards), self.shuffle_buffer)
        start = 0
        while window := list(islice(images, self.shuffle_buffer)):
            for i in random_generator(seed, Stream.WINDOWS, source, epoch, start).permutation(len(window)):
                yield window[i]
            start += len(window)

    def _read(self, shards: Iterable[int]) -> Iterator[tuple[int, bytes]]:
        for shard in map(int, shards):
            for row, sample in enumerate(self.dataset.shard(self.dataset.num_shards, shard)):
                yield shard * ROWS_OF_A_SHARD + row, _encoded(sample[self.column], self.dtype)


def _encoded(value: Any, dtype: str | None) -> bytes:
    value = cell(value, dtype)
    if isinstance(value, str):
        import fsspec  # a dependency of datasets

        with fsspec.open(value) as file:
            return bytes(file.read())
    return value or b""


@dataclass(frozen=True)
class _End:
    error: Exception | None


def read_ahead(items: Iterator[Item], num_ahead: int) -> Iterator[Item]:
    """Yield `items`, read by a thread that is up to `num_ahead` of them ahead."""
    ready: Queue[Item | _End] = Queue(num_ahead)
    stop = Event()

    def put(item: Item | _End) -> None:
        while not stop.is_set():
            with suppress(Full):
                return ready.put(item, timeout=0.1)

    def work() -> None:
        try:
            for item in items:
                put(item)
                if stop.is_set():
                    return
        except Exception as error:
            put(_End(error))
        else:
            put(_End(None))

    Thread(target=work, name="read_ahead", daemon=True).start()
    try:
        while not isinstance(item := ready.get(), _End):
            yield item
    finally:
        stop.set()
    if item.error is not None:
        raise item.error
