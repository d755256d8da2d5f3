"""How alike one patch and all others are, in the same picture and in further ones.

Letters: h*w patches of a picture, D features.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dinov3_hf.viz.sheet import BACKGROUND, MARGIN, Pair, contact_sheet, join

# Black over violet and red to pale yellow, equally spaced on [0, 1]: lightness rises evenly, so it also reads in grey.
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


def cosine_maps(patches: Sequence[np.ndarray], row: int, column: int) -> list[np.ndarray]:
    """Cosine similarity of one patch of the first picture with every patch of every picture.

    Args:
        patches: of each picture, features (h, w, D).
        row: of the patch, from 0 at the top.
        column: of the patch, from 0 at the left.

    Returns:
        Of each picture, float64 (h, w) in [-1, 1]; in the first, 1 at the patch itself.

    Raises:
        ValueError: if the patch is outside the grid.
    """
    h, w, _ = patches[0].shape
    if not (0 <= row < h and 0 <= column < w):
        raise ValueError(f"patch {row},{column} is outside the grid; use rows 0 to {h - 1} and columns 0 to {w - 1}.")
    # Not in float32, which cannot tell the cosines of an untrained network from 1.
    units = [_unit(picture.astype(np.float64)) for picture in patches]  # (h, w, D) each
    return [(unit @ units[0][row, column]).clip(-1, 1) for unit in units]


def _unit(features: np.ndarray) -> np.ndarray:
    return features / np.linalg.norm(features, axis=-1, keepdims=True).clip(1e-12)


def similarity_figure(
    pictures: Sequence[Image.Image], patches: Sequence[np.ndarray], row: int, column: int
) -> Image.Image:
    """Pictures with maps of the cosines with one patch of the first, which is framed, and the scale of their colours.

    Args:
        pictures: RGB pictures.
        patches: of each picture, features (h, w, D).
        row: of the patch, from 0 at the top.
        column: of the patch, from 0 at the left.

    Raises:
        ValueError: if the patch is outside the grid.
    """
    cosines = cosine_maps(patches, row, column)  # (h, w) each
    low = lowest(cosines)
    pairs = [
        Pair(picture, heat_colors((cosine - low) / (1 - low)), framed=None if i else (row, column))
        for i, (picture, cosine) in enumerate(zip(pictures, cosines, strict=True))
    ]
    sheet = contact_sheet(pairs)
    return join([sheet, colour_bar(low, sheet.height)], gap=0, horizontal=True)


def lowest(maps: Sequence[np.ndarray]) -> float:
    """Where the colour scale of maps of cosines begins; never at 1, where it would have no length."""
    return min(1 - 1e-12, *(float(cosines.min()) for cosines in maps))


def colour_bar(low: float, height: int) -> Image.Image:
    """A bar with the colours of cosines from `low` (bottom) to 1 (top), round values beside it, and its name."""
    bar_width, tick_width, text_size = 18, 6, 16
    font = ImageFont.load_default(size=text_size)
    top, bottom = 2 * text_size + MARGIN, height - MARGIN
    decimals, step = next((n, s) for n in range(13, -1, -1) for s in (1, 2, 5) if s * 10**-n >= (1 - low) / 9)
    values = [1 - i * step * 10**-decimals for i in range(10) if 1 - i * step * 10**-decimals >= low]
    texts = [f"{value:.{decimals}f}" for value in values]
    width = max(font.getlength(text) for text in ["cosine", *texts])
    scale = Image.new("RGB", (round(bar_width + 2 * tick_width + width) + MARGIN, height), BACKGROUND)
    bar = heat_colors(np.linspace(1, 0, bottom - top)[:, None].repeat(bar_width, axis=1))
    scale.paste(Image.fromarray(bar), (0, top))
    draw = ImageDraw.Draw(scale)
    draw.text((0, MARGIN), "cosine", fill="black", font=font)
    for text, value in zip(texts, values, strict=True):
        y = top + (1 - value) / (1 - low) * (bottom - top - 1)
        draw.line((bar_width, y, bar_width + tick_width, y), fill="black")
        draw.text((bar_width + 2 * tick_width, y), text, fill="black", font=font, anchor="lm")
    return scale
