"""Pieces that the figures are put together from: enlarging, stacking, a colour map."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

BACKGROUND = (255, 255, 255)
GAP = 6

# Dark violet over red to pale yellow, equally spaced on [0, 1]: lightness rises evenly, so that it also reads in grey.
_HEAT = np.array(
    [
        (0, 0, 4),
        (29, 17, 71),
        (81, 18, 124),
        (131, 38, 129),
        (183, 55, 121),
        (231, 82, 99),
        (252, 137, 97),
        (254, 196, 136),
        (252, 253, 191),
    ]
)


def heat_colors(values: np.ndarray) -> np.ndarray:
    """Colours, uint8 (..., 3), of `values` (...) in [0, 1]."""
    anchors = np.linspace(0, 1, len(_HEAT))
    channels = [np.interp(values, anchors, _HEAT[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def enlarge(picture: Image.Image, height: int) -> Image.Image:
    """`picture` at `height` pixels and its own proportions; pixels stay sharp squares when it grows."""
    width = max(1, round(picture.width * height / picture.height))
    growing = height > picture.height
    return picture.resize((width, height), Image.Resampling.NEAREST if growing else Image.Resampling.LANCZOS)


def stack(pictures: Sequence[Image.Image], horizontal: bool = False, gap: int = GAP) -> Image.Image:
    """Pictures in a column, or in a row, `gap` pixels apart."""
    along, across = (0, 1) if horizontal else (1, 0)
    size = [0, 0]
    size[along] = sum(picture.size[along] for picture in pictures) + gap * (len(pictures) - 1)
    size[across] = max(picture.size[across] for picture in pictures)
    canvas = Image.new("RGB", (size[0], size[1]), BACKGROUND)
    position = [0, 0]
    for picture in pictures:
        canvas.paste(picture, (position[0], position[1]))
        position[along] += picture.size[along] + gap
    return canvas


def contact_sheet(pictures: Sequence[Image.Image], max_width: int = 1600) -> Image.Image:
    """Pictures in rows of about equal length, none wider than `max_width` unless a single picture is."""
    total = sum(picture.width + GAP for picture in pictures)
    num_rows = -(-total // max_width)
    limit = max(total / num_rows, *(picture.width + GAP for picture in pictures))
    rows: list[list[Image.Image]] = [[]]
    length = 0
    for picture in pictures:
        if length + picture.width + GAP > limit:
            rows.append([])
            length = 0
        rows[-1].append(picture)
        length += picture.width + GAP
    sheet = stack([stack(row, horizontal=True) for row in rows], gap=3 * GAP)
    framed = Image.new("RGB", (sheet.width + 2 * GAP, sheet.height + 2 * GAP), BACKGROUND)
    framed.paste(sheet, (GAP, GAP))
    return framed
