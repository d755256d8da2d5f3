"""Pictures and maps stand where they belong, in their proportions."""

import numpy as np
import pytest
from PIL import Image

from dinov3_hf.viz.sheet import BACKGROUND, MARGIN, MAX_HEIGHT, MAX_WIDTH, Pair, contact_sheet, join

RED, BLUE = (255, 0, 0), (0, 0, 255)


def pair(columns=4, rows=3, color=RED, framed=None) -> Pair:
    cells = np.zeros((rows, columns, 3), np.uint8)
    cells[...] = BLUE
    return Pair(Image.new("RGB", (columns * 10, rows * 10), color), cells, framed)


def areas(sheet: Image.Image, color) -> np.ndarray:
    """Left, top, right and bottom of all pixels of `color`."""
    rows, columns = np.nonzero((np.asarray(sheet) == color).all(axis=-1))
    return np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])


def test_a_single_picture_has_its_map_beside_it():
    sheet = contact_sheet([pair(3, 2)])
    left, top, right, bottom = areas(sheet, RED)
    assert (left, top) == (MARGIN, MARGIN)
    assert (right - left, bottom - top) == (1.5 * MAX_HEIGHT, MAX_HEIGHT)
    map_left, *rest = areas(sheet, BLUE)
    assert map_left > right
    assert rest == [MARGIN, sheet.width - MARGIN, sheet.height - MARGIN]


def test_several_have_theirs_below_in_reading_order():
    colors = [(200, 0, i) for i in range(20)]
    sheet = contact_sheet([pair(2, 2, color) for color in colors])
    boxes = np.stack([areas(sheet, color) for color in colors])
    tops = np.unique(boxes[:, 1])
    assert len(tops) == 2
    assert [(boxes[:, 1] == top).sum() for top in tops] == [10, 10]
    assert (np.lexsort((boxes[:, 0], boxes[:, 1])) == np.arange(20)).all()
    sides = boxes[:, 2:] - boxes[:, :2]
    assert (sides == sides[0, 0]).all()  # equal squares
    assert areas(sheet, BLUE)[1] > boxes[0, 3]
    assert MAX_WIDTH - 20 < sheet.width <= MAX_WIDTH


@pytest.mark.parametrize("proportions", [[(1, 60)], [(60, 1)], [(9, 3), (1, 8), (5, 4)], [(40, 30)] * 57])
def test_any_proportions_fit_the_page(proportions):
    sheet = contact_sheet([pair(*size) for size in proportions])
    assert sheet.width <= MAX_WIDTH + 4
    corners = [sheet.getpixel((x, y)) for x in (0, sheet.width - 1) for y in (0, sheet.height - 1)]
    assert corners == [BACKGROUND] * 4


def test_patches_are_sharp_squares_in_their_places():
    cells = np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    drawn = np.asarray(Pair(Image.new("RGB", (8, 6)), cells).draw(30, side_by_side=False))
    expected = cells.repeat(10, axis=0).repeat(10, axis=1)
    np.testing.assert_array_equal(drawn[-30:], expected)


def test_the_frame_is_around_its_patch():
    plain, framed = (np.asarray(pair(4, 3, framed=patch).draw(120, side_by_side=False)) for patch in (None, (1, 2)))
    rows, columns = np.nonzero((plain != framed).any(axis=-1))
    panel_rows = rows[rows < 120]
    assert (panel_rows.min(), panel_rows.max() + 1) == (40 - 4, 80 + 4)
    assert (columns.min(), columns.max() + 1) == (80 - 4, 120 + 4)
    np.testing.assert_array_equal(framed[40:80, 80:120], plain[40:80, 80:120])  # the patch itself stays visible
    assert (rows >= 124).any()  # in the map, too


def test_join():
    row = join([Image.new("RGB", (3, 5), RED), Image.new("RGB", (2, 4), BLUE)], gap=1, horizontal=True)
    assert row.size == (6, 5)
    assert [row.getpixel((x, 4)) for x in range(6)] == [RED] * 3 + [BACKGROUND] * 3
    assert [row.getpixel((x, 0)) for x in range(6)] == [RED] * 3 + [BACKGROUND] + [BLUE] * 2
    assert join([row, row], gap=0, horizontal=False).size == (6, 10)
