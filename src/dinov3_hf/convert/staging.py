"""Files and folders that are whole or not there.

What is written stands beside its final name in a folder with a dot-name, and is renamed when it is complete. Whatever
ends the writing early, an error or a signal that raises, removes that folder; only a process that is killed outright
leaves it behind.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def writing(target: Path, num_bytes: int) -> Iterator[Path]:
    """
    A path, not there yet, at which the block writes the file or folder `target`.

    Args:
        target: must not exist; folders on the way to it are made.
        num_bytes: about what will be written.

    Raises:
        FileExistsError: `target` exists.
        OSError: There is no room, or writing failed; nothing is left behind.
    """
    refuse_existing(target)
    made = [folder for folder in target.absolute().parents if not folder.exists()]
    parent = target.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(parent).free
        if free < num_bytes:
            raise OSError(
                f"{target} needs {num_bytes / 1e9:,.3f} GB and {free / 1e9:,.3f} GB are free in {parent}; make room, "
                "or choose another disk."
            )
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".converting", dir=parent))
    except BaseException:
        _remove_made(made)
        raise
    try:
        yield staging / target.name
        for path in [*staging.rglob("*"), staging]:
            _sync(path)
        refuse_existing(target)
        (staging / target.name).rename(target)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        _remove_made(made)
        if isinstance(error, OSError) and error.filename is None and error.strerror is not None:
            raise OSError(f"{target} could not be written ({error.strerror}); nothing is left of it.") from error
        raise
    staging.rmdir()
    _sync(parent)


def refuse_existing(target: Path) -> None:
    """
    Raises:
        FileExistsError: There is something at `target`.
    """
    if target.exists() or target.is_symlink():
        raise FileExistsError(f"{target} exists already; remove it or choose another name.")


def _remove_made(folders: list[Path]) -> None:
    for folder in folders:  # the innermost first
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
