"""A user of the Hub on localhost: `dinov3-hf` and Python programs with `HF_ENDPOINT` set."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.forks import Forks
from tests.hub.server import Hub

TOKEN = {"HF_TOKEN": "hf_good"}


def environment(hub: Hub, home: Path) -> dict[str, str]:
    """For a process that takes `hub` for the Hub, and knows no user."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING_FACE"))}
    return inherited | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "TRANSFORMERS_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "COLUMNS": "160",
    }


@dataclass
class Client:
    forks: Forks

    def push(self, *arguments: str | Path, folder: Path | None = None, **env: str) -> tuple[int, str, str]:
        """Exit status, output and error output of `dinov3-hf push ARGUMENTS`, run in `folder`."""
        return self.wait(self.start(*arguments, folder=folder, **env))

    def start(self, *arguments: str | Path, folder: Path | None = None, **env: str) -> int:
        """Pid of `dinov3-hf push ARGUMENTS`."""
        return self._start("-m", "dinov3_hf", "push", *arguments, folder=folder, env=env)

    def run(self, program: str, folder: Path | None = None) -> tuple[int, str, str]:
        """Exit status, output and error output of a Python program."""
        return self.wait(self._start("-c", program, folder=folder, env={}))

    def python(self, program: str, folder: Path | None = None) -> str:
        """What a program prints that succeeds."""
        status, printed, error = self.run(program, folder)
        assert status == 0, error
        return printed

    def wait(self, pid: int) -> tuple[int, str, str]:
        status = self.forks.wait(pid)
        return status, *(file.read_text() for file in self._files())

    def _start(self, *python: str | Path, folder: Path | None, env: dict[str, str]) -> int:
        out, err = self._files()
        return self.forks.start(*python, out=out, err=err, folder=folder, environment=TOKEN | env)

    def _files(self) -> tuple[Path, Path]:
        return self.forks.folder / "out", self.forks.folder / "err"


@contextlib.contextmanager
def running_client(hub: Hub, folder: Path) -> Iterator[Client]:
    forks = Forks(folder, environment(hub, folder / "home"))  # huggingface_hub reads HF_ENDPOINT when it is imported
    try:
        yield Client(forks)
    finally:
        forks.close()
