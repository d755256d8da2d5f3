"""Folders that are whole or not there, so that a run can be killed between any two instructions.

    .checkpoint-20.saving/checkpoint-20   being written
    checkpoint-20                         complete: fsynced, listed in its manifest.json, then renamed
    .checkpoint-20.old                    replaced by a new checkpoint-20; comes back if that one did not
    .checkpoint-20.deleting               being removed

`manifest.json` is the last file that is written. A folder without it, or whose files are not as it says, is no
checkpoint.
"""

import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypedDict

from dinov3_hf import __version__

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_HIDDEN = re.compile(r"\.(?P<name>[A-Za-z0-9][A-Za-z0-9_-]*)\.(?P<state>saving|old|deleting)")
_CHUNK = 1 << 24  # bytes


class FileEntry(TypedDict):
    """What a manifest says of a file."""

    bytes: int
    crc32: int


def staging_folder(output_dir: Path, step: int) -> Path:
    """Where `checkpoint-{step}` is written."""
    target = output_dir / f"checkpoint-{step}"
    return _hidden(target, "saving") / target.name


def discard_staged(folder: Path) -> None:
    """Remove what has been written of a checkpoint."""
    shutil.rmtree(folder.parent, ignore_errors=True)


def put_checkpoint_in_place(
    staged: Path, target: Path, step: int, world_size: int, entries: Mapping[str, FileEntry]
) -> None:
    """
    Write the manifest of a checkpoint that is otherwise whole, and move it to its place.

    Args:
        staged: of `staging_folder`.
        target: `checkpoint-{step}`.
        step: optimizer steps taken.
        world_size: ranks that have written to it.
        entries: of files that have been synced already.

    Raises:
        FileNotFoundError: a rank has written elsewhere.
    """
    random_states = ["rng_state.pth"] if world_size == 1 else [f"rng_state_{i}.pth" for i in range(world_size)]
    missing = [name for name in [*random_states, *entries] if not (staged / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{missing[0]} is missing; output_dir must be on a disk that all ranks share")
    write_manifest(staged, step, entries)
    _put_in_place(staged, target)
    staged.parent.rmdir()


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """
    An empty folder of the same name, which replaces `folder` when the block ends; for one process.

    Raises:
        OSError: the block or the move failed. Nothing is left of the new folder, the old one is as it was.
    """
    staging = _hidden(folder, "saving")
    shutil.rmtree(staging, ignore_errors=True)
    staged = staging / folder.name
    try:
        staged.mkdir(parents=True)
        yield staged
        for path in _files(staged):
            _sync(path)
        _put_in_place(staged, folder)
    except BaseException as error:
        message = failure(folder, error)  # before room is made
        shutil.rmtree(staging, ignore_errors=True)
        if isinstance(error, Exception):
            raise OSError(message) from error
        raise
    staging.rmdir()


def failure(target: Path, error: BaseException) -> str:
    """Why a checkpoint, or another folder of a run, could not be written, and what there is to go on from."""
    reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
    output_dir = target.parent
    complete = [folder.name for folder in checkpoints(output_dir) if problem(folder) is None]
    room = f"; {_gigabytes(output_dir)} GB are free there" if output_dir.is_dir() else ""
    remedy = (
        f"the newest complete checkpoint is {complete[-1]}, from which --resume_from_checkpoint last goes on"
        if complete
        else "there is no complete checkpoint yet"
    )
    return f"{target.name} could not be written to {output_dir} ({reason}{room}); {remedy}."


def _gigabytes(folder: Path) -> str:
    return f"{shutil.disk_usage(folder).free / 1e9:,.3f}"


def write_manifest(folder: Path, step: int, entries: Mapping[str, FileEntry] | None = None) -> None:
    """
    Bring every file of a checkpoint to the disk and list it, with size and checksum, in `manifest.json`.

    Args:
        folder: the checkpoint, all its files written.
        step: optimizer steps taken.
        entries: of files that are on the disk already.
    """
    known = dict(entries or {})
    names = {path.relative_to(folder).as_posix(): path for path in _files(folder) if path != folder / MANIFEST}
    rest = {name: path for name, path in names.items() if name not in known}
    with ThreadPoolExecutor() as pool:
        known |= zip(rest, pool.map(synced_entry, rest.values()), strict=True)
    manifest = {"step": step, "dinov3_hf": __version__, "files": {name: known[name] for name in names}}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    _sync(folder / MANIFEST)
    for directory in [*(path for path in folder.rglob("*") if path.is_dir()), folder]:
        _sync(directory)


def problem(folder: Path, checksums: bool = False) -> str | None:
    """
    Why a folder is no complete checkpoint, in a few words; None if it is one.

    Args:
        folder: `checkpoint-N`.
        checksums: read all files and compare their contents too, not their sizes only.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        sizes = {name: entry["bytes"] for name, entry in manifest["files"].items()}
        sums = {name: entry["crc32"] for name, entry in manifest["files"].items()}
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is damaged"
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes instead of {size:,}"
    if checksums:
        with ThreadPoolExecutor() as pool:
            found = pool.map(_crc32, [folder / name for name in sums])
            for name, checksum in zip(sums, found, strict=True):
                if checksum != sums[name]:
                    return f"{name} has other contents than were written"
    return None


def step_of(folder: Path) -> int:
    """The N of `checkpoint-N`."""
    return int(folder.name.removeprefix("checkpoint-"))


def checkpoints(output_dir: Path) -> list[Path]:
    """The folders `checkpoint-N`, complete or not, the oldest first."""
    if not output_dir.is_dir():
        return []
    found = [path for path in output_dir.iterdir() if _CHECKPOINT.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def remove_old_checkpoints(
    output_dir: Path, step: int, keep_last: int | None, keep_every: int | None, keep_step: int | None = None
) -> None:
    """
    Remove what the newest complete checkpoints make superfluous.

    Args:
        output_dir: of the run.
        step: of the newest checkpoint; later ones, of a run that was taken back, stay until they are written again.
        keep_last: number of complete checkpoints to keep; None, 0 or less keeps all.
        keep_every: checkpoints whose step is a multiple are kept in any case.
        keep_step: the checkpoint of this step is kept in any case.
    """
    if keep_last is None or keep_last <= 0:
        return
    folders = [folder for folder in checkpoints(output_dir) if step_of(folder) <= step]
    complete = [folder for folder in folders if problem(folder) is None]
    for folder in folders:
        is_old = step_of(folder) < step_of(complete[-keep_last:][0])
        is_kept = step_of(folder) == keep_step or (keep_every and step_of(folder) % keep_every == 0)
        if is_old and not is_kept:
            try:
                _remove(folder)
            except OSError as error:
                logger.warning("%s could not be removed: %s", folder, error)


def clean_up(output_dir: Path, names: Collection[str] = ("teacher",)) -> None:
    """
    Undo what killed runs left half done: for the first process of a run, before the others look.

    Args:
        output_dir: of the run; what else is in it stays.
        names: of the folders that a run writes there beside its checkpoints.
    """
    if not output_dir.is_dir():
        return
    for path in sorted(output_dir.iterdir()):
        match = _HIDDEN.fullmatch(path.name)
        if match is None or not path.is_dir():
            continue
        if match["name"] not in names and not _CHECKPOINT.fullmatch(match["name"]):
            continue
        target = output_dir / match["name"]
        if match["state"] == "old" and not target.exists():
            path.rename(target)
        else:
            shutil.rmtree(path)


def _put_in_place(staged: Path, target: Path) -> None:
    old = _hidden(target, "old")
    if target.exists():
        target.rename(old)
    staged.rename(target)
    _sync(target.parent)
    if old.exists():
        _remove(old)


def _remove(folder: Path) -> None:
    # Under its own name a half-removed folder could be taken for a checkpoint.
    doomed = _hidden(folder, "deleting")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def _hidden(folder: Path, state: str) -> Path:
    name = folder.name.removeprefix(".").removesuffix(".old")
    return folder.with_name(f".{name}.{state}")


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def synced_entry(path: Path) -> FileEntry:
    """What a manifest says of a file, which is brought to the disk."""
    _sync(path)
    return {"bytes": path.stat().st_size, "crc32": _crc32(path)}


def _crc32(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            checksum = zlib.crc32(chunk, checksum)
    return checksum


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
