"""A sheet of pictures, each with a map of its patches.

Letters: h*w patches of a picture.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

BACKGROUND = (255, 255, 255)
# Pixels between a picture and its map, between neighbours in a row, and between rows; also around the sheet.
MAP_GAP, COLUMN_GAP, ROW_GAP, MARGIN = 4, 12, 24, 12
MAX_WIDTH, MAX_HEIGHT = 1600, 480  # of the sheet; of a picture


@dataclass(frozen=True)
class Pair:
    """A picture and the map of its patches.

    Attributes:
        picture: RGB, any size.
        cells: the colour of each patch, uint8 (h, w, 3); patches are square, so these are the picture's proportions.
        framed: row and column of a patch to draw a frame around, in picture and map.
    """

    picture: Image.Image
    cells: np.ndarray
    framed: tuple[int, int] | None = None

    def draw(self, height: int, side_by_side: bool) -> Image.Image:
        """The picture at `height` pixels with its map, of the same size, beside or below it."""
        rows, columns, _ = self.cells.shape
        size = (round(height * columns / rows), height)
        panels = [
            self.picture.resize(size, Image.Resampling.BICUBIC),
            Image.fromarray(self.cells).resize(size, Image.Resampling.NEAREST),  # a patch is a sharp square
        ]
        if self.framed is not None:
            for panel in panels:
                frame(panel, (rows, columns), self.framed)
        return join(panels, MAP_GAP, horizontal=side_by_side)


def contact_sheet(pairs: Sequence[Pair]) -> Image.Image:
    """All pairs at equal height, the maps below the pictures, in rows of about equal length on a wide page.

    A single picture has its map beside it.
    """
    proportions = np.array([pair.cells.shape[1] / pair.cells.shape[0] for pair in pairs])  # width / height
    side_by_side = len(pairs) == 1
    # With r rows the sheet is about sum(proportions) / r wide and 2 r high, in units of a picture's height: twice as
    # wide as high with this r. A pair goes into the row where its middle falls.
    num_rows = max(1, round(proportions.sum() ** 0.5 / 2))
    middles = (proportions.cumsum() - proportions / 2) / proportions.sum()  # in (0, 1)
    row_of = (middles * num_rows).astype(int)
    rows = [np.flatnonzero(row_of == row).tolist() for row in np.unique(row_of)]
    room = [
        (MAX_WIDTH - 2 * MARGIN - COLUMN_GAP * (len(row) - 1)) / (proportions[row].sum() * (1 + side_by_side))
        for row in rows
    ]
    height = max(1, min(MAX_HEIGHT, *map(int, room)))
    drawn = [join([pairs[i].draw(height, side_by_side) for i in row], COLUMN_GAP, horizontal=True) for row in rows]
    sheet = join(drawn, ROW_GAP, horizontal=False)
    page = Image.new("RGB", (sheet.width + 2 * MARGIN, sheet.height + 2 * MARGIN), BACKGROUND)
    page.paste(sheet, (MARGIN, MARGIN))
    return page


def join(pictures: Sequence[Image.Image], gap: int, horizontal: bool) -> Image.Image:
    """Pictures in a row, or in a column, `gap` pixels apart."""
    steps = [(picture.width if horizontal else picture.height) + gap for picture in pictures]
    starts = np.cumsum([0, *steps])
    length = int(starts[-1]) - gap
    breadth = max(picture.height if horizontal else picture.width for picture in pictures)
    canvas = Image.new("RGB", (length, breadth) if horizontal else (breadth, length), BACKGROUND)
    for picture, start in zip(pictures, starts.tolist(), strict=False):
        canvas.paste(picture, (start, 0) if horizontal else (0, start))
    return canvas


def frame(panel: Image.Image, grid: tuple[int, ...], patch: tuple[int, int]) -> None:
    """Draw a white frame with a dark rim around one patch of `panel`, of rows x columns: visible on any picture."""
    height, width = panel.height / grid[0], panel.width / grid[1]
    top, left = round(patch[0] * height), round(patch[1] * width)
    bottom, right = round((patch[0] + 1) * height), round((patch[1] + 1) * width)
    draw = ImageDraw.Draw(panel)
    for margin, color in ((4, "black"), (3, "white"), (2, "white"), (1, "black")):
        draw.rectangle((left - margin, top - margin, right + margin - 1, bottom + margin - 1), outline=color)
