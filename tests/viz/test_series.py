"""Panels of several models stand in their order, on one colour scale, with their labels and numbers."""

import numpy as np
import pytest
from PIL import Image

from dinov3_hf.viz.series import Panel, Series, series_figure
from dinov3_hf.viz.sheet import MAX_WIDTH
from dinov3_hf.viz.similarity import colour_bar, heat_colors

RED = (255, 0, 0)


def panel(value: float, num_pictures: int = 1, grid: tuple[int, int] = (4, 6), label: str = "step 1") -> Panel:
    """Cosines of 1 at patch 1,2 of the first picture, of `value` everywhere else."""
    maps = [np.full(grid, value) for _ in range(num_pictures)]
    maps[0][1, 2] = 1
    return Panel(label, (f"patch-CLS cosine {value:.3f}", "patch-similarity entropy 0.500"), maps, (1, 2))


def without_bar(figure: Image.Image) -> np.ndarray:
    return np.asarray(figure)[:, : figure.width - colour_bar(-0.5, figure.height).width]


def box(figure: Image.Image, color) -> list[int]:
    """Left, top, right and bottom of all pixels of `color` left of the colour bar."""
    rows, columns = np.nonzero((without_bar(figure) == color).all(axis=-1))
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_panels_follow_their_pictures_on_one_scale():
    values = [-0.5, 0.0, 0.25, 0.5]  # the first is the lowest of all and sets the scale
    figure = series_figure([Image.new("RGB", (60, 40), RED)], [Series("run", [panel(value) for value in values])])
    colors = [tuple(heat_colors(np.array((value + 0.5) / 1.5)).tolist()) for value in values]
    boxes = [box(figure, color) for color in (RED, *colors)]
    assert len({(right - left, bottom - top) for left, top, right, bottom in boxes}) == 1  # equal size
    assert sorted(boxes, key=lambda edges: (edges[1], edges[0])) == boxes  # reading order
    assert len({top for _, top, _, _ in boxes}) == 2  # lines
    assert figure.width <= MAX_WIDTH + 120


def test_labels_and_numbers_are_written_above_and_below():
    plain = Panel("", (), panel(0.2).maps, (1, 2))
    with_text, without = (
        series_figure([Image.new("RGB", (60, 40), RED)], [Series("", [shown])]) for shown in (panel(0.2), plain)
    )
    assert with_text.height > without.height
    _, top, _, bottom = box(with_text, heat_colors(np.array(0.0)))
    text = (without_bar(with_text) < 100).all(axis=-1)
    assert text[:top].any() and text[bottom:].any()
    assert not (without_bar(without)[:top] < 100).all(axis=-1).any()


@pytest.mark.parametrize("num_pictures", [1, 3])
@pytest.mark.parametrize("num_panels", [(1,), (8,), (20,), (3, 5)])
def test_any_number_fits_the_page(num_panels, num_pictures):
    pictures = [Image.new("RGB", size, RED) for size in ((60, 40), (40, 60), (30, 30))[:num_pictures]]
    name = "a/long/path/to/a/run/" * 9
    series = [Series(name, [panel(i / 20, num_pictures) for i in range(n)]) for n in num_panels]
    figure = series_figure(pictures, series)
    assert figure.width <= MAX_WIDTH + 120
    colors = {color for _, color in figure.getcolors(figure.width * figure.height)}
    for i in range(max(num_panels)):
        assert tuple(heat_colors(np.array(i / 20)).tolist()) in colors


def test_models_with_other_patches_are_shown_at_the_same_size():
    series = [Series("", [panel(0.0), panel(0.5, grid=(8, 12))])]
    figure = series_figure([Image.new("RGB", (60, 40), RED)], series)
    coarse, fine = (box(figure, tuple(heat_colors(np.array(value)).tolist())) for value in (0.0, 0.5))
    assert (coarse[2] - coarse[0], coarse[3] - coarse[1]) == (fine[2] - fine[0], fine[3] - fine[1])
