"""The order in which a run sees its samples."""

from collections.abc import Iterator
from typing import NamedTuple

from torch.utils.data import Sampler

from dinov3_hf.data.seeding import Stream, random_generator


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
    index: int
    content: bytes | None = None


class StreamSampler(Sampler[SampleKey]):
    """Yield the keys of a whole run: one permutation of the data set after the other.

    The order is a function of `seed` alone, so a run that continues at `start` sees what it would have seen without
    the break.

    Args:
        num_samples: rows of the data set; may be smaller than a batch.
        num_positions: samples in the run: steps x global batch size.
        seed: of the run.
        start: first position.
    """

    def __init__(self, num_samples: int, num_positions: int, seed: int, start: int = 0):
        if num_samples < 1:
            raise ValueError("the data set is empty; nothing can be drawn from it.")
        if not 0 <= start <= num_positions:
            raise ValueError(f"start position {start} is not within the {num_positions} samples of the run.")
        self.num_samples = num_samples
        self.num_positions = num_positions
        self.seed = seed
        self.start = start

    def __len__(self) -> int:
        return self.num_positions - self.start

    def __iter__(self) -> Iterator[SampleKey]:
        position = self.start
        while position < self.num_positions:
            epoch, offset = divmod(position, self.num_samples)
            order = random_generator(self.seed, Stream.ORDER, 0, epoch).permutation(self.num_samples)
            for index in order[offset : offset + self.num_positions - position]:
                yield SampleKey(position, 0, epoch, int(index))
                position += 1
