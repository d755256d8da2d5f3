"""The similarity map of one patch by one model after the other: how it changes in the course of a run.

The figure of section 4.1 of DINOv3 (arXiv 2508.10104). Letters: h*w patches of a picture.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dinov3_hf.viz.sheet import BACKGROUND, COLUMN_GAP, MAP_GAP, MARGIN, MAX_HEIGHT, MAX_WIDTH, ROW_GAP, frame, join
from dinov3_hf.viz.similarity import colour_bar, heat_colors, lowest

MAX_TEXT, MIN_TEXT = 16, 9  # pixels
LINE_HEIGHT = 1.3  # of a text, in units of its size


@dataclass(frozen=True)
class Panel:
    """What one model says.

    Attributes:
        label: to write above its maps, for example its step.
        notes: lines to write below them.
        maps: of each picture, cosines (h, w) with the chosen patch.
        patch: row and column of that patch in the first picture.
    """

    label: str
    notes: tuple[str, ...]
    maps: list[np.ndarray]
    patch: tuple[int, int]


@dataclass(frozen=True)
class Series:
    """The panels of one run.

    Attributes:
        name: of the run.
        panels: in the order of its steps.
    """

    name: str
    panels: list[Panel]


def series_figure(pictures: Sequence[Image.Image], series: Sequence[Series]) -> Image.Image:
    """The pictures, and the maps of all panels on one colour scale, whose bar stands at the right.

    A single series follows its pictures like text; several stand below each other, each with its pictures.

    Args:
        pictures: RGB pictures; the patch is of the first.
        series: of the runs to compare, at least one panel in each.
    """
    low = lowest([cosines for line in series for panel in line.panels for cosines in panel.maps])
    first = series[0].panels[0]
    proportions = [cosines.shape[0] / cosines.shape[1] for cosines in first.maps]  # height / width
    longest = 1 + max(len(line.panels) for line in series)  # columns, the pictures included
    # A line of n columns makes n wide and as high as all pictures: twice as wide as high with so many lines.
    num_lines = max(1, round((longest / sum(proportions) / 2) ** 0.5)) if len(series) == 1 and longest > 3 else 1
    num_columns = -(-longest // num_lines)
    room = (MAX_WIDTH - 2 * MARGIN) // num_columns - COLUMN_GAP
    width = max(1, min(room, round(MAX_HEIGHT / max(proportions))))
    sizes = [(width, max(1, round(width * proportion))) for proportion in proportions]
    font = _fitting_font([text for line in series for panel in line.panels for text in panel.notes], width)

    rows = []
    for line in series:
        num_notes = max(len(panel.notes) for panel in line.panels)
        shown = [picture.resize(size, Image.Resampling.BICUBIC) for picture, size in zip(pictures, sizes, strict=True)]
        frame(shown[0], line.panels[0].maps[0].shape, line.panels[0].patch)
        columns = [_column(line.name, shown, (), num_notes, font)]
        for panel in line.panels:
            maps = [
                Image.fromarray(heat_colors((cosines - low) / (1 - low))).resize(size, Image.Resampling.NEAREST)
                for cosines, size in zip(panel.maps, sizes, strict=True)
            ]
            frame(maps[0], panel.maps[0].shape, panel.patch)
            columns.append(_column(panel.label, maps, panel.notes, num_notes, font))
        rows += [
            join(columns[start : start + num_columns], COLUMN_GAP, horizontal=True)
            for start in range(0, len(columns), num_columns)
        ]
    sheet = join(rows, ROW_GAP, horizontal=False)
    page = Image.new("RGB", (sheet.width + 2 * MARGIN, sheet.height + 2 * MARGIN), BACKGROUND)
    page.paste(sheet, (MARGIN, MARGIN))
    return join([page, colour_bar(low, page.height)], gap=0, horizontal=True)


def _column(
    label: str, panels: Sequence[Image.Image], notes: Sequence[str], num_notes: int, font: ImageFont.FreeTypeFont
) -> Image.Image:
    """Panels of equal width below each other, `label` above them, and room for `num_notes` lines below."""
    body = join(panels, MAP_GAP, horizontal=False)
    step = round(font.size * LINE_HEIGHT)
    column = Image.new("RGB", (body.width, body.height + (1 + num_notes) * step), BACKGROUND)
    column.paste(body, (0, step))
    draw = ImageDraw.Draw(column)
    draw.text((0, 0), _shortened(label, body.width, font), fill="black", font=font)
    for i, note in enumerate(notes):
        draw.text((0, step + body.height + MAP_GAP // 2 + i * step), note, fill="black", font=font)
    return column


def _fitting_font(texts: Sequence[str], width: int) -> ImageFont.FreeTypeFont:
    """The largest font with which no text is wider than `width`."""
    for size in range(MAX_TEXT, MIN_TEXT, -1):
        font = _font(size)
        if max((font.getlength(text) for text in texts), default=0) <= width:
            return font
    return _font(MIN_TEXT)


def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size=size)
    assert isinstance(font, ImageFont.FreeTypeFont)  # because a size is given
    return font


def _shortened(text: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    """`text`, or as much of its end as fits: of paths it is the end that differs."""
    if font.getlength(text) <= width:
        return text
    ends = (f"…{text[start:]}" for start in range(1, len(text)))
    return next((end for end in ends if font.getlength(end) <= width), "…")
