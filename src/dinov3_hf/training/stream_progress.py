"""What all ranks have read of streams, kept in a checkpoint, so that a resumed run does not read it again."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FOLDER = "streams"


def save_progress(checkpoint: Path, rank: int, progress: Sequence[dict[str, Any]]) -> None:
    """Write what this rank has read (see `StreamSampler.progress`) beside what the others write."""
    if progress:
        folder = checkpoint / FOLDER
        folder.mkdir(exist_ok=True)
        (folder / f"rank-{rank}.json").write_text(json.dumps(progress), encoding="utf-8")


def load_progress(checkpoint: Path) -> list[dict[str, Any]]:
    """Return what all ranks had read, however many there were."""
    files = sorted((checkpoint / FOLDER).glob("rank-*.json"))
    return [entry for path in files for entry in json.loads(path.read_text(encoding="utf-8"))]
