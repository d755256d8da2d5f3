"""What the files of `training_scripts/accelerate` and `training_scripts/launch` start."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.forks import ENVIRONMENT
from tests.scripts.runs import complete
from tests.scripts.test_crashes import RECIPE, STEPS, assert_same_end
from tests.testing_utils import REPOSITORY, require_package, run_python

CONFIGS = REPOSITORY / "training_scripts" / "accelerate"
LAUNCH = REPOSITORY / "training_scripts" / "launch"
BIN = Path(sys.executable).parent
ON_PATH = {**ENVIRONMENT, "PATH": f"{BIN}:{os.environ['PATH']}"}
# One write: the lines of two processes would mix otherwise.
SHOW = """
import json, os
names = ("RANK", "WORLD_SIZE", "CUDA_VISIBLE_DEVICES", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
os.write(1, (json.dumps({name: os.environ[name] for name in names if name in os.environ}) + chr(10)).encode())
"""


def test_cpu_starts_two_processes_without_a_gpu(tmp_path):
    script = tmp_path / "show.py"
    script.write_text(SHOW)
    command = [BIN / "accelerate", "launch", "--config_file", CONFIGS / "cpu.yaml", script]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=120)
    assert done.returncode == 0, done.stderr
    shown = [json.loads(line) for line in done.stdout.splitlines()]
    expected = [{"RANK": rank, "WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": "-1,-1"} for rank in "01"]
    assert sorted(shown, key=lambda environment: environment["RANK"]) == expected


HAND_ON = """
import json, os, subprocess, sys
import torch.distributed.run as torchrun
from accelerate.commands.launch import launch_command, launch_command_parser


class Done:
    returncode = 0

    def __init__(self, command, env):
        print("HANDED ON", json.dumps([1, env]))

    def wait(self):
        pass


torchrun.run = lambda args: print("HANDED ON", json.dumps([int(args.nproc_per_node), dict(os.environ)]))
subprocess.Popen = Done
for file in sys.argv[1:]:
    launch_command(launch_command_parser().parse_args(["--config_file", file, "script.py"]))
"""
ENGINES = {
    "single": {},
    "ddp": {},
    "fsdp2": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"},
    **{
        f"zero{stage}": {
            "ACCELERATE_USE_DEEPSPEED": "true",
            "ACCELERATE_DEEPSPEED_CONFIG_FILE": f"training_scripts/deepspeed/zero{stage}.json",
        }
        for stage in (2, 3)
    },
}


@require_package("deepspeed")
def test_configs_say_how_many_processes_and_which_engine():
    """The environment that `accelerate launch` would hand on, short of starting anything."""
    done = run_python("-c", HAND_ON, *(CONFIGS / f"{name}.yaml" for name in ENGINES), **ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    handed_on = [json.loads(text) for text in re.findall("HANDED ON (.*)", done.stdout)]
    for (name, says), (num_processes, environment) in zip(ENGINES.items(), handed_on, strict=True):
        assert num_processes == (1 if name == "single" else 8), name
        assert says.items() <= environment.items(), name
        engines = {"ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"}
        assert engines & environment.keys() == engines & says.keys(), name
        assert environment["ACCELERATE_MIXED_PRECISION"] == "no", name


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_files_leave_the_recipe_alone(stage):
    config = json.loads((REPOSITORY / "training_scripts" / "deepspeed" / f"zero{stage}.json").read_text())
    assert config.keys() == {"zero_optimization"}
    assert config["zero_optimization"]["stage"] == stage


@pytest.mark.parametrize("script", sorted(LAUNCH.glob("*.sh")), ids=lambda path: path.name)
def test_scripts_can_be_parsed_and_run(script):
    subprocess.run(["bash", "-n", script], check=True)
    assert os.access(script, os.X_OK)


def write_recipe(tmp_path: Path) -> Path:
    recipe = tmp_path / "recipe.yaml"
    # Two processes have 4 images each, less than a group of stochastic depth.
    recipe.write_text(RECIPE.replace("drop_path_rate: 0.2", "drop_path_rate: 0.0"))
    return recipe


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """An uninterrupted run of two processes."""
    folder = tmp_path_factory.mktemp("whole")
    start = ("launch", "--config_file", CONFIGS / "cpu.yaml", REPOSITORY / "training_scripts" / "pretrain.py")
    words = [BIN / "accelerate", *start, write_recipe(folder), "--output_dir", folder / "run"]
    done = subprocess.run(words, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "run"


class Program:
    """A launch script that runs, and what it says."""

    def __init__(self, tmp_path: Path, script: str, *arguments: object, **environment: str):
        self.log = tmp_path / "log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [str(LAUNCH / script), *map(str, arguments)],
                **{"stdout": log, "stderr": log, "env": {**ON_PATH, **environment}, "cwd": REPOSITORY},
            )

    def __enter__(self) -> "Program":
        return self

    def __exit__(self, *error: object) -> None:
        for pid in (self.process.pid, *descendants(self.process.pid)) if self.process.poll() is None else ():
            os.kill(pid, signal.SIGKILL)

    def wait(self) -> int:
        return self.process.wait(timeout=300)

    def wait_for(self, what) -> None:
        deadline = time.monotonic() + 200
        while not what():
            assert time.monotonic() < deadline and self.process.poll() is None, self.log.read_text()
            time.sleep(0.005)


def descendants(pid: int) -> list[int]:
    """Processes below `pid`; some may be gone by now."""
    try:
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return [*children, *(pid for child in children for pid in descendants(child))]


def ranks(pid: int) -> list[int]:
    """The processes below `pid` that train."""
    found = []
    for process in descendants(pid):
        with contextlib.suppress(OSError):
            if any(line.startswith(b"RANK=") for line in Path(f"/proc/{process}/environ").read_bytes().split(b"\0")):
                found.append(process)
    return found


@pytest.mark.slow
def test_torchrun_starts_again_when_a_process_dies(whole, tmp_path):
    run = tmp_path / "run"
    words = ("torchrun.sh", write_recipe(tmp_path), "--output_dir", run)
    with Program(tmp_path, *words, PROCESSES="2") as program:
        program.wait_for(lambda: complete(run))
        first = ranks(program.process.pid)
        os.kill(first[-1], signal.SIGKILL)
        program.wait_for(lambda: len(set(ranks(program.process.pid)) - set(first)) == 2)
        assert STEPS not in complete(run)
        assert program.wait() == 0, program.log.read_text()
    assert_same_end(run, whole)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_torchrun_is_told_to_end(whole, tmp_path, number):
    run = tmp_path / "run"
    words = ("torchrun.sh", write_recipe(tmp_path), "--output_dir", run)
    with Program(tmp_path, *words, PROCESSES="2") as program:
        program.wait_for(lambda: complete(run))
        program.process.send_signal(number)
        assert program.wait() == 75, program.log.read_text()
    assert program.log.read_text().count("Told to end: saved at step") == 1
    assert STEPS not in complete(run)
    with Program(tmp_path, *words, PROCESSES="2") as program:
        assert program.wait() == 0, program.log.read_text()
    assert_same_end(run, whole)


# Two nodes of one task each, as SLURM would start them: each task knows its number only.
SRUN = """#!{python}
import os, signal, subprocess, sys
words = sys.argv[1:]
while words[0].startswith("--"):
    words.pop(0)
tasks = []
for number in range(2):
    variables = {{"SLURM_PROCID": str(number), "SLURM_LOCALID": "0", "SLURM_NTASKS": "2", "SLURM_NODEID": str(number)}}
    tasks.append(subprocess.Popen(words, env={{**os.environ, **variables}}))
statuses = [task.wait() for task in tasks]
sys.exit(max(status if status >= 0 else 128 - status for status in statuses))
"""
SCONTROL = """#!/bin/bash
if [[ "$1" == show ]]; then echo localhost; echo localhost; else echo "$@" >> "$REQUEUED"; fi
"""


@pytest.mark.slow
def test_slurm_job_is_preempted_and_queued_again(whole, tmp_path):
    for name, text in {"srun": SRUN.format(python=sys.executable), "scontrol": SCONTROL}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    run, requeued = tmp_path / "run", tmp_path / "requeued"
    variables = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "node[1-2]", "REQUEUED": str(requeued)}
    variables["PATH"] = f"{tmp_path}:{ON_PATH['PATH']}"
    words = ("slurm.sh", write_recipe(tmp_path), "--output_dir", run)
    with Program(tmp_path, *words, **variables) as job:
        job.wait_for(lambda: complete(run))
        for task in ranks(job.process.pid):  # not srun and not the script
            os.kill(task, signal.SIGUSR1)
        assert job.wait() == 75, job.log.read_text()
    assert requeued.read_text() == f"requeue {variables['SLURM_JOB_ID']}\n"
    assert STEPS not in complete(run)
    requeued.unlink()
    with Program(tmp_path, *words, **variables) as job:
        assert job.wait() == 0, job.log.read_text()
    assert not requeued.exists()
    assert_same_end(run, whole)


def test_bash_scripts_are_clean():
    checker = shutil.which("shellcheck")
    if checker is None:
        pytest.skip("shellcheck is not installed")
    subprocess.run([checker, *LAUNCH.glob("*.sh")], check=True)
