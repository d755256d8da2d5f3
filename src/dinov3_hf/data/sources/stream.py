"""Images that are read from front to back, for data sets that do not fit on the machine."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dinov3_hf.data.sources.base import NUM_TRIED, ImageSource
from dinov3_hf.data.sources.lanes import ROWS_OF_A_SHARD, Lane, Ledger
from dinov3_hf.data.sources.shards import CHECK, Shard, reason

STREAM_PREFIX = "stream:"
SHUFFLE_BUFFER = 1000
# So many images from the front of a stream stay in memory: they stand in for images that cannot be read.
NUM_KEPT = 64
# A lane gives at least so many images to a global batch: more lanes would be more than the machines that read them.
MIN_IMAGES_OF_A_LANE = 8


class ImageStream(ImageSource):
    """The images of shards, encoded.

    Its lanes read them pass after pass. The rows of the source are the first `NUM_KEPT` of them.

    Args:
        shards: what is read.
        data: what it is called in messages.
        shuffle_buffer: images that wait to be shuffled, over all lanes; 1 for no shuffling.

    Raises:
        ValueError: nothing to read.
    """

    def __init__(self, shards: Sequence[Shard], data: str, num_channels: int, shuffle_buffer: int = SHUFFLE_BUFFER):
        if shuffle_buffer < 1:
            raise ValueError(f"shuffle_buffer {shuffle_buffer} is not positive; use 1 for no shuffling.")
        self.shards = shards
        self.data = data
        self.num_channels = num_channels
        self.shuffle_buffer = shuffle_buffer
        self.kept = self._first_images()

    def _first_images(self) -> list[tuple[int, bytes]]:
        """Number of the shard and row, and content, of images from the first shards that can be read."""
        kept: list[tuple[int, bytes]] = []
        problem: Exception | None = None
        for number, shard in enumerate(self.shards[:NUM_TRIED]):
            try:
                for row, content in enumerate(shard.read(0)):
                    kept.append((number * ROWS_OF_A_SHARD + row, content))
                    if len(kept) == NUM_KEPT:
                        return kept
            except Exception as error:
                problem = problem or error
        if not kept and problem is not None:
            raise ValueError(f"{self.data} cannot be streamed ({reason(problem)}); {CHECK}.") from problem
        if not kept:
            raise ValueError(f"{self.data} is empty; name another data set.")
        return kept

    def __len__(self) -> int:
        return len(self.kept)

    @property
    def num_images(self) -> None:
        return None

    def content(self, i: int) -> bytes:
        return self.kept[i][1]

    def name(self, i: int) -> str:
        """Return the name of row `i`, or of the image with the index `i` of a lane."""
        place = self.kept[i][0] if i < len(self.kept) else i - ROWS_OF_A_SHARD
        shard, row = divmod(place, ROWS_OF_A_SHARD)
        return f"{self.shards[shard].name} row {row}"

    def fingerprint(self) -> dict[str, Any]:
        name = Path(self.data).name  # without the folder, which may move
        return {"stream": name, "shards": len(self.shards), "shuffle_buffer": self.shuffle_buffer}

    def num_lanes(self, batch_size: int) -> int:
        """Return into how many lanes the stream is divided: the largest divisor of the global batch up to the number
        of shards that leaves each lane `MIN_IMAGES_OF_A_LANE` images of a batch."""
        most = min(len(self.shards), batch_size // MIN_IMAGES_OF_A_LANE)
        return next((number for number in range(most, 0, -1) if batch_size % number == 0), 1)

    def lane(self, number: int, num_lanes: int, seed: int, source: int, ledger: Ledger) -> Lane:
        """Return a lane; see there for the arguments."""
        window = max(1, self.shuffle_buffer // num_lanes)
        return Lane(self.shards, self.data, seed, source, number, num_lanes, window, ledger)
