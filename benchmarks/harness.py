"""Paired timings: the candidates take turns in one process, so that what else the machine does hits all of them."""

import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

RESULTS = Path(__file__).with_name("RESULTS.md")


@dataclass(frozen=True)
class PairedTimes:
    """Seconds of each candidate, one value a round."""

    rounds: Mapping[str, list[float]]

    def median(self, name: str) -> float:
        """Median time in seconds."""
        return statistics.median(self.rounds[name])

    def ratio(self, name: str, peer: str) -> float:
        """Median over the rounds of `name`'s time by `peer`'s: what slows one whole round down drops out of it."""
        return statistics.median(self._ratios(name, peer))

    def ratio_text(self, name: str, peer: str) -> str:
        """The ratio, and in brackets the quartiles between which half of the rounds lie."""
        low, _, high = statistics.quantiles(self._ratios(name, peer), n=4)
        return f"{self.ratio(name, peer):.3f} ({low:.3f} to {high:.3f})"

    def _ratios(self, name: str, peer: str) -> list[float]:
        return [ours / theirs for ours, theirs in zip(self.rounds[name], self.rounds[peer], strict=True)]


def paired_times(
    candidates: Mapping[str, Callable[[], object]],
    seconds: float,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> PairedTimes:
    """
    Time the candidates round by round.

    Args:
        candidates: Name -> what to run. Each round runs all of them, in an order that rotates.
        seconds: About how long to go on; at least five rounds are run.
        warmup: Rounds that are not counted.
        clock: Seconds; `time.process_time` on a machine with other work, where one thread does all of it.
    """
    names = list(candidates)
    times: dict[str, list[float]] = {name: [] for name in names}
    start, rounds = time.perf_counter(), 0
    while rounds < warmup + 5 or time.perf_counter() - start < seconds:
        for at in range(len(names)):
            name = names[(at + rounds) % len(names)]
            begin = clock()
            candidates[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if rounds >= warmup:
                times[name].append(clock() - begin)
        rounds += 1
    return PairedTimes(times)


def machine() -> str:
    """The machine in words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{model}, {torch.get_num_threads()} threads"


def versions(*packages: str) -> str:
    """Versions of the given packages, in words."""
    return ", ".join(f"{package} {version(package)}" for package in packages)


def append_results(title: str, header: list[str], rows: list[list[str]], packages: list[str], notes: str = "") -> None:
    """Print a table and append it to RESULTS.md with the machine, the versions and the command."""
    command = f"python benchmarks/{Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}".strip()
    table = [header, ["---"] * len(header), *rows]
    lines = [
        f"\n## {title}, {datetime.now(UTC):%Y-%m-%d}\n",
        f"{machine()}; {versions('torch', *packages)}; Python {platform.python_version()}. `{command}`\n",
        *("| " + " | ".join(row) + " |" for row in table),
    ]
    if notes:
        lines.append(f"\n{notes}")
    text = "\n".join(lines) + "\n"
    print(text)
    if not RESULTS.exists():
        RESULTS.write_text(
            "# Benchmark results\n\nEach table is the output of one command on one machine, newest last.\n"
        )
    with RESULTS.open("a") as file:
        file.write(text)
