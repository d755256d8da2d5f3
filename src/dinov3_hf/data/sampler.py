"""The order in which a run sees its samples."""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

from torch.utils.data import Sampler

from dinov3_hf.data.seeding import Stream, random_generator
from dinov3_hf.data.sources.base import ImageSource
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
    """

    position: int
    source: int
    epoch: int
    index: int  # type: ignore[assignment]  # hides `tuple.index`, which nobody misses here
    content: bytes | None = None


class StreamSampler(Sampler[SampleKey | None]):
    """Yield the keys of a whole run: one permutation of each source after the other, the sources by their weights.

    The order is a function of `seed` alone.

    Args:
        images: what is drawn from; may be smaller than a batch.
        num_positions: samples in the run: steps x global batch size.
        batch_size: global, over all ranks and micro-batches; sources that stay alone fill such batches.
        seed: of the run.

    Attributes:
        num_seen: so many samples a resumed run has seen. Their keys are None: whoever iterates drops them, so they
            cost next to nothing, except that a stream is read up to there.
    """

    def __init__(self, images: ImageSource, num_positions: int, batch_size: int, seed: int):
        self.parts = parts_of(images)
        if any(len(part.source) == 0 for part in self.parts):
            raise ValueError("the data set is empty; nothing can be drawn from it.")
        self.num_positions = num_positions
        self.batch_size = batch_size
        self.seed = seed
        self.num_seen = 0

    def __len__(self) -> int:
        return self.num_positions

    def __iter__(self) -> Iterator[SampleKey | None]:
        return itertools.chain(itertools.repeat(None, self.num_seen), self._keys(self.num_seen))

    def _keys(self, start: int) -> Iterator[SampleKey]:
        draws = Draws(self.parts, self.batch_size)
        counts = draws.counts(start)
        samples = [self._samples(i, part.source, counts[i]) for i, part in enumerate(self.parts)]
        for position, source in zip(range(start, self.num_positions), draws.start_at(start), strict=False):
            epoch, index, content = next(samples[source])
            yield SampleKey(position, source, epoch, index, content)

    def _samples(self, number: int, source: ImageSource, start: int) -> Iterator[tuple[int, int, bytes | None]]:
        if isinstance(source, ImageStream):
            yield from source.samples(self.seed, number, start)
        epoch, offset = divmod(start, len(source))
        while True:
            order = random_generator(self.seed, Stream.ORDER, number, epoch).permutation(len(source))
            for index in order[offset:]:
                yield epoch, int(index), None
            epoch, offset = epoch + 1, 0
