"""Runs `dinov3-hf` and Python programs against a Hub in forked children, so that imports are paid once.

`huggingface_hub` reads `HF_ENDPOINT` when it is imported, so this process is started with it. Reads one JSON line a
request, and answers with one line:

    {"arguments": [...], "log": file, "env": {...}, "folder": where or null}   pid of `dinov3-hf ARGUMENTS`
    {"program": source, ... the same}                                          pid of a Python program
    {"wait": pid}                                                              its exit status, negative for a signal
"""

import json
import os
import sys

import torch
import transformers

import dinov3_hf.hub.push
import dinov3_hf.training.ssl_trainer
from dinov3_hf.cli.errors import run
from dinov3_hf.cli.main import parse_and_run
from dinov3_hf.models.dinov3_vit import modeling_dinov3_vit

WARM = (dinov3_hf.hub.push, dinov3_hf.training.ssl_trainer, modeling_dinov3_vit, transformers.AutoModel)


def main() -> None:
    torch.set_num_threads(1)
    for request in map(json.loads, sys.stdin):
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            answer = os.waitstatus_to_exitcode(status)
        else:
            answer = os.fork()
            if answer == 0:
                run_in_child(**request)
        sys.stdout.write(f"{answer}\n")
        sys.stdout.flush()


def run_in_child(
    log: str, env: dict[str, str], folder: str | None, arguments: list[str] | None = None, program: str = ""
) -> None:
    for stream, name in ((1, log + ".out"), (2, log + ".err")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    os.environ.update(env)
    if folder is not None:
        os.chdir(folder)
    status = 0
    try:
        if arguments is None:
            run(lambda _: exec(program, {"__name__": "__main__"}), [])
        else:
            run(parse_and_run, arguments)
    except SystemExit as ended:
        status = ended.code or 0
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
