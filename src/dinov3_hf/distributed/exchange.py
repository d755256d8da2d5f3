"""Which rank has which images of a global batch, and how each image comes to one rank of every group of ranks.

Part a of the j-th of R ranks is images [(a R + j) size, (a R + j + 1) size) of the global batch, everywhere.

Legend: W ranks of the world, I images of this rank in the source, J images of this rank in its group.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from dinov3_hf.distributed.reductions import process_group, rank, world_size

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Layout:
    """
    How the images of a global batch are dealt to ranks.

    Args:
        ranks: of the world, in the order in which they take turns.
        size: images of one forward pass, a part, on one rank.
        num_images: of the global batch; a multiple of `size` times the number of ranks.

    Raises:
        ValueError: it is none.
    """

    ranks: tuple[int, ...]
    size: int
    num_images: int

    def __post_init__(self) -> None:
        if self.num_images % (self.size * len(self.ranks)):
            raise ValueError(
                f"{self.num_images} images are not a multiple of {self.size} on each of {len(self.ranks)} ranks; "
                "change the batch or the ranks."
            )

    def positions(self, rank: int) -> Tensor:
        """The images of a rank in the order of its parts, which is that of the batch, int64 (images of the rank,)."""
        parts = torch.arange(self.num_images).view(-1, len(self.ranks), self.size)
        return parts[:, self.ranks.index(rank)].flatten()

    def holders(self) -> Tensor:
        """The rank that has each image, int64 (num_images,)."""
        turns = torch.arange(self.num_images) // self.size % len(self.ranks)
        return torch.tensor(self.ranks)[turns]


class Exchange:
    """
    Each image goes from the rank that has it to one rank of every group, whatever their order and part sizes.

    A rank has in memory what it sends, a row for each of its images and groups, and what it receives: neither grows
    when ranks and the global batch grow together.

    Every rank of the world makes it, and calls its methods when all others do. No gradient passes.

    Args:
        source: who has the images, over all ranks.
        groups: who is to have them; every rank is in one group.

    Raises:
        ValueError: the groups are not all ranks once, or the batches are not of one size.
    """

    def __init__(self, source: Layout, groups: Sequence[Layout]) -> None:
        with process_group(None):
            me, num_ranks = rank(), world_size()
        for ranks in (source.ranks, [place for group in groups for place in group.ranks]):
            if sorted(ranks) != list(range(num_ranks)):
                raise ValueError(f"ranks {tuple(ranks)} are not each of {num_ranks} once; name all of them.")
        for group in groups:
            if group.num_images != source.num_images:
                raise ValueError(
                    f"a group of {group.num_images} images cannot get {source.num_images}; "
                    "let every group have the whole batch."
                )
        mine = source.positions(me)  # (I,)
        goals = torch.cat([group.holders()[mine] for group in groups])  # (groups * I,)
        (wanted,) = (group.positions(me) for group in groups if me in group.ranks)  # (J,)
        origins = source.holders()[wanted]  # (J,)
        # On the way, rows are in the order of the ranks, and those of one rank in the order of the batch.
        leaving = torch.arange(len(mine)).repeat(len(groups))[goals.argsort(stable=True)]
        arriving = origins.argsort(stable=True).argsort()
        self._indices = {CPU: (leaving, arriving)}
        self._num_sent = goals.bincount(minlength=num_ranks).tolist()
        self._num_received = origins.bincount(minlength=num_ranks).tolist()
        self._num_images = len(mine)

    @torch.no_grad()
    def send(self, rows: Tensor) -> Tensor:
        """
        Args:
            rows: (I, ...), one for each of this rank's images in the order of the source, of any dtype.

        Returns:
            (J, ...), one for each of this rank's images in the order of its group.

        Raises:
            ValueError: there is not one row for each image.
        """
        _check_rows(rows, self._num_images)
        leaving, arriving = self._indices_on(rows.device)
        return _all_to_all(rows[leaving], self._num_sent, self._num_received)[arriving]

    @torch.no_grad()
    def send_ragged(self, rows: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """
        As `send`, for images of which each has some rows, or none.

        Args:
            rows: (sum of counts, ...), image by image.
            counts: rows of each image, int64 (I,), on any device.

        Returns:
            Rows and counts, (J,), of this rank's images in the order of its group.
        """
        device, here = rows.device, counts.cpu()
        _check_rows(here, self._num_images)
        _check_rows(rows, int(here.sum()))
        leaving, arriving = self._indices[CPU]
        sent = here[leaving]
        received = _all_to_all(sent.to(device), self._num_sent, self._num_received).cpu()
        on_the_way = _all_to_all(
            rows[_rows_of(here, leaving).to(device)],
            [int(part.sum()) for part in sent.split(self._num_sent)],
            [int(part.sum()) for part in received.split(self._num_received)],
        )
        return on_the_way[_rows_of(received, arriving).to(device)], received[arriving].to(counts.device)

    def _indices_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._indices:
            leaving, arriving = self._indices[CPU]
            self._indices[device] = leaving.to(device), arriving.to(device)
        return self._indices[device]


def _check_rows(rows: Tensor, expected: int) -> None:
    if len(rows) != expected:
        raise ValueError(f"there are {len(rows)} rows for images that have {expected}; send those of every image.")


def _rows_of(counts: Tensor, images: Tensor) -> Tensor:
    """Which rows those images are, one after the other, where image i has `counts[i]` rows; all int64, on the CPU."""
    starts, lengths = (counts.cumsum(0) - counts)[images], counts[images]
    return (starts - lengths.cumsum(0) + lengths).repeat_interleave(lengths) + torch.arange(int(lengths.sum()))


def _all_to_all(rows: Tensor, num_sent: list[int], num_received: list[int]) -> Tensor:
    """
    Args:
        rows: (sum of num_sent, ...), contiguous, in the order of the ranks they go to.
        num_sent, num_received: rows to and from each rank.

    Returns:
        (sum of num_received, ...), in the order of the ranks they come from.
    """
    if len(num_sent) == 1:
        return rows
    received = rows.new_empty((sum(num_received), *rows.shape[1:]))
    width = rows.shape[1:].numel() * rows.element_size()
    dist.all_to_all_single(  # of bytes: no backend knows every dtype
        received.view(-1).view(torch.uint8),
        rows.view(-1).view(torch.uint8),
        [number * width for number in num_received],
        [number * width for number in num_sent],
    )
    return received
