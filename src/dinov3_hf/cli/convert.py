"""`dinov3-hf convert SRC DST --to FORMAT`: a backbone from one file format to another, every tensor accounted for.

What needs torch is imported inside the command, so that help pages and mistyped options are answered at once.
"""

import json
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from dinov3_hf.errors import ArgumentError

if TYPE_CHECKING:
    from dinov3_hf.convert.checkpoint import Checkpoint
    from dinov3_hf.convert.writing import Written

TERMINATED = 143  # as shells report a process that SIGTERM ended
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


class Format(StrEnum):
    hf = "hf"
    native = "native"
    timm = "timm"


def register(app: typer.Typer) -> None:
    app.command()(convert)


def convert(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="A .pth, .pt or .safetensors file, or a folder with a config.json.")
    ],
    target: Annotated[
        Path, typer.Argument(metavar="DST", help="New: a folder for hf and timm, a .pth file for native.")
    ],
    to: Annotated[
        Format, typer.Option("--to", help="hf (transformers, the Hub), native (the original's .pth), or timm.")
    ],
    arch: Annotated[
        str | None,
        typer.Option("--arch", help="Preset that SRC is of (`dinov3-hf info`); read from SRC if not given."),
    ] = None,
    branch: Annotated[
        str | None,
        typer.Option("--branch", help="Network of a training checkpoint: teacher, student, model_ema, gram_teacher."),
    ] = None,
    max_shard_size: Annotated[
        str, typer.Option("--max_shard_size", help="Largest safetensors file, for example 5GB or 500MB.")
    ] = "5GB",
    as_json: Annotated[bool, typer.Option("--json", help="Print the account as JSON.")] = False,
) -> None:
    """Convert a DINOv3 backbone between the formats of transformers, of the original and of timm.

    The format and the architecture of SRC are recognised. Every tensor is kept, derived, or dropped for a reason that
    is printed; values go over bit by bit. DST appears when it is complete, or not at all.
    """
    shard_size = parse_size(max_shard_size)
    from dinov3_hf.convert.checkpoint import read_checkpoint
    from dinov3_hf.convert.writing import check_target, write_checkpoint

    check_target(target, to)
    with exit_on_termination():
        start = time.perf_counter()
        checkpoint = read_checkpoint(source, arch, branch)
        num_bytes = sum(tensor.num_bytes for tensor in checkpoint.tensors.values())
        columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        console = Console(stderr=True)
        with Progress(*columns, console=console, transient=True, disable=as_json or not console.is_terminal) as bar:
            task = bar.add_task("", total=num_bytes)
            written = write_checkpoint(
                checkpoint, target, to, shard_size, progress=lambda done: bar.advance(task, done)
            )
    facts = account(checkpoint, written) | {
        "target": str(target),
        "to": str(to),
        "seconds": round(time.perf_counter() - start, 3),
    }
    print(json.dumps(facts, indent=2) if as_json else "\n".join(lines_of(facts)))


def account(checkpoint: "Checkpoint", written: "Written") -> dict[str, Any]:
    """What became of every tensor."""
    # What the middle of the way does not hold, a mask of key biases for example, is no loss if the end has it again.
    lost = {name: reason for name, reason in checkpoint.dropped.items() if name not in written.derived}
    derived = {name: reason for name, reason in written.derived.items() if name not in checkpoint.dropped}
    passing = checkpoint.derived.keys() & written.dropped.keys()  # and what only the middle has is in neither
    derived |= {name: reason for name, reason in checkpoint.derived.items() if name not in passing}
    lost |= {name: reason for name, reason in written.dropped.items() if name not in passing}
    return {
        "source": str(checkpoint.source),
        "format": checkpoint.format,
        "model_type": checkpoint.config.to_dict()["model_type"],
        "branch": checkpoint.branch,
        "architecture": written.architecture or checkpoint.architecture,
        "parameters": checkpoint.num_parameters,
        "dtype": str(checkpoint.dtype).removeprefix("torch."),
        "source_tensors": checkpoint.num_source_tensors,
        "written_tensors": written.num_tensors,
        "written_bytes": written.num_bytes,
        "derived": derived,
        "dropped": lost,
        "differences": [*checkpoint.differences, *written.differences],
    }


def lines_of(facts: Mapping[str, Any]) -> Iterator[str]:
    """The account for people: tensors that differ in their numbers only are one line."""
    branch = f", branch {facts['branch']}" if facts["branch"] else ""
    yield (
        f"{facts['source']}: {facts['format']}{branch}, {facts['architecture'] or 'no released architecture'}, "
        f"{facts['parameters'] / 1e6:,.1f} M parameters in {facts['dtype']}, {facts['source_tensors']} tensors"
    )
    for what in ("dropped", "derived"):
        for (pattern, reason), count in grouped(facts[what]).items():
            yield f"  {what} {f'{count} x ' if count > 1 else ''}{pattern}: {reason}"
    for difference in facts["differences"]:
        yield f"  note: {difference}"
    yield (
        f"{facts['target']}: {facts['to']}, {facts['written_tensors']} tensors, "
        f"{facts['written_bytes'] / 1e6:,.1f} MB, {facts['seconds']:.1f} s"
    )


def grouped(reasons: Mapping[str, str]) -> Counter[tuple[str, str]]:
    """(name with `*` for numbers, reason) -> how many names."""
    return Counter((re.sub(r"(?<=\.)\d+(?=\.)", "*", name), reason) for name, reason in reasons.items())


def parse_size(text: str) -> int:
    """
    Bytes of "5GB", "500MB", "1000000".

    Raises:
        ArgumentError: It is no size.
    """
    match = re.fullmatch(r"(\d{1,15}(?:\.\d+)?) *([KMG]?B|)", text.strip().upper())
    size = 0 if match is None else int(float(match[1]) * _UNITS[match[2]])
    if size < 1:
        raise ArgumentError(f"--max_shard_size {text} is not a size; give for example 5GB.")
    return size


@contextmanager
def exit_on_termination() -> Iterator[None]:
    """Inside, SIGTERM raises `SystemExit`, so that what is half written is removed."""

    def end(number: int, frame: FrameType | None) -> None:
        print("terminated", file=sys.stderr)
        sys.exit(TERMINATED)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
