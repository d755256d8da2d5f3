"""`dinov3-hf push`: a model folder becomes a repository of the Hub."""

import contextlib
import dataclasses
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from dinov3_hf.hub.push import Pushed


def register(app: typer.Typer) -> None:
    app.command("push")(push)


def push(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Model folder, or the output folder of a run (its `teacher/`).")
    ],
    repository: Annotated[
        str, typer.Argument(metavar="REPO", help="OWNER/NAME, or NAME for your own; created if it does not exist.")
    ],
    private: Annotated[bool, typer.Option("--private", help="Of a new repository: only you can see it.")] = False,
    license: Annotated[
        str | None,
        typer.Option(
            "--license",
            metavar="ID",
            help="Licence for the model card: an identifier of the Hub such as apache-2.0, or `dinov3-license` for "
            "what derives from the released weights.",
        ),
    ] = None,
    revision: Annotated[
        str | None, typer.Option("--revision", metavar="BRANCH", help="Branch; created if it does not exist.")
    ] = None,
    message: Annotated[str | None, typer.Option("--message", help="Of the commit.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")] = False,
) -> None:
    """Upload a model to the Hugging Face Hub, with a model card.

    The model is checked first; pickles and training state stay here. After a failure, the same command goes on.
    """
    import dinov3_hf.auto  # noqa: F401  (registers our model types, which are opened to be checked)
    from dinov3_hf.hub.push import PushError, push_folder

    try:
        with ending_at_once():
            pushed = push_folder(
                folder, repository, private=private or None, license=license, revision=revision, message=message
            )
    except PushError:
        print(file=sys.stderr)  # a progress bar may stand in the line
        raise
    if as_json:
        print(json.dumps({**dataclasses.asdict(pushed), "folder": str(pushed.folder)}, indent=2))
    else:
        show(pushed)


@contextlib.contextmanager
def ending_at_once() -> Iterator[None]:
    """Ctrl-C ends the process there and then: `huggingface_hub` would first send the files under way to their end."""

    from huggingface_hub.utils import tqdm

    def end(*_: object) -> None:
        with tqdm.get_lock():  # the threads that upload would draw their bars behind the last word
            print("\ninterrupted; the same command goes on", file=sys.stderr, flush=True)
            os._exit(130)

    before = signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def show(pushed: "Pushed") -> None:
    if pushed.left_out:
        print(f"left out: {', '.join(pushed.left_out)}", file=sys.stderr)
    if "preprocessor_config.json" not in pushed.files:
        print(
            "no preprocessor_config.json says how images are prepared; save the image processor beside the model",
            file=sys.stderr,
        )
    if pushed.kept_card:
        print("the model card on the Hub has been edited; it was left alone", file=sys.stderr)
    elif not pushed.has_license:
        print("the model card states no licence; --license ID states one", file=sys.stderr)
    options = f', revision="{pushed.revision}"' if pushed.revision != "main" else ""
    options += ", trust_remote_code=True" if pushed.has_code else ""
    print(f"{pushed.folder} is at {pushed.url}")
    print("Load it with")
    print("    from transformers import AutoModel")
    print(f'    model = AutoModel.from_pretrained("{pushed.repository}"{options})')
