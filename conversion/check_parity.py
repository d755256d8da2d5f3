"""Prove that forms of a network compute the same: run them on an image and compare the outputs of every layer.

    python conversion/check_parity.py dinov3_vits16.pth
    python conversion/check_parity.py dinov3_vits16.pth converted/
    python conversion/check_parity.py converted/ timm/ --image photo.jpg --size 224 --size 512x384
    python conversion/check_parity.py --preset vitb16 --size 1024

SRC is a file of the original, a folder of the Hub or a folder of timm. Alone, it is converted to every format in a
temporary folder; with one or more OTHER, these are compared as they are. transformers runs folders of the Hub, timm
those of timm, dinov3_hf files of the original; the reference is SRC, run by dinov3_hf. With `--preset`, SRC is a
file of the original with random weights. The exit status is 1 if a difference exceeds the tolerance.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dinov3_hf.cli.errors import run
from dinov3_hf.errors import ArgumentError

if TYPE_CHECKING:
    from dinov3_hf.convert.parity import Report


class Precision(StrEnum):
    float32 = "float32"
    float64 = "float64"


def check_parity(
    source: Annotated[Path | None, typer.Argument(metavar="SRC", help="File or folder.")] = None,
    others: Annotated[list[Path] | None, typer.Argument(metavar="OTHER", help="Files or folders.")] = None,
    image: Annotated[Path | None, typer.Option(help="Image file; a photo of scikit-learn if not given.")] = None,
    size: Annotated[
        list[str] | None, typer.Option(help="Input in pixels: 224, or 512x384 (height x width). Repeatable.")
    ] = None,
    tolerance: Annotated[float, typer.Option(help="Largest difference, relative to a layer's largest output.")] = 1e-5,
    dtype: Annotated[Precision, typer.Option(help="float64 tells rounding from wrong weights.")] = Precision.float32,
    arch: Annotated[str | None, typer.Option(help="Preset that SRC is of; read from SRC if not given.")] = None,
    branch: Annotated[str | None, typer.Option(help="Network of a training checkpoint: teacher, student ...")] = None,
    preset: Annotated[str | None, typer.Option(help="Make SRC: this preset with random weights.")] = None,
    seed: Annotated[int, typer.Option(help="Of --preset.")] = 0,
    zero_qkv_bias: Annotated[
        bool, typer.Option("--zero_qkv_bias", help="Of --preset: no bias of q and v, as released.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print all differences as JSON.")] = False,
) -> None:
    """Prove that forms of a network compute the same, layer by layer."""
    if (source is None) == (preset is None):
        raise ArgumentError("give either SRC or --preset; see check_parity.py --help.")
    sides = [parse_size(text) for text in size or ["224"]]

    import torch
    from PIL import Image
    from transformers.utils import logging

    from dinov3_hf.convert import parity
    from dinov3_hf.convert.checkpoint import read_checkpoint
    from dinov3_hf.convert.random_weights import random_checkpoint
    from dinov3_hf.convert.writing import write_checkpoint

    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="parity-") as temporary:
        if preset is not None:
            source = Path(temporary, f"{preset}_seed{seed}.pth")
            write_checkpoint(random_checkpoint(preset, seed, zero_qkv_bias), source, "native")
        assert source is not None
        checkpoint = read_checkpoint(source, arch, branch)
        photo, name = parity.default_image() if image is None else (Image.open(image), str(image))
        for each in sides:
            parity.check_size(checkpoint, each)
        channels = checkpoint.config.num_channels
        images = {f"{side[0]}x{side[1]}": parity.read_pixels(photo, side, channels) for side in sides}
        if others:
            candidates = (parity.candidate_of(other) for other in others)
        else:
            candidates = parity.converted_candidates(checkpoint, Path(temporary))
        report = parity.check_parity(checkpoint, candidates, images, getattr(torch, dtype))

    passed = not report.exceeding(tolerance)
    if as_json:
        print(json.dumps({"image": name, "tolerance": tolerance, "passed": passed, **asdict(report)}, indent=2))
    else:
        print(f"{report.reference}\n  on {name}, in {dtype}")
        print("".join(f"  note: {line}\n" for line in checkpoint.differences), end="")
        show(report, tolerance)
    if not passed:
        sys.exit(1)


def show(report: Report, tolerance: float) -> None:
    """For each input a table: the largest difference of each layer, and relative to its largest output."""
    for name, candidates in report.layers.items():
        numbers = range(1, len(candidates) + 1)
        print(f"\n{name} pixels\n{'layer':<10} {'largest':>9}", *(f"  [{n}] absolute relative" for n in numbers))
        for rows in zip(*candidates.values(), strict=True):
            cells = (f"{row.absolute:>14.1e} {row.relative:>8.1e}" for row in rows)
            print(f"{rows[0].layer:<10} {rows[0].largest:>9.3g}", *cells)
        for number, (candidate, layers) in enumerate(candidates.items(), start=1):
            worst = max(layers, key=lambda layer: layer.relative)
            verdict = "PASS" if all(layer.relative <= tolerance for layer in layers) else "FAIL"
            print(f"{verdict} [{number}] {candidate}: {worst.relative:.1e} in {worst.layer} (at most {tolerance:g})")
    for skipped in report.skipped:
        print(f"not compared: {skipped.name}: {skipped.reason}")


def parse_size(text: str) -> tuple[int, int]:
    """
    Height and width of "224" or "512x384".

    Raises:
        ArgumentError: It is neither.
    """
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if match is None:
        raise ArgumentError(f"--size {text} is no size; give for example 224 or 512x384 (height x width).")
    return int(match[1]), int(match[2] or match[1])


def main(argv: list[str]) -> None:
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(check_parity)
    try:
        app(argv, prog_name="check_parity.py", standalone_mode=False)
    except typer.TyperException as error:
        raise ArgumentError(f"{error.format_message()} (usage: check_parity.py --help)") from error


if __name__ == "__main__":
    run(main)
