"""The course of a run: its evaluations as a table, before, during and after."""

from collections.abc import Mapping, Sequence

from dinov3_hf.training.evaluation import described

LogHistory = Sequence[Mapping[str, float]]

MAX_ROWS = 12


def course(log_history: LogHistory, num_rows: int = MAX_ROWS) -> tuple[list[str], list[list[str]]]:
    """
    Headings and rows of the table: the step, then each number that was measured.

    Args:
        log_history: of the run.
        num_rows: evaluations to show at most, the first and the last of them always.

    Returns:
        Headings, and as many cells in each row; of a run without evaluations there are no rows.
    """
    found = {int(entry["step"]): shown for entry in log_history if (shown := described(entry))}
    evaluations = sorted(found.items())  # one a step: a run that is resumed looks again at where it was
    chosen = [evaluations[i] for i in _spread(len(evaluations), num_rows)]
    headings = list(dict.fromkeys(name for _, shown in chosen for name in shown))
    return ["step", *headings], [[f"{step:,}", *(shown.get(name, "") for name in headings)] for step, shown in chosen]


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The table in Markdown."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _spread(total: int, count: int) -> list[int]:
    if total <= count:
        return list(range(total))
    return [round(i * (total - 1) / (count - 1)) for i in range(count)]
