"""Several sources of images in one run, each with its share of the images."""

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dinov3_hf.data.decoding import Content
from dinov3_hf.data.sources.base import ImageSource, part_and_row

STEPS_AT_ONCE = 2**16  # so that the numbers of a long run need little memory


@dataclass(frozen=True)
class Part:
    """A source and its share in a mixture.

    Attributes:
        source: the images.
        weight: share of the images of the run, relative to the other parts.
        alone: whether its images come in global batches of their own. The paper draws a tenth of its batches from
            ImageNet-1k alone.
    """

    source: ImageSource
    weight: float
    alone: bool = False


class Mixture(ImageSource):
    """Parts that are drawn from by weight; their rows, one part after the other, are its rows."""

    def __init__(self, parts: Sequence[Part]):
        self.parts = tuple(parts)
        for part in self.parts:
            if not (part.weight > 0 and math.isfinite(part.weight)):
                raise ValueError(f"weight {part.weight} is not positive; leave a source out rather than weigh it 0.")
        sources = [part.source for part in self.parts]
        self.num_channels = sources[0].num_channels
        self.ends = np.cumsum([len(source) for source in sources])
        if all(source.labels is not None for source in sources):
            self.class_names = sorted({name for source in sources for name in source.class_names or []})
            number = {name: i for i, name in enumerate(self.class_names)}
            self.labels = np.concatenate(
                [np.array([number[name] for name in source.class_names or []])[source.labels] for source in sources]
            )

    def __len__(self) -> int:
        return int(self.ends[-1])

    @property
    def num_images(self) -> int | None:
        numbers = [part.source.num_images for part in self.parts]
        return None if None in numbers else sum(number for number in numbers if number is not None)

    def _place(self, i: int) -> tuple[ImageSource, int]:
        number, row = part_and_row(self.ends, i)
        return self.parts[number].source, row

    def content(self, i: int) -> Content:
        source, row = self._place(i)
        return source.content(row)

    def name(self, i: int) -> str:
        source, row = self._place(i)
        return source.name(row)

    def fingerprint(self) -> dict[str, Any]:
        return {
            "sources": [
                {**part.source.fingerprint(), "weight": part.weight, "alone": part.alone} for part in self.parts
            ]
        }


def parts_of(images: ImageSource) -> tuple[Part, ...]:
    """Return the parts of a mixture; any other source is one part."""
    return images.parts if isinstance(images, Mixture) else (Part(images, 1.0),)


class Turns:
    """Whose turn it is among entries with weights.

    The turn number j = 0, 1, ... of an entry with share w is due at (j + 1/2) / w, and turns come in the order in
    which they are due. At any time every entry has had its share, to within a few turns; and where a run stands after
    any number of turns follows without counting through them.
    """

    def __init__(self, weights: Sequence[float]):
        self.periods = [sum(weights) / weight for weight in weights]

    def counts(self, num_turns: int) -> list[int]:
        """Return how many of the first `num_turns` turns each entry has."""
        counts: list[int] = self.counts_at(np.array([num_turns]))[0].tolist()
        return counts

    def counts_at(self, num_turns: np.ndarray) -> np.ndarray:
        """Return how many of the first turns each entry has, int64 (N, entries), for N numbers of turns, int64."""
        periods = np.array(self.periods)
        # By this time at most num_turns are due, and of the others only as many are missing as there are entries.
        time = num_turns[:, None] - len(periods)
        counts = np.maximum(0, np.floor(time / periods + 0.5)).astype(np.int64)
        # What rounding of floats put on the wrong side.
        while (early := (counts > 0) & ((counts - 0.5) * periods > time)).any():
            counts -= early
        while (late := (counts + 0.5) * periods <= time).any():
            counts += late
        while len(missing := np.flatnonzero(counts.sum(1) < num_turns)):
            counts[missing, ((counts[missing] + 0.5) * periods).argmin(1)] += 1
        return counts

    def start_at(self, num_turns: int) -> Iterator[int]:
        """Yield the entries whose turn it is after the first `num_turns` turns, without end."""
        return self._following(self.counts(num_turns))

    def _following(self, counts: Sequence[int]) -> Iterator[int]:
        due = [((count + 0.5) * self.periods[i], i, count) for i, count in enumerate(counts)]
        heapq.heapify(due)
        while True:
            _, i, count = due[0]
            heapq.heapreplace(due, ((count + 1.5) * self.periods[i], i, count + 1))
            yield i


class Draws:
    """Which part of a mixture each position of a run draws from.

    Steps take turns between the parts that stay alone and all the others together; within the steps of the others,
    single images do.

    Args:
        parts: of the mixture.
        batch_size: images of one optimizer step, over all ranks and micro-batches.
    """

    def __init__(self, parts: Sequence[Part], batch_size: int):
        self.batch_size = batch_size
        self.num_parts = len(parts)
        self.alone = [i for i, part in enumerate(parts) if part.alone]
        self.mixed = [i for i, part in enumerate(parts) if not part.alone]
        weights = [part.weight for part in parts]
        mixed_weights = [weights[i] for i in self.mixed]
        self.images = Turns(mixed_weights)
        # The mixed parts come last: they may be none.
        self.steps = Turns([weights[i] for i in self.alone] + ([sum(mixed_weights)] if self.mixed else []))

    def counts(self, position: int, low: int = 0, high: int | None = None) -> list[int]:
        """Return how many of the first `position` images each part gave.

        With `low` and `high`, those at places from `low` to `high` - 1 of their global batches count.
        """
        high = self.batch_size if high is None else high
        step, offset = divmod(position, self.batch_size)
        num_steps = self.steps.counts(step)
        counts = [0] * self.num_parts
        for i, number in zip(self.alone, num_steps, strict=False):
            counts[i] = number * (high - low)
        if self.mixed:
            for i, number in zip(self.mixed, self._mixed_counts(num_steps[-1], low, high), strict=True):
                counts[i] = number
        for place, i in zip(range(offset), self._from_step(step), strict=False):
            counts[i] += low <= place < high
        return counts

    def _mixed_counts(self, num_steps: int, low: int, high: int) -> list[int]:
        """Images of each mixed part at places from `low` to `high` of the first mixed steps."""
        if len(self.mixed) == 1:
            return [num_steps * (high - low)]
        if high - low == self.batch_size:
            return self.images.counts(num_steps * self.batch_size)
        counts = np.zeros(len(self.mixed), dtype=np.int64)
        for start in range(0, num_steps, STEPS_AT_ONCE):
            steps = np.arange(start, min(start + STEPS_AT_ONCE, num_steps)) * self.batch_size
            counts += (self.images.counts_at(steps + high) - self.images.counts_at(steps + low)).sum(0)
        return counts.tolist()

    def start_at(self, position: int) -> Iterator[int]:
        """Yield the parts that the positions from `position` on draw from, without end."""
        step, offset = divmod(position, self.batch_size)
        following = self._from_step(step)
        for _ in range(offset):
            next(following)
        return following

    def _from_step(self, step: int) -> Iterator[int]:
        steps = self.steps.start_at(step)
        num_mixed = self.steps.counts(step)[-1] if self.mixed else 0
        images = self.images.start_at(num_mixed * self.batch_size)
        while True:
            entry = next(steps)
            for _ in range(self.batch_size):
                yield self.alone[entry] if entry < len(self.alone) else self.mixed[next(images)]
