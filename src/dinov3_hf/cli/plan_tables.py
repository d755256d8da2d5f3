"""What the tables of `dinov3-hf plan` have in common."""

from typing import Any

from rich.table import Table

from dinov3_hf.plan.run_plan import RunCosts


def totals(run: dict[str, Any], costs: RunCosts) -> dict[str, str]:
    """What was asked for about the whole run, from its facts."""
    rows = {}
    if "passes_over_the_data" in run:
        rows["passes over the data"] = f"{run['passes_over_the_data']:,.2f}"
    if "cost" in run:
        rows["cost"] = f"{run['cost']:,.0f}"
    if "share_of_the_run_in_budget" in run:
        share = run["share_of_the_run_in_budget"]
        steps = min(int(share * costs.max_steps), costs.max_steps)
        rows["the budget pays"] = f"{steps:,} of {costs.max_steps:,} steps ({share:.0%})"
    return rows


def gigabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.2f}"


def duration(hours: float) -> str:
    return f"{hours / 24:,.1f} days" if hours >= 48 else f"{hours:,.1f} hours"


def table_of(title: str, *columns: str, right: bool = False) -> Table:
    """A borderless table under a title; without names of columns it has no header."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=any(columns))
    for position, column in enumerate(columns):
        table.add_column(column, justify="right" if right and position else "left", no_wrap=position == 0)
    return table
