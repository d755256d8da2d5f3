"""Runs of the scripts in `training_scripts/` on one process or several, without a wait for their imports."""

import socket
from pathlib import Path
from typing import Any

from dinov3_hf.training.checkpoints import checkpoints, problem, step_of
from tests.forks import Forks
from tests.testing_utils import REPOSITORY

SCRIPTS = REPOSITORY / "training_scripts"


def complete(run: Path) -> list[int]:
    """Steps of the checkpoints that a run can go on from."""
    return [step_of(folder) for folder in checkpoints(run) if problem(folder, checksums=True) is None]


class Runner:
    """Starts runs of one recipe.

    Args:
        folder: for the recipe and what the runs say.
        recipe: text of a recipe page.
    """

    def __init__(self, forks: Forks, folder: Path, recipe: str) -> None:
        self.forks = forks
        self.recipe = folder / "recipe.yaml"
        self.recipe.write_text(recipe)
        self.log = folder / "log"

    def start(self, run: Path, *arguments: object, script: str = "pretrain.py", **options: Any) -> int:
        """The process id of a run that goes on from the newest checkpoint, if there is any.

        Args:
            options: of `Forks.start`.
        """
        resume = ("--resume_from_checkpoint", "last") if complete(run) else ()
        words = (self.recipe, "--output_dir", run, *resume, *arguments)
        log = options.pop("log", self.log)
        return self.forks.start(SCRIPTS / script, *map(str, words), out=log, err=log, **options)

    def wait(self, pid: int) -> int:
        return self.forks.wait(pid)

    def finish(self, run: Path, *arguments: object, **options: Any) -> str:
        """What a run says that comes to its end."""
        status = self.wait(self.start(run, *arguments, **options))
        assert status == 0, self.log.read_text()
        return self.log.read_text()


class Ranks:
    """The processes of one run, one or several, with the status of each; it goes on if it had begun."""

    def __init__(self, runner: Runner, run: Path, num_ranks: int, *arguments: object, script: str = "pretrain.py"):
        self.runner = runner
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        self.logs, self.pids = [], []
        for rank in range(num_ranks):
            places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks}
            rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            environment = {name: str(value) for name, value in places.items()} | rendezvous
            self.logs.append(runner.log.with_name(f"log-{rank}"))
            words = (runner.recipe, "--output_dir", run, "--resume_from_checkpoint", "auto", *arguments)
            pid = runner.forks.start(
                *(SCRIPTS / script, *map(str, words)),
                out=self.logs[-1],
                err=self.logs[-1],
                environment=environment if num_ranks > 1 else {},
            )
            self.pids.append(pid)

    def wait(self) -> list[int]:
        return [self.runner.wait(pid) for pid in self.pids]

    def said(self) -> str:
        return "".join(log.read_text() for log in self.logs)
