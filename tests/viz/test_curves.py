"""Diagrams have a line for each run that has their metric, with its numbers, and tell runs apart without colour."""

import sys

import numpy as np
import pytest

from dinov3_hf.viz.curves import curves_figure
from tests.testing_utils import require_package

LABELS = {"knn": "kNN top-1 (%)", "cosine": "patch-CLS cosine", "drift": "CLS drift"}
STEPS = np.array([0, 10, 20])
RUNS = {
    "one": {"knn": (STEPS, np.array([[1.0, 2.0, 3.0]])), "cosine": (STEPS, np.array([[0.1, 0.2, 0.3]]))},
    "seeds": {"knn": (STEPS[:2], np.array([[1.0, 4.0], [3.0, 8.0]]))},
}


@require_package("matplotlib")
def test_lines_are_the_numbers():
    figure = curves_figure(RUNS, LABELS)
    knn, cosine = figure.axes  # no diagram for what nobody measured
    assert [axes.get_ylabel() for axes in figure.axes] == ["kNN top-1 (%)", "patch-CLS cosine"]
    assert [axes.get_xlabel() for axes in figure.axes] == ["step", "step"]
    one, seeds = (line.get_xydata().tolist() for line in knn.lines)
    assert one == [[0, 1], [10, 2], [20, 3]]
    assert seeds == [[0, 2], [10, 6]]  # the mean
    (band,) = knn.collections
    assert {tuple(point) for point in band.get_paths()[0].vertices.tolist()} == {(0, 1), (0, 3), (10, 4), (10, 8)}
    assert len(cosine.lines) == 1 and not cosine.collections
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["one", "seeds (mean and range of 2)"]


@require_package("matplotlib")
def test_runs_are_told_apart_in_grey():
    runs = {f"run {i}": {"knn": (STEPS, np.array([[i, i, i]]))} for i in range(6)}
    lines = curves_figure(runs, LABELS).axes[0].lines
    lightness = [float(np.dot(line.get_color(), (0.2126, 0.7152, 0.0722))) for line in lines]
    assert (np.diff(lightness) > 0.04).all() and lightness[-1] < 0.8
    assert len({(line.get_linestyle(), line.get_marker()) for line in lines}) == 6


@require_package("matplotlib")
@pytest.mark.parametrize(("num_metrics", "shape"), [(1, (1, 1)), (3, (1, 3)), (4, (2, 2)), (5, (2, 3))])
def test_diagrams_are_arranged(num_metrics, shape):
    names = [f"metric {i}" for i in range(num_metrics)]
    figure = curves_figure(
        {"run": {name: (STEPS, np.ones((1, 3))) for name in names}}, dict(zip(names, names, strict=True))
    )
    assert len(figure.axes) == num_metrics
    assert figure.axes[0].get_gridspec().get_geometry() == shape


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"not installed; run pip install 'dinov3-hf\[viz\]', or write \.csv\."):
        curves_figure(RUNS, LABELS)
