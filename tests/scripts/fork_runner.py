"""Runs scripts of `training_scripts/` in forked children, so that their imports are paid once.

Reads one JSON line a request, and answers with one line:

    {"arguments": [...], "log": file, "file_size": bytes or null, "environment": {...}, "script": "pretrain.py"}
                                                                    pid of the run
    {"wait": pid}                                                   its exit status, negative for a signal
    {"command": [...]}                                              exit status of another program
"""

import importlib.util
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(__file__).parents[2] / "training_scripts"


def main() -> None:
    scripts = {name: load(SCRIPTS / name) for name in ("pretrain.py", "gram_anchor.py")}
    import_what_they_import()
    for request in map(json.loads, sys.stdin):
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            answer = os.waitstatus_to_exitcode(status)
        elif "command" in request:
            answer = subprocess.run(request["command"], check=False).returncode
        else:
            answer = os.fork()
            if answer == 0:
                run_in_child(scripts[request.pop("script", "pretrain.py")], **request)
        sys.stdout.write(f"{answer}\n")
        sys.stdout.flush()


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def import_what_they_import() -> None:
    import sklearn.datasets  # noqa: F401
    import torch

    import dinov3_hf.cli.ssl_run
    import dinov3_hf.training.arguments  # noqa: F401

    torch.set_num_threads(1)


def run_in_child(
    script, arguments: list[str], log: str, file_size: int | None = None, environment: dict[str, str] | None = None
) -> None:
    os.environ.update(environment or {})
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    if file_size is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # an error of write() instead
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    status = 0
    try:
        script.run(script.main, arguments)
    except SystemExit as ended:
        status = ended.code
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
