"""Checkpoints that all ranks write together, while training goes on.

    every rank   copies its pieces to the host                      training waits
    every rank   writes and fsyncs its file                         training goes on
    all meet     a rank that could not write says so to the others
    rank 0       writes teacher/ and the manifest, renames the folder, removes old checkpoints

Until the rename there is no new checkpoint, and nothing has happened to the others.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Thread
from typing import Any

import torch.distributed as dist

from dinov3_hf.distributed.pieces import Piece, state_file, write_pieces
from dinov3_hf.distributed.reductions import rank, world_size
from dinov3_hf.training.checkpoints import (
    FileEntry,
    discard_staged,
    failure,
    put_checkpoint_in_place,
    staging_folder,
    synced_entry,
)

logger = logging.getLogger(__name__)

STATE = "state"


class CheckpointWriter:
    """
    Writes one checkpoint at a time into the output folder of a run, which is on a disk that all ranks share.

    Args:
        output_dir: of the run.
    """

    def __init__(self, output_dir: Path) -> None:
        self.output_dir = output_dir
        # The meetings of the writing threads must not get between those of training.
        self._group: Any = dist.new_group(backend="gloo") if world_size() > 1 else None
        self._thread: Thread | None = None
        self._error: Exception | None = None

    def begin(self, step: int) -> Path:
        """
        An empty folder for the small files of `checkpoint-{step}`; waits for the checkpoint before.

        Raises:
            OSError: that one could not be written, or the folder cannot be made, on all ranks.
        """
        self.wait()
        folder = staging_folder(self.output_dir, step)

        def make_room() -> None:
            discard_staged(folder)
            folder.mkdir(parents=True)

        try:
            self._all(make_room if rank() == 0 else None)  # nobody writes into what is still to be removed
        except Exception as reason:
            raise OSError(failure(self.output_dir / folder.name, reason)) from reason
        return folder

    def finish(
        self,
        step: int,
        pieces: Sequence[Piece],
        complete: Callable[[Path], None],
        afterwards: Callable[[], None],
        error: Exception | None = None,
    ) -> None:
        """
        Write the rest of the checkpoint in the background.

        Args:
            step: as of `begin`.
            pieces: of this rank, on the host.
            complete: called by rank 0 with the folder of the checkpoint when the pieces of all ranks are in `state/`.
            afterwards: called by rank 0 when the checkpoint is in place.
            error: what this rank has failed with since `begin`.
        """
        self._thread = Thread(
            target=self._run, args=(step, pieces, complete, afterwards, error), name="save", daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """
        Return when the last checkpoint is in place.

        Raises:
            OSError: it could not be written, by whichever rank; nothing is left of it.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def settle(self, seconds: float) -> None:
        """Let the last checkpoint come to its end where something else has gone wrong, which is to be heard of."""
        if self._thread is not None:
            self._thread.join(seconds)  # other ranks may be gone

    def _run(
        self,
        step: int,
        pieces: Sequence[Piece],
        complete: Callable[[Path], None],
        afterwards: Callable[[], None],
        error: Exception | None,
    ) -> None:
        folder = staging_folder(self.output_dir, step)
        target = self.output_dir / folder.name
        try:
            written = self._all(lambda: self._write(folder, pieces), error)
            entries = {name: entry for part in written for name, entry in part.items()}

            def put_in_place() -> None:
                complete(folder)
                put_checkpoint_in_place(folder, target, step, world_size(), entries)

            self._all(put_in_place if rank() == 0 else None)
        except Exception as reason:
            self._error = OSError(failure(target, reason))  # before room is made
            self._error.__cause__ = reason
            if rank() == 0:
                discard_staged(folder)
            return
        if rank() == 0:
            try:
                afterwards()
            except OSError as reason:
                logger.warning("older checkpoints could not be looked through: %s", reason)

    def _write(self, folder: Path, pieces: Sequence[Piece]) -> dict[str, FileEntry]:
        path = state_file(folder / STATE, rank(), world_size())
        write_pieces(path, pieces)
        return {path.relative_to(folder).as_posix(): synced_entry(path)}

    def _all(self, work: Callable[[], Any] | None, error: Exception | None = None) -> list[Any]:
        """What `work` gives on each rank, or on all of them the error of the first that has one."""
        result = None
        if error is None and work is not None:
            try:
                result = work()
            except Exception as own:
                error = own
        outcomes = self._gather((result, None if error is None else str(error) or type(error).__name__))
        if error is not None:
            raise error
        for number, (_, reason) in enumerate(outcomes):
            if reason is not None:
                raise OSError(f"rank {number}: {reason}")
        return [found for found, _ in outcomes]

    def _gather(self, item: Any) -> list[Any]:
        if self._group is None:
            return [item]
        items: list[Any] = [None] * world_size()
        dist.all_gather_object(items, item, group=self._group)
        return items
