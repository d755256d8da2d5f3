"""Random numbers of a run: one independent generator for each purpose and key.

A draw depends on the seed of the run and on what is drawn (which sample, which mask), never on who draws it. Worker
processes, ranks, gradient accumulation and a restart in the middle therefore leave every view, every mask and every
number of a forward pass as they were.
"""

from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """What the numbers are for; part of the key, so that equal keys of two purposes do not give equal numbers."""

    ORDER = 0  # key (source, epoch): permutation of the images of a source
    VIEWS = 1  # key (source, epoch, index): crops, flips and photometric parameters of one sample
    MASK_COUNTS = 2  # key (step): which crop of the global batch has how many masked patches
    MASKS = 3  # key (step, entry): blocks of one mask
    REPLACEMENTS = 4  # key (position, attempt): which image takes the place of one that cannot be read
    WINDOWS = 5  # key (source, lane, number): permutation of a window of a stream
    CROP_SIZES = 6  # key (step): which crop sizes a step has
    DROP_PATH = 7  # key (step, group): which images of a group of the global batch go through which branch
    ROPE = 8  # key (step): augmentation of the coordinates


def random_generator(seed: int, stream: Stream, *key: int) -> np.random.Generator:
    """Return the generator of `key` within `stream`. All numbers are non-negative integers."""
    # numpy's SeedSequence takes trailing zeros for absent, so the length of the key tells (epoch,) from (epoch, 0).
    return np.random.default_rng((seed, stream, len(key), *key))
