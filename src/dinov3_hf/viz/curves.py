"""Curves of what was measured in the course of one or several runs.

Letters: N steps; R runs that are shown as one.
"""

from collections.abc import Mapping
from itertools import cycle
from typing import TYPE_CHECKING

import numpy as np

from dinov3_hf.viz.similarity import heat_colors

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Course = tuple[np.ndarray, np.ndarray]  # steps (N,), values (R, N)

WIDTH, HEIGHT = 3.8, 2.8  # inches of one diagram


def curves_figure(runs: Mapping[str, Mapping[str, Course]], labels: Mapping[str, str]) -> "Figure":
    """A diagram for each metric that some run has, with a line for each run that has it.

    Lines differ in lightness, dashes and markers, so that they are told apart in grey. Of runs that are shown as one
    the line is the mean, and a band reaches from the smallest to the largest value.

    Args:
        runs: name -> metric -> its course.
        labels: metric -> what stands at its axis; the order is that of the diagrams.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ImportError(
            "curves are drawn by matplotlib, which is not installed; run pip install 'dinov3-hf[viz]', or write .csv."
        ) from error
    shown = [metric for metric in labels if any(metric in courses for courses in runs.values())]
    num_rows = 1 if len(shown) <= 3 else 2
    num_columns = -(-len(shown) // num_rows)
    figure = Figure(figsize=(WIDTH * num_columns, HEIGHT * num_rows + 0.4), layout="constrained", dpi=120)
    diagrams = figure.subplots(num_rows, num_columns, squeeze=False).flatten().tolist()
    for diagram in diagrams[len(shown) :]:
        diagram.remove()
    lines = {}
    for (name, courses), style in zip(runs.items(), _styles(len(runs)), strict=True):
        for metric, diagram in zip(shown, diagrams, strict=False):
            if metric in courses:
                steps, values = courses[metric]
                (lines[name],) = diagram.plot(steps, values.mean(axis=0), **style)
                if len(values) > 1:
                    low, high = values.min(axis=0), values.max(axis=0)
                    diagram.fill_between(steps, low, high, color=style["color"], alpha=0.2, linewidth=0)
    for metric, diagram in zip(shown, diagrams, strict=False):
        diagram.set_xlabel("step")
        diagram.set_ylabel(labels[metric])
        diagram.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        diagram.grid(color="0.9")
        diagram.spines[["top", "right"]].set_visible(False)
    names = [f"{name} (mean and range of {size})" if (size := _num_runs(runs[name])) > 1 else name for name in lines]
    figure.legend(
        lines.values(), names, loc="outside upper center", ncols=min(len(names), 2 * num_columns), frameon=False
    )
    return figure


def _num_runs(courses: Mapping[str, Course]) -> int:
    return max(len(values) for _, values in courses.values())


def _styles(count: int) -> list[dict[str, object]]:
    colors = heat_colors(np.linspace(0.15, 0.75, count)) / 255  # dark to light, neither black nor faint
    dashes, markers = cycle(["-", "--", "-.", ":"]), cycle("os^Dvx")
    return [
        {"color": tuple(color), "linestyle": next(dashes), "marker": next(markers), "markersize": 4, "linewidth": 1.5}
        for color in colors.tolist()
    ]
