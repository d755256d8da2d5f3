"""`dinov3-hf visualize KIND MODEL IMAGE... -o FILE`: pictures of what patch features tell apart.

What needs torch is imported inside the commands, so that help pages and mistyped options are answered at once.
"""

from pathlib import Path
from typing import Annotated

import typer
from PIL import Image

from dinov3_hf.errors import ArgumentError

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
    """Make a picture of what the features of a model tell apart."""


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
    model: Model,
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
    size: Size = None,
    num_images: NumImages = 20,
    device: Device = None,
) -> None:
    """Cosine similarity of one patch of the first image with all patches of all images."""
    position = None if patch is None else parse_patch(patch)
    check_output(output)
    from dinov3_hf.cli.models import open_model
    from dinov3_hf.cli.pictures import patch_features, read_pictures
    from dinov3_hf.viz.similarity import similarity_figure

    pictures = [picture for source in images for picture in read_pictures(source, num_images)]
    patches = patch_features(*open_model(model, device), pictures, size)
    rows, columns, _ = patches[0].shape
    row, column = position or (rows // 2, columns // 2)
    save(similarity_figure(pictures, patches, row, column), output)
    print(f"patch {row},{column} of {rows} rows and {columns} columns")


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
