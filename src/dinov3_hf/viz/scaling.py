"""How a run would go on more and more GPUs: time, GPU hours, memory of a GPU."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCALABLE = (".png", ".svg", ".pdf")
DARK, LIGHT = "#3b0f70", "0.6"
# What limits -> marker, filled or not: told apart in grey.
MARKERS = {"compute": ("o", DARK), "network": ("s", "white"), "memory": ("X", "#d1495b")}
NAMES = {
    "compute": "GPUs are busy: compute limits",
    "network": "GPUs wait for one another: the network limits",
    "memory": "does not fit",
}


def scaling_figure(
    title: str, rows: Sequence[Mapping[str, Any]], usable_bytes: float, counts: Sequence[int], why_not: str
) -> "Figure":
    """
    Three diagrams over the number of GPUs: time of the run beside what perfect scaling would make of the first count
    that fits, GPU hours, and memory of a GPU beside what there is. A marker says what limits.

    Args:
        title: of the figure.
        rows: ascending in `gpus`, each with `fits`, `limit`, `hours`, `gpu_hours`, `peak_bytes`.
        usable_bytes: memory of a GPU that a run may use.
        counts: numbers of GPUs, ascending; those without a row are shaded.
        why_not: what is written there.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
        from matplotlib.ticker import LogLocator, NullLocator
    except ImportError as error:
        raise ImportError(
            "the sweep is drawn by matplotlib, which is not installed; run pip install 'dinov3-hf[viz]', or leave "
            "--sweep out."
        ) from error
    figure = Figure(figsize=(11.4, 3.6), layout="constrained", dpi=120)
    figure.suptitle(title)
    time, spent, memory = figure.subplots(1, 3)
    fitting = [row for row in rows if row["fits"]]
    # Days, unless the run is a matter of hours.
    unit = 24 if max([row["hours"] for row in fitting], default=0) > 100 else 1
    if fitting:
        first = fitting[0]
        ideal = [first["hours"] * first["gpus"] / row["gpus"] / unit for row in fitting]
        time.plot([row["gpus"] for row in fitting], ideal, color=LIGHT, linestyle="--", label="perfect scaling")
        time.legend(frameon=False, loc="lower left")
    _course(time, fitting, [row["hours"] / unit for row in fitting])
    _course(spent, fitting, [row["gpu_hours"] for row in fitting])
    _course(memory, rows, [row["peak_bytes"] / 1e9 for row in rows])
    memory.axhline(usable_bytes / 1e9, color=LIGHT, linestyle="--")
    memory.annotate("there is", (rows[0]["gpus"], usable_bytes / 1e9), (0, 3), textcoords="offset points", color="0.4")
    time.set_yscale("log")
    memory.set_ylim(0, max(usable_bytes, *(row["peak_bytes"] for row in rows)) / 1e9 * 1.15)
    spent.set_ylim(0, max([row["gpu_hours"] for row in fitting], default=1) * 1.15)
    spent.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    for diagram, label in (
        (time, f"{'days' if unit == 24 else 'hours'} of the run"),
        (spent, "GPU hours of the run"),
        (memory, "GB on a GPU"),
    ):
        diagram.set_ylabel(label)
        diagram.set_xlabel("GPUs")
        diagram.set_xscale("log", base=2)
        diagram.set_xticks(counts, [str(count) for count in counts], rotation=45)
        diagram.xaxis.set_minor_locator(NullLocator())
        diagram.set_xlim(counts[0] / 1.2, counts[-1] * 1.2)
        if counts[-1] > rows[-1]["gpus"]:
            diagram.axvspan(rows[-1]["gpus"] * 1.4, counts[-1] * 1.2, color="0.93")
        diagram.grid(color="0.9")
        diagram.spines[["top", "right"]].set_visible(False)
    time.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    time.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    time.yaxis.set_minor_locator(NullLocator())
    if counts[-1] > rows[-1]["gpus"]:
        middle = (rows[-1]["gpus"] * 1.4 * counts[-1] * 1.2) ** 0.5
        place = time.get_xaxis_transform()
        time.text(
            middle, 0.5, why_not, transform=place, rotation=90, ha="center", va="center", color="0.4", fontsize=8
        )
    limits = [limit for limit in MARKERS if any(row["limit"] == limit for row in rows)]
    handles = [
        Line2D([], [], linestyle="", marker=MARKERS[limit][0], markerfacecolor=MARKERS[limit][1], markeredgecolor=DARK)
        for limit in limits
    ]
    figure.legend(
        handles, [NAMES[limit] for limit in limits], loc="outside lower center", ncols=len(limits), frameon=False
    )
    return figure


def _course(diagram: Any, rows: Sequence[Mapping[str, Any]], values: Sequence[float]) -> None:
    diagram.plot([row["gpus"] for row in rows], values, color=DARK, linewidth=1.5)
    for row, value in zip(rows, values, strict=True):
        marker, face = MARKERS[row["limit"]]
        diagram.plot(row["gpus"], value, marker=marker, markerfacecolor=face, markeredgecolor=DARK, markersize=6)
