"""`dinov3-hf visualize KIND MODEL IMAGE... -o FILE`: pictures of what patch features tell apart, and of their course.

What needs torch is imported inside the commands, so that help pages and mistyped options are answered at once.
"""

import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from PIL import Image

from dinov3_hf.errors import ArgumentError

if TYPE_CHECKING:
    from dinov3_hf.cli.runs import Curves

kinds = typer.Typer(rich_markup_mode="markdown")

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Model folder or Hub repository.")]
Images = Annotated[
    list[str], typer.Argument(metavar="IMAGE...", help="Image files, folders of images, or whatever `--data` takes.")
]
Output = Annotated[Path, typer.Option("--output", "-o", help="Image file to write; its suffix gives the format.")]
Size = Annotated[
    int | None,
    typer.Option(
        "--size", min=1, help="Short side of the input in pixels; three times the image processor's if not given."
    ),
]
NumImages = Annotated[int, typer.Option("--num_images", min=1, help="At most so many of a folder.")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, mps; a GPU if there is one.")]


def register(app: typer.Typer) -> None:
    app.add_typer(kinds, name="visualize")


@kinds.callback()
def visualize() -> None:
    """Make a picture of what the features of a model tell apart, or of their course in a run."""


@kinds.command()
def pca(
    model: Model, images: Images, output: Output, size: Size = None, num_images: NumImages = 20, device: Device = None
) -> None:
    """Principal components of the patch features as colours, under each image.

    Equal colours are equal features, across all images of the sheet: the components are fitted to all of them at once.
    """
    check_output(output)
    from dinov3_hf.cli.models import open_model
    from dinov3_hf.cli.pictures import patch_features, read_pictures
    from dinov3_hf.viz.pca import pca_figure

    pictures = [picture for source in images for picture in read_pictures(source, num_images)]
    patches = patch_features(*open_model(model, device), pictures, size)
    save(pca_figure(pictures, patches), output)


@kinds.command()
def similarity(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="Model folder, Hub repository, or output folder of a run with checkpoints."
        ),
    ],
    images: Images,
    output: Output,
    patch: Annotated[
        str | None,
        typer.Option(
            "--patch",
            metavar="ROW,COL",
            help="Patch to compare with, from 0,0 at the top left; the middle one if not given.",
        ),
    ] = None,
    models: Annotated[
        list[str] | None,
        typer.Option("--models", metavar="MODEL", help="A further model, or run, to compare with; may be repeated."),
    ] = None,
    max_panels: Annotated[
        int, typer.Option("--max_panels", min=1, help="Checkpoints of a run to show at most, spread evenly over it.")
    ] = 8,
    size: Size = None,
    num_images: NumImages = 20,
    device: Device = None,
) -> None:
    """Cosine similarity of one patch of the first image with all patches of all images.

    Of a run, and of several models, there is a panel each, on one scale, with the health of these images below.
    """
    position = None if patch is None else parse_patch(patch)
    check_output(output)
    from dinov3_hf.cli.models import open_model
    from dinov3_hf.cli.pictures import patch_features, read_pictures
    from dinov3_hf.cli.runs import is_run
    from dinov3_hf.cli.series import similarity_series
    from dinov3_hf.viz.series import series_figure
    from dinov3_hf.viz.similarity import similarity_figure

    if models or is_run(model):
        pictures = [picture for source in images for picture in read_pictures(source, num_images)]
        series, left_out = similarity_series([model, *(models or [])], pictures, position, size, max_panels, device)
        save(series_figure(pictures, series), output)
        show_patch(*series[0].panels[0].patch, *series[0].panels[0].maps[0].shape)
        for line in series:
            for panel in line.panels:
                print("  ".join((*([line.name] if len(series) > 1 else []), panel.label, *panel.notes)))
        for message in left_out:
            print(message, file=sys.stderr)
        return
    pictures = [picture for source in images for picture in read_pictures(source, num_images)]
    patches = patch_features(*open_model(model, device), pictures, size)
    rows, columns, _ = patches[0].shape
    row, column = position or (rows // 2, columns // 2)
    save(similarity_figure(pictures, patches, row, column), output)
    show_patch(row, column, rows, columns)


@kinds.command()
def health(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...",
            help="Output folders of runs, finished or not. NAME=FOLDER gives one a name; runs of the same name become "
            "one line, their mean, with the range around it.",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Picture to write, or a table if it ends in .csv."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")] = False,
) -> None:
    """Curves of what was measured on the teacher during training: health of dense features, kNN, drift."""
    if output is None and not as_json:
        raise ArgumentError("there is nothing to write; give -o curve.png, or --json.")
    from dinov3_hf.cli.runs import read_curves
    from dinov3_hf.training.evaluation import LABELS
    from dinov3_hf.viz.curves import curves_figure

    labels = {
        metric: f"{label} (%)" if "%" in template else label
        for metric, (label, template) in LABELS.items()
        if metric != "eval_knn_top5"  # tells what the first does
    }
    curves = read_curves(runs, list(labels))
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        if output.suffix.lower() == ".csv":
            write_table(curves, output)
        else:
            figure = curves_figure({line.name: line.numbers for line in curves}, labels)
            known = figure.canvas.get_supported_filetypes()
            if output.suffix.lower().removeprefix(".") not in known:
                raise ArgumentError(f"{output} does not end in the suffix of a picture that can be written; use .png.")
            figure.savefig(output)
    if as_json:
        print(json.dumps(as_facts(curves), indent=2))
    else:
        print(output)


def as_facts(curves: Sequence["Curves"]) -> list[dict[str, Any]]:
    """The curves as `--json` prints them."""
    return [
        {
            "name": line.name,
            "runs": [str(folder) for folder in line.folders],
            "metrics": {
                metric: {"steps": steps.tolist(), "values": values.tolist()}
                for metric, (steps, values) in line.numbers.items()
            },
        }
        for line in curves
    ]


def write_table(curves: Sequence["Curves"], output: Path) -> None:
    """A row for each number: name and folder of the run, metric, step, value."""
    with output.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(("name", "run", "metric", "step", "value"))
        for line in curves:
            for metric, (steps, values) in line.numbers.items():
                for folder, course in zip(line.folders, values.tolist(), strict=True):
                    table.writerows((line.name, folder, metric, *pair) for pair in zip(steps, course, strict=True))


def parse_patch(text: str) -> tuple[int, int]:
    """Row and column of "ROW,COL".

    Raises:
        ArgumentError: if it is not two whole numbers.
    """
    parts = text.split(",")
    if len(parts) != 2 or not all(part.strip().isdecimal() for part in parts):
        raise ArgumentError(f"--patch {text} is not a row and a column; give for example --patch 3,5.")
    row, column = (int(part) for part in parts)
    return row, column


def show_patch(row: int, column: int, rows: int, columns: int) -> None:
    print(f"patch {row},{column} of {rows} rows and {columns} columns")


def check_output(output: Path) -> None:
    """Refuse a file that could not be written before the work is done rather than after.

    Raises:
        ArgumentError: if the suffix is of no image format that can be written.
    """
    if Image.registered_extensions().get(output.suffix.lower()) not in Image.SAVE:
        raise ArgumentError(f"{output} does not end in the suffix of an image format; use for example .png.")
    output.parent.mkdir(parents=True, exist_ok=True)


def save(figure: Image.Image, output: Path) -> None:
    figure.save(output)
    print(f"{output} ({figure.width} x {figure.height} pixels)")
