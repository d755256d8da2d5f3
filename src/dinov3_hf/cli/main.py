"""The `dinov3-hf` program: finds the module of the chosen command and imports nothing else."""

import sys
from importlib import import_module
from typing import Annotated

import typer

from dinov3_hf import __version__
from dinov3_hf.cli import errors

# Each module has `register(app)`, which adds its command, or its group of commands, to the program.
COMMANDS = {
    "info": ("dinov3_hf.cli.info", "Versions, devices and their precisions, registered classes, models and recipes."),
    "convert": (
        "dinov3_hf.cli.convert",
        "Convert a DINOv3 backbone between the formats of transformers, of the original and of timm.",
    ),
    "evaluate": ("dinov3_hf.cli.evaluate", "Measure the frozen features of a model."),
    "visualize": (
        "dinov3_hf.cli.visualize",
        "Make a picture of what the features of a model tell apart, or of their course in a run.",
    ),
    "plan": (
        "dinov3_hf.cli.plan",
        "Memory, time, energy and limits of a run on GPUs that you do not have yet; no GPU needed.",
    ),
    "push": ("dinov3_hf.cli.push", "Upload a model to the Hugging Face Hub, with a model card."),
}


def show_version(wanted: bool) -> None:
    if wanted:
        print(f"dinov3-hf {__version__}")
        raise typer.Exit


def program(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    # Taken from anywhere on the command line by `errors.run`; declared here for the help page.
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error; may stand anywhere.")
    ] = False,
) -> None:
    """DINOv3 for the Hugging Face ecosystem: look into a model, measure it, see what it sees.

    MODEL is a folder written by `save_pretrained`, or the name of a repository on the Hugging Face Hub.
    """


def build_app(chosen: str | None) -> typer.Typer:
    """The program with the command `chosen` ready to run and the others present by name and summary only."""
    app = typer.Typer(add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False)
    app.callback()(program)
    for name, (module, summary) in COMMANDS.items():
        if name == chosen:
            import_module(module).register(app)
        else:
            app.command(name, help=summary)(lambda: None)
    return app


def parse_and_run(argv: list[str]) -> None:
    """Run the command line `argv`.

    Raises:
        ArgumentError: if it cannot be parsed.
    """
    arguments = argv or ["--help"]
    # Options before the command are flags, so the first other word is the command.
    chosen = next((argument for argument in arguments if not argument.startswith("-")), None)
    app = build_app(chosen)
    try:
        status = app(arguments, prog_name="dinov3-hf", standalone_mode=False)
    except typer.TyperException as error:
        raise errors.ArgumentError(f"{error.format_message()} (usage: {help_page(app, arguments)})") from error
    if status == 130:  # what typer makes of an interrupt; `errors.run` says what happened
        raise KeyboardInterrupt
    if isinstance(status, int):
        sys.exit(status)


def help_page(app: typer.Typer, argv: list[str]) -> str:
    """What to type for the help page of the command that `argv` begins with: `dinov3-hf evaluate knn --help`."""
    command: object = typer.main.get_command(app)
    path = ["dinov3-hf"]
    for word in argv:
        if not isinstance(command, typer.core.TyperGroup) or word not in command.commands:
            break
        path.append(word)
        command = command.commands[word]
    return " ".join([*path, "--help"])


def main() -> None:
    """Entry point of the console script."""
    errors.run(parse_and_run)
