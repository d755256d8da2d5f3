"""A Python that has imported everything, and forks a child for each program, so that imports are paid once.

Reads one JSON line a request, and answers with one line:

    {"python": [...], "out": file, "err": file, "folder": null, "environment": {...}, "file_size": null}
                            pid of `python ...`: `-c PROGRAM`, `-m MODULE` or a script, with arguments
    {"wait": pid}           its exit status, negative for a signal
    {"command": [...]}      exit status of another program

See `tests.forks`, which asks.
"""

import json
import os
import resource
import runpy
import signal
import subprocess
import sys
import traceback


def main() -> None:
    import_what_programs_import()
    for request in map(json.loads, sys.stdin):
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            answer = os.waitstatus_to_exitcode(status)
        elif "command" in request:
            answer = subprocess.run(request["command"], check=False).returncode
        else:
            answer = os.fork()
            if answer == 0:
                run_in_child(**request)
        sys.stdout.write(f"{answer}\n")
        sys.stdout.flush()


def import_what_programs_import() -> None:
    import sklearn.datasets  # noqa: F401
    import torch
    import transformers

    import dinov3_hf.cli.main
    import dinov3_hf.cli.ssl_run
    import dinov3_hf.hub.push
    import dinov3_hf.training.arguments  # noqa: F401
    from dinov3_hf.models.dinov3_vit import modeling_dinov3_vit  # noqa: F401

    transformers.AutoModel  # noqa: B018  (imports it)
    torch.set_num_threads(1)


def run_in_child(
    python: list[str], out: str, err: str, folder: str | None, environment: dict[str, str], file_size: int | None
) -> None:
    for stream, name in ((0, os.devnull), (1, out), (2, err)):
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
        os.dup2(os.open(name, flags), stream)
    os.environ.update(environment)
    if folder is not None:
        os.chdir(folder)
    if file_size is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # an error of write() instead
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    status = 0
    try:
        run_as_python_does(python)
    except SystemExit as ended:
        status = ended.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def run_as_python_does(words: list[str]) -> None:
    kind, *rest = words
    if kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(rest[0], {"__name__": "__main__"})
    elif kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    main()
