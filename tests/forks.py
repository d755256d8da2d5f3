"""Programs that are forked from one process which has imported everything (see `fork_runner`)."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.testing_utils import REPOSITORY


def can_mount() -> bool:
    try:
        done = subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True)
    except FileNotFoundError:
        return False
    return done.returncode == 0


CAN_MOUNT = can_mount()
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "160"}


class Forks:
    """
    Args:
        folder: for what the programs say.
        environment: of this process and, unless they are given another, of the programs.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str] = ENVIRONMENT) -> None:
        launcher = ("unshare", "-rm") if CAN_MOUNT else ()  # a name space in which it may mount small disks
        self.folder = folder
        self.process = subprocess.Popen(
            [*launcher, sys.executable, "-m", "tests.fork_runner"],
            cwd=REPOSITORY,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(
        self,
        *python: str | Path,
        out: Path,
        err: Path,
        folder: Path | None = None,
        environment: Mapping[str, str] | None = None,
        file_size: int | None = None,
    ) -> int:
        """Process id of `python ARGUMENTS` (`-c PROGRAM`, `-m MODULE` or a script; no other option of Python).

        Args:
            out, err: files for what it prints; they may be the same.
            folder: to start it in.
            environment: added to that of this process.
            file_size: in bytes, of the largest file that it can write.
        """
        for file in (out, err):
            file.unlink(missing_ok=True)
        request = {
            "python": list(map(str, python)),
            "out": str(out),
            "err": str(err),
            "folder": None if folder is None else str(folder),
            "environment": dict(environment or {}),
            "file_size": file_size,
        }
        return self._ask(request)

    def wait(self, pid: int) -> int:
        """Exit status; negative for a signal."""
        return self._ask({"wait": pid})

    def run(self, *python: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
        """`python ARGUMENTS` and what it printed; see `start` for the options."""
        out, err = self.folder / "out", self.folder / "err"
        status = self.wait(self.start(*python, out=out, err=err, **options))
        return subprocess.CompletedProcess([*map(str, python)], status, out.read_text(), err.read_text())

    def command(self, *words: str | Path) -> int:
        """Exit status of another program, in the name space of this process."""
        return self._ask({"command": list(map(str, words))})

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()

    def _ask(self, request: dict[str, Any]) -> int:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())
