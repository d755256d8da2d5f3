"""The order in which a run sees its samples."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from torch.utils.data import Sampler

from dinov3_hf.data.seeding import Stream, random_generator
from dinov3_hf.data.sources.base import ImageSource
from dinov3_hf.data.sources.lanes import Ledger, StreamedImage
from dinov3_hf.data.sources.mixture import Draws, parts_of
from dinov3_hf.data.sources.stream import ImageStream


class SampleKey(NamedTuple):
    """What a worker needs to make one sample.

    Attributes:
        position: place of the sample in the run, counted over all ranks from the start.
        source: number of the source of images.
        epoch: how often this source has been gone through before.
        index: row of the source.
        content: the encoded image, where the source is a stream, which has no rows to go back to.
        failures: name and reason of each shard of a stream that failed just before.
    """

    position: int
    source: int
    epoch: int
    index: int  # type: ignore[assignment]  # hides `tuple.index`, which nobody misses here
    content: bytes | None = None
    failures: tuple[tuple[str, str], ...] = ()


class StreamSampler(Sampler[SampleKey | None]):
    """Yield the keys of a whole run: one permutation of each source after the other, the sources by their weights.

    The order is a function of `seed` alone, and of the shards that fail where a stream has any.

    Args:
        images: what is drawn from; may be smaller than a batch.
        num_positions: samples in the run: steps x global batch size.
        batch_size: global, over all ranks and micro-batches; sources that stay alone fill such batches.
        seed: of the run.
        micro_batch: images of one rank that are read together; micro-batches are dealt to the ranks in turn. By
            default the whole batch.
        rank: whose keys are wanted; the others are None. Streams are read only where this rank needs them.
        num_ranks: of the run.

    Attributes:
        num_seen: so many samples a resumed run has seen. Their keys are None: whoever iterates drops them, so they
            cost next to nothing.
    """

    def __init__(
        self,
        images: ImageSource,
        num_positions: int,
        batch_size: int,
        seed: int,
        micro_batch: int | None = None,
        rank: int = 0,
        num_ranks: int = 1,
    ):
        self.parts = parts_of(images)
        if any(len(part.source) == 0 for part in self.parts):
            raise ValueError("the data set is empty; nothing can be drawn from it.")
        self.num_positions = num_positions
        self.batch_size = batch_size
        self.seed = seed
        self.num_seen = 0
        micro_batch = micro_batch or batch_size
        self._is_mine = [place // micro_batch % num_ranks == rank for place in range(batch_size)]
        self._ledgers: dict[tuple[int, int], Ledger] = {}  # of this rank, by number of the source and of the lane
        self._restored: dict[tuple[int, int], Ledger] = {}  # of all ranks, before

    def __len__(self) -> int:
        return self.num_positions

    def __iter__(self) -> Iterator[SampleKey | None]:
        return itertools.chain(itertools.repeat(None, self.num_seen), self._keys(self.num_seen))

    def progress(self) -> list[dict[str, Any]]:
        """Return what this rank has read of each lane of a stream, as plain values: see `Ledger`."""
        return [
            {"source": source, "lane": lane, **ledger.to_json()} for (source, lane), ledger in self._ledgers.items()
        ]

    def restore(self, progress: Sequence[dict[str, Any]]) -> None:
        """Go on from the `progress` of all ranks, however many there were: what is known to be read is passed over."""
        for entry in progress:
            self._restored[entry["source"], entry["lane"]] = Ledger.from_json(entry)

    def _keys(self, start: int) -> Iterator[SampleKey | None]:
        draws = Draws(self.parts, self.batch_size)
        takers = [self._taker(i, draws, start) for i in range(len(self.parts))]
        for position, source in zip(range(start, self.num_positions), draws.start_at(start), strict=False):
            place = position % self.batch_size
            image = takers[source](place)
            yield SampleKey(position, source, *image) if image is not None and self._is_mine[place] else None

    def _taker(self, number: int, draws: Draws, start: int) -> Callable[[int], StreamedImage | tuple[int, int] | None]:
        """What gives the next image of a source, for a place in the global batch."""
        source = self.parts[number].source
        if not isinstance(source, ImageStream):
            rows = self._rows(number, len(source), draws.counts(start)[number])
            return lambda place: next(rows)
        num_lanes = source.num_lanes(self.batch_size)
        size = self.batch_size // num_lanes  # of the range of places that a lane feeds
        lanes = {}
        for i in range(num_lanes):
            if any(self._is_mine[i * size : (i + 1) * size]):
                ledger = self._ledgers.setdefault((number, i), self._restored.get((number, i), Ledger()))
                num_read = draws.counts(start, i * size, (i + 1) * size)[number]
                lanes[i] = source.lane(i, num_lanes, self.seed, number, ledger).images(num_read)
        return lambda place: next(lanes[place // size]) if place // size in lanes else None

    def _rows(self, number: int, length: int, start: int) -> Iterator[tuple[int, int]]:
        epoch, offset = divmod(start, length)
        while True:
            order = random_generator(self.seed, Stream.ORDER, number, epoch).permutation(length)
            for index in order[offset:]:
                yield epoch, int(index)
            epoch, offset = epoch + 1, 0
