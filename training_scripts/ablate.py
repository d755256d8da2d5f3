"""Take parts of a recipe off, one at a time and over several seeds, and see what each is worth.

    python training_scripts/ablate.py training_scripts/ablations/digits.yaml
    python training_scripts/ablate.py my_plan.yaml --jobs 2 --seeds "[0, 1, 2, 3]" --max_steps 2000

A plan is a YAML file: `recipe`, `output_dir`, `seeds`, `base` (changes common to all runs) and `variants` (name ->
changes to the base). `--seeds` and `--output_dir` change the plan, `--jobs` is the number of runs at a time, every
other `--field value` goes to all runs. The table is in OUTPUT_DIR/table.md and table.json. Started again, the same
command keeps the runs that are finished.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING

from dinov3_hf.cli.errors import run as run_program

if TYPE_CHECKING:
    from dinov3_hf.training.ablation import Plan, Run, Scores

TRAINING_SCRIPT = Path(__file__).with_name("pretrain.py")


def main(argv: list[str]) -> None:
    if not argv or {"-h", "--help"} & set(argv):
        print(__doc__)
        return

    from dinov3_hf.errors import ArgumentError
    from dinov3_hf.training.ablation import kept_scores, read_plan
    from dinov3_hf.training.arguments import split_words

    path, overrides = split_words(argv)
    if path is None:
        raise ArgumentError(
            "ablate.py needs a plan; give a YAML file, such as training_scripts/ablations/digits.yaml."
        )
    changes = {".".join(override.path): override.text for override in overrides}
    jobs = changes.pop("jobs", "1")
    if not jobs.isdecimal() or int(jobs) < 1:
        raise ArgumentError(f"--jobs {jobs} is no number of runs; use 1 or more.")
    plan = read_plan(path, changes)

    scores: dict[str, dict[int, Scores]] = {name: {} for name in plan.variants}
    missing = []
    for run in plan.runs():
        score = kept_scores(run)
        if score is None:
            missing.append(run)
        else:
            scores[run.variant][run.seed] = score
    print(f"{len(plan.runs())} runs, {len(missing)} to do")

    failures = []
    begin = time.monotonic()
    for number, (run, outcome) in enumerate(train_all(missing, int(jobs)), start=1):
        left = (time.monotonic() - begin) / number * (len(missing) - number)
        progress = f"[{number}/{len(missing)}] {run.variant}, seed {run.seed}:"
        if isinstance(outcome, str):
            failures.append(run)
            print(f"{progress} failed, {outcome} ({minutes(left)} left)", flush=True)
        else:
            scores[run.variant][run.seed] = outcome
            print(
                f"{progress} {outcome.untrained:.1f} % -> {outcome.trained:.1f} % ({minutes(left)} left)", flush=True
            )
            write_table(plan, scores)

    if any(scores.values()):
        print(f"\n{write_table(plan, scores)}")
    if failures:
        raise RuntimeError(
            f"{len(failures)} of {len(missing)} runs failed; see {failures[0].folder / 'log.txt'}, then start again."
        )


def write_table(plan: Plan, scores: dict[str, dict[int, Scores]]) -> str:
    """Write what is known so far; return it as people read it."""
    from dinov3_hf.training.ablation import json_table, markdown_table, rows_of

    rows = rows_of(plan, scores)
    table = markdown_table(rows)
    (plan.output_dir / "table.md").write_text(table, encoding="utf-8")
    (plan.output_dir / "table.json").write_text(json.dumps(json_table(plan, rows), indent=2), encoding="utf-8")
    return table


def train_all(runs: list[Run], jobs: int) -> Iterator[tuple[Run, Scores | str]]:
    """Each run as it ends, with its scores or the reason why it has none; `jobs` of them at a time."""
    pool = ThreadPoolExecutor(jobs)
    futures = {pool.submit(train, run): run for run in runs}
    try:
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        pool.shutdown(cancel_futures=True)  # interrupted: begin no other


def train(run: Run) -> Scores | str:
    """One run in a process of its own, so that a crash ends nothing else."""
    from dinov3_hf.training.ablation import keep_scores

    run.folder.mkdir(parents=True, exist_ok=True)
    log = run.folder / "log.txt"
    with log.open("w", encoding="utf-8") as stream:
        command = [sys.executable, str(TRAINING_SCRIPT), *run.words]
        done = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, check=False)
    if done.returncode != 0:
        lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
        return next((line for line in reversed(lines) if line.strip()), f"exit status {done.returncode}")
    try:
        return keep_scores(run)
    except (OSError, ValueError) as error:  # it ended well and too early
        return str(error)


def minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


if __name__ == "__main__":
    run_program(main, sys.argv[1:])
