"""A user of the Hub on localhost: `dinov3-hf` and Python programs with `HF_ENDPOINT` set."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.hub.server import Hub
from tests.testing_utils import REPOSITORY

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
    """See `hub_process`."""

    process: subprocess.Popen[str]
    log: Path

    def push(self, *arguments: str | Path, folder: Path | None = None, **env: str) -> tuple[int, str, str]:
        """Exit status, output and error output of `dinov3-hf push ARGUMENTS`, run in `folder`."""
        return self.wait(self.start(*arguments, folder=folder, **env))

    def start(self, *arguments: str | Path, folder: Path | None = None, **env: str) -> int:
        """Pid of `dinov3-hf push ARGUMENTS`."""
        return self._start(folder, env, arguments=["push", *map(str, arguments)])

    def run(self, program: str, folder: Path | None = None) -> tuple[int, str, str]:
        """Exit status, output and error output of a Python program."""
        return self.wait(self._start(folder, {}, program=program))

    def python(self, program: str, folder: Path | None = None) -> str:
        """What a program prints that succeeds."""
        status, printed, error = self.run(program, folder)
        assert status == 0, error
        return printed

    def wait(self, pid: int) -> tuple[int, str, str]:
        status = self._ask({"wait": pid})
        return status, *(self.log.with_suffix(suffix).read_text() for suffix in (".out", ".err"))

    def _start(self, folder: Path | None, env: dict[str, str], **what: Any) -> int:
        where = None if folder is None else str(folder)
        return self._ask({"log": str(self.log), "env": TOKEN | env, "folder": where, **what})

    def _ask(self, request: dict[str, Any]) -> int:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())


@contextlib.contextmanager
def running_client(hub: Hub, folder: Path) -> Iterator[Client]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.hub.hub_process"],
        cwd=REPOSITORY,
        env=environment(hub, folder / "home"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield Client(process, folder / "log")
    finally:
        process.kill()
        process.wait()
