"""Lanes of a stream: each reads shards of its own, on one rank, and feeds its own range of every global batch.

The shards are dealt to L lanes like cards: one permutation of all shards after the other, of which lane k takes the
turns k, k + L, k + 2L, ... So every shard has one turn in a pass, in one lane, and no lane runs out of shards.
"""

import itertools
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from queue import Full, Queue
from typing import Any, Generic, NamedTuple, TypeVar

from dinov3_hf.data.seeding import Stream, random_generator
from dinov3_hf.data.sources.shards import CHECK, Shard, reason

# Seconds before a shard that failed is tried again, each time at the row where it broke off.
RETRY_WAITS: tuple[float, ...] = (1, 5, 25)
# So many different shards that fail one after the other are no accident.
MAX_DEAD_SHARDS = 8
# More than a shard has: `index` of an image is its row plus (1 + number of its shard) times this.
ROWS_OF_A_SHARD = 2**32

Item = TypeVar("Item")


class StreamedImage(NamedTuple):
    """An image of a stream.

    Attributes:
        epoch: passes over all shards before this one.
        index: of the image, the same in every epoch.
        content: the encoded image.
        failures: name and reason of each shard that failed just before.
    """

    epoch: int
    index: int  # type: ignore[assignment]  # hides `tuple.index`
    content: bytes
    failures: tuple[tuple[str, str], ...] = ()


class _Failure(NamedTuple):
    name: str
    reason: str


@dataclass
class Ledger:
    """What a lane has read, from which follows where it is after any number of images.

    Attributes:
        rows: images that each of its turns gave, in their order.
        failed: why a turn that failed did, by its number.
    """

    rows: list[int] = field(default_factory=list)
    failed: dict[int, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return plain lists; may be called while the lane is read."""
        rows = self.rows.copy()
        return {"rows": rows, "failed": [[i, text] for i, text in self.failed.copy().items() if i < len(rows)]}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Ledger":
        return cls(list(values["rows"]), {int(i): text for i, text in values["failed"]})


@dataclass(frozen=True)
class Lane:
    """A lane of a stream.

    Its images are shuffled in windows of `window`. Windows, permutations and turns are functions of the seed, and the
    windows also of the shards that failed. A shard that fails is tried again; then the rest of it is left out in this
    pass.

    Args:
        shards: of the stream.
        data: what the stream is called in messages.
        seed: of the run.
        source: number of the stream in the run.
        number: of the lane, from 0 to `num_lanes` - 1.
        num_lanes: of the stream.
        window: images that are shuffled among themselves.
        ledger: is read, and continued.
    """

    shards: Sequence[Shard]
    data: str
    seed: int
    source: int
    number: int
    num_lanes: int
    window: int
    ledger: Ledger

    def images(self, start: int) -> Iterator[StreamedImage]:
        """Return the images of the lane from number `start` on, without end; a thread begins to read them at once.

        What the ledger knows to lie before the window of `start` is not read.

        Raises:
            ValueError: while iterating, when one shard after the other cannot be read.
        """
        first, offset = divmod(start, self.window)
        windows = ReadAhead(self._windows(first), 1)
        return itertools.islice(itertools.chain.from_iterable(windows), offset, None)

    def _windows(self, first: int) -> Iterator[list[StreamedImage]]:
        """Shuffled windows from number `first` on; the first image of each says which shards have failed before."""
        items = self._read(first * self.window)
        for number in itertools.count(first):
            images: list[StreamedImage] = []
            failures: list[_Failure] = []
            while len(images) < self.window:
                item = next(items)
                if isinstance(item, _Failure):
                    failures.append(item)
                else:
                    images.append(item)
            rng = random_generator(self.seed, Stream.WINDOWS, self.source, self.number, number)
            shuffled = [images[i] for i in rng.permutation(len(images))]
            shuffled[0] = shuffled[0]._replace(failures=tuple(failures))
            yield shuffled

    def _read(self, skip: int) -> Iterator[StreamedImage | _Failure]:
        """The images in the order of the shards without the first `skip`, and shards that fail where they do."""
        dead: set[int] = set()  # shards that have failed without giving an image since there was one
        for turn in itertools.count():
            known = self.ledger.rows[turn] if turn < len(self.ledger.rows) else None
            if known is not None and known < skip:
                skip -= known
                continue
            epoch, shard = self._dealt(turn)
            if known == skip:
                skip = 0
            else:
                row = skip
                try:
                    for content in self._rows(self.shards[shard], row, known):
                        yield StreamedImage(epoch, (1 + shard) * ROWS_OF_A_SHARD + row, content)
                        row += 1
                        dead.clear()
                    if row == skip > 0:  # it ends here, or before
                        row = sum(1 for _ in self._rows(self.shards[shard], 0, None))
                except Exception as error:
                    self.ledger.failed[turn] = reason(error)
                    if row == 0:
                        dead.add(shard)
                skip = max(0, skip - row)
                self.ledger.rows[turn : turn + 1] = [row]
            if skip == 0 and turn in self.ledger.failed:
                yield _Failure(self.shards[shard].name, self.ledger.failed[turn])
            if len(dead) == min(len(self.shards), MAX_DEAD_SHARDS):
                raise ValueError(
                    f"{self.data} cannot be read any more: {len(dead)} shard{'s' if len(dead) > 1 else ''} failed one "
                    f"after the other, the last {self.shards[shard].name} ({self.ledger.failed[turn]}); {CHECK}, "
                    "then resume."
                )

    def _dealt(self, turn: int) -> tuple[int, int]:
        """The epoch and the number of the shard of a turn of this lane."""
        epoch, place = divmod(self.number + turn * self.num_lanes, len(self.shards))
        order = random_generator(self.seed, Stream.ORDER, self.source, epoch).permutation(len(self.shards))
        return epoch, int(order[place])

    def _rows(self, shard: Shard, start: int, stop: int | None) -> Iterator[bytes]:
        row, waits = start, iter(RETRY_WAITS)
        while True:
            try:
                for content in itertools.islice(shard.read(row), None if stop is None else stop - row):
                    yield content
                    row, waits = row + 1, iter(RETRY_WAITS)
                return
            except Exception:
                wait = next(waits, None)
                if wait is None:
                    raise
                time.sleep(wait)


@dataclass(frozen=True)
class _End:
    error: Exception | None


class ReadAhead(Generic[Item]):
    """Iterates over `items`, which a thread reads at once and up to `num_ahead` ahead; it ends with this object."""

    def __init__(self, items: Iterator[Item], num_ahead: int):
        self._ready: Queue[Item | _End] = Queue(num_ahead)
        stop = threading.Event()
        weakref.finalize(self, stop.set)
        threading.Thread(target=_fill, args=(items, self._ready, stop), name="read_ahead", daemon=True).start()

    def __iter__(self) -> "ReadAhead[Item]":
        return self

    def __next__(self) -> Item:
        item = self._ready.get()
        if isinstance(item, _End):
            raise item.error or StopIteration
        return item


def _fill(items: Iterator[Any], ready: "Queue[Any]", stop: threading.Event) -> None:
    def put(item: Any) -> None:
        while not stop.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except Full:
                continue

    try:
        for item in items:
            put(item)
            if stop.is_set():
                return
    except Exception as error:
        put(_End(error))
    else:
        put(_End(None))
