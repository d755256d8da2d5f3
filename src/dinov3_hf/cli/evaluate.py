"""`dinov3-hf evaluate TASK MODEL --data ...`: measure frozen features.

What needs torch is imported inside the commands, so that help pages and mistyped options are answered at once.
"""

import json
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

# The numbers of neighbours of published kNN results; 20 is usually best.
KS = [10, 20, 100, 200]
MAX_NAMED = 10  # images that could not be read, in a message

tasks = typer.Typer(rich_markup_mode="markdown")


def register(app: typer.Typer) -> None:
    app.add_typer(tasks, name="evaluate")


@tasks.callback()
def evaluate() -> None:
    """Measure the frozen features of a model."""


@tasks.command()
def knn(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model folder or Hub repository.")],
    data: Annotated[
        str,
        typer.Option(
            "--data",
            help="Labelled images: `digits`; a folder with one sub-folder a class, directly (a fifth of them is then "
            "set aside for the test) or under `train/` and `test/` (or `val/`); parquet or tar files with labels; "
            "OWNER/NAME on the Hub; a data recipe.",
        ),
    ],
    leave_one_out: Annotated[
        bool,
        typer.Option(
            "--leave_one_out",
            help="Classify every image by all the others, training and test images together: for small sets.",
        ),
    ] = False,
    k: Annotated[list[int], typer.Option("--k", min=1, help="Neighbours that vote; repeat it for several.")] = KS,
    temperature: Annotated[float, typer.Option("--temperature", help="Of the softmax over similarities.")] = 0.07,
    size: Annotated[
        int | None,
        typer.Option("--size", min=1, help="Side of the input in pixels; the image processor's if not given."),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch_size", min=1, help="Images a forward pass.")] = 64,
    num_workers: Annotated[int, typer.Option("--num_workers", min=0, help="Processes that read images.")] = 0,
    max_unreadable_share: Annotated[
        float,
        typer.Option(
            "--max_unreadable_share",
            min=0,
            max=1,
            help="Share of the images that may be unreadable; they are left out and named.",
        ),
    ] = 0.05,
    bf16: Annotated[bool, typer.Option("--bf16", help="Run the model in bfloat16.")] = False,
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda, mps; a GPU if there is one.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")] = False,
) -> None:
    """Accuracy of a k-nearest-neighbour vote over the CLS features.

    Neighbours by cosine similarity, votes weighted by a softmax at the given temperature. Of photos the centre is used
    (resized to 256, cut to 224, and other sizes in that proportion), of digits the whole.
    """
    from dinov3_hf.cli.models import open_model
    from dinov3_hf.cli.splits import all_labelled, labelled_splits
    from dinov3_hf.evals.features import extract_features, input_size, patch_grid
    from dinov3_hf.evals.knn import knn_accuracies, leave_one_out_accuracies

    network, processor = open_model(model, device)
    side = size or input_size(processor)
    patch_grid(network, side, side)  # refuses a size that does not divide before all the images are listed
    settings: dict[str, Any] = {
        "size": side,
        "batch_size": batch_size,
        "num_workers": num_workers,
        "bf16": bf16,
        "max_unreadable_share": max_unreadable_share,
    }
    parts: dict[str, Any]
    if leave_one_out:
        parts = {"labelled": all_labelled(data, network.config.num_channels, side)}
    else:
        train, test = labelled_splits(data, network.config.num_channels, side)
        parts = {"training": train, "test": test}
    features = [
        extract_features(network, part, processor, part.labels, progress=f"{name} images", **settings)
        for name, part in parts.items()
    ]
    for (name, part), found in zip(parts.items(), features, strict=True):
        if found.unreadable:
            warn_of_unreadable(found.unreadable, len(part), name)
    if leave_one_out:
        accuracies = leave_one_out_accuracies(features[0], k, temperature, network.device)
    else:
        accuracies = knn_accuracies(features[0], features[1], k, temperature, network.device)
    facts = {
        "model": model,
        "data": data,
        "size": side,
        "leave_one_out": leave_one_out,
        "num_train": len(features[0].cls) - leave_one_out,
        "num_test": len(features[-1].cls),
        "num_unreadable": sum(len(found.unreadable) for found in features),
        "num_classes": len(next(iter(parts.values())).class_names),
        "knn": accuracies,
    }
    if as_json:
        print(json.dumps(facts, indent=2))
    else:
        show(facts)


def warn_of_unreadable(messages: Sequence[str], num_images: int, name: str) -> None:
    """Say on the error output which images were left out, at most ten of them by name."""
    print(f"{len(messages)} of {num_images} {name} images were left out:", file=sys.stderr)
    for message in messages[:MAX_NAMED]:
        print(f"  {message}", file=sys.stderr)
    if len(messages) > MAX_NAMED:
        print(f"  and {len(messages) - MAX_NAMED} more", file=sys.stderr)


def show(facts: dict[str, Any]) -> None:
    console = Console()
    plain: dict[str, Any] = {"highlight": False, "markup": False, "soft_wrap": True}
    console.print(f"kNN of {facts['model']} on {facts['data']}", style="bold", **plain)
    table = Table("k", "top 1 %", "top 5 %", box=box.SIMPLE_HEAD)
    for column in table.columns:
        column.justify = "right"
    for k, accuracy in facts["knn"].items():
        # More neighbours than there are training images means all of them.
        table.add_row(
            f"{k} (all)" if k > facts["num_train"] else str(k),
            f"{accuracy['knn_top1']:.2f}",
            f"{accuracy['knn_top5']:.2f}",
        )
    console.print(table)
    images = f"{facts['num_train']} training and {facts['num_test']} test images"
    if facts["leave_one_out"]:
        images = f"{facts['num_test']} images, each by all the others,"
    console.print(
        f"{images} of {facts['num_classes']} classes at {facts['size']} x {facts['size']} pixels",
        **plain,
    )
