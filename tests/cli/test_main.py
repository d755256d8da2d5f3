"""The program as users start it: quick answers, suggestions for typos, one line and a status for every error."""

import json
import sys
from pathlib import Path

import pytest

from dinov3_hf import __version__
from dinov3_hf.cli.main import COMMANDS
from tests.testing_utils import run_cli, run_in_process, run_python

CONSOLE_SCRIPT = str(Path(sys.executable).with_name("dinov3-hf"))
# What takes a second or more to import; a page of text needs none of it.
HEAVY = {"torch", "torchvision", "transformers", "sklearn", "datasets", "accelerate", "scipy"}


@pytest.mark.parametrize(
    "arguments",
    [
        ("-m", "dinov3_hf", "--help"),
        ("-m", "dinov3_hf", "info", "--json"),
        (CONSOLE_SCRIPT, "--help"),
        (CONSOLE_SCRIPT, "info"),
        (CONSOLE_SCRIPT, "evaluate", "knn", "--help"),
        (CONSOLE_SCRIPT, "convert", "--help"),
        (CONSOLE_SCRIPT, "visualize", "pca", "--help"),
        (CONSOLE_SCRIPT, "evaluate", "knn"),
        (CONSOLE_SCRIPT, "visualise"),
    ],
)
def test_pages_and_typos_are_answered_without_torch(arguments):
    done = run_python(*arguments, PYTHONPROFILEIMPORTTIME="1")
    imported = {
        line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")
    }
    assert "dinov3_hf.cli.main" in imported
    assert not imported & HEAVY
    assert not {name for name in imported if name.startswith("dinov3_hf.models") and "modeling" in name}
    assert done.returncode == (2 if arguments[-1] in ("knn", "visualise") else 0)


def test_help_lists_the_commands():
    done = run_cli("--help")
    assert all(
        command in done.stdout and summary.split(",")[0] in done.stdout for command, (_, summary) in COMMANDS.items()
    )
    assert run_cli().stdout == done.stdout
    assert run_cli("--version").stdout == f"dinov3-hf {__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_has_the_same_summary_in_both_places(command, capsys):
    status, page, _ = run_in_process(capsys, command, "--help")
    assert status == 0
    assert COMMANDS[command][1] in " ".join(page.split())


def test_output_can_be_cut_short():
    done = run_python(
        "-c", f"import subprocess; subprocess.run('{sys.executable} -m dinov3_hf info | head -1', shell=True)"
    )
    assert done.stdout.strip() == "Versions"
    assert "error" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["evalute", "knn"], "No such command 'evalute'. Did you mean 'evaluate'? (usage: dinov3-hf --help)"),
        (["evaluate", "kn"], "No such command 'kn'. Did you mean 'knn'? (usage: dinov3-hf evaluate --help)"),
        (["evaluate"], "Missing command. (usage: dinov3-hf evaluate --help)"),
        (["evaluate", "knn"], "Missing argument 'MODEL'. (usage: dinov3-hf evaluate knn --help)"),
        (["evaluate", "knn", "m"], "Missing option '--data'. (usage: dinov3-hf evaluate knn --help)"),
        (["visualize", "pac", "m"], "No such command 'pac'. Did you mean 'pca'? (usage: dinov3-hf visualize --help)"),
        (["info", "--jsn"], "No such option: --jsn (Possible options: --json) (usage: dinov3-hf info --help)"),
        (["info", "now"], "unexpected extra argument"),
        (["--vrsion"], "--version"),
        (["evaluate", "knn", "m", "--data", "digits", "--k", "0"], "Invalid value for '--k'"),
        (["evaluate", "knn", "m", "--data", "digits", "--k", "two"], "Invalid value for '--k'"),
        (["evaluate", "knn", "m", "--data", "digits", "--k", "5", "10"], "unexpected extra argument"),
        (["evaluate", "knn", "m", "--data", "digits", "--size", "0"], "Invalid value for '--size'"),
        (
            ["evaluate", "knn", "m", "--data", "digits", "--device", "gpu"],
            "device 'gpu' is none that torch knows; use cpu",
        ),
        (["visualize", "pca", "m", "photo.jpg"], "Missing option '--output' / '-o'."),
        (
            ["visualize", "pca", "m", "photo.jpg", "-o", "a.txt"],
            "a.txt does not end in the suffix of an image format; use",
        ),
        (["visualize", "pca", "m", "photo.jpg", "-o", "a.psd"], "a.psd does not end"),
        (
            ["visualize", "similarity", "m", "a.jpg", "-o", "a.png", "--patch", "3"],
            "--patch 3 is not a row and a column",
        ),
        (["visualize", "similarity", "m", "a.jpg", "-o", "a.png", "--patch", "a,b"], "give for example --patch 3,5"),
    ],
)
def test_arguments_that_cannot_be_parsed(arguments, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, printed, error = run_in_process(capsys, *arguments)
    assert status == 2
    assert printed == ""
    assert error.startswith("error: ") and error.count("\n") == 1
    assert says in error


def test_debug_shows_the_traceback():
    arguments = ("visualize", "pca", "m", "photo.jpg", "-o", "a.txt")
    assert "Traceback" not in run_cli(*arguments).stderr
    debugged = run_cli(*arguments, "--debug")
    assert debugged.returncode != 0
    assert "Traceback" in debugged.stderr and "ArgumentError: a.txt does not end" in debugged.stderr


def test_json_is_all_that_info_prints():
    facts = json.loads(run_cli("info", "--json").stdout)
    assert set(facts) == {"versions", "devices", "registered", "models", "recipes"}
