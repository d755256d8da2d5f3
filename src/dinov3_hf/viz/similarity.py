"""How alike one patch of an image and all its others are.

Letters: h*w patches of the image, D features.
"""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dinov3_hf.viz.canvas import BACKGROUND, contact_sheet, enlarge, heat_colors, stack

HEIGHT = 448


def cosine_map(patches: np.ndarray, row: int, column: int) -> np.ndarray:
    """Cosine similarity of the patch at (`row`, `column`) with every patch.

    Args:
        patches: features (h, w, D).
        row: from 0 at the top.
        column: from 0 at the left.

    Returns:
        (h, w) in [-1, 1]; 1 at the patch itself.

    Raises:
        ValueError: if the patch is outside the grid.
    """
    h, w, _ = patches.shape
    if not (0 <= row < h and 0 <= column < w):
        raise ValueError(f"patch {row},{column} is outside the grid: rows are 0 to {h - 1}, columns 0 to {w - 1}.")
    unit = patches / np.linalg.norm(patches, axis=-1, keepdims=True).clip(1e-12)  # (h, w, D)
    return (unit @ unit[row, column]).clip(-1, 1)  # (h, w)


def similarity_figure(picture: Image.Image, patches: np.ndarray, row: int, column: int) -> Image.Image:
    """The picture with one patch framed, the map of cosines with it, and the scale of the map's colours.

    Args:
        picture: an RGB picture.
        patches: its features (h, w, D).
        row: of the patch, from 0 at the top.
        column: of the patch, from 0 at the left.

    Raises:
        ValueError: if the patch is outside the grid.
    """
    cosines = cosine_map(patches, row, column)  # (h, w)
    low = min(float(cosines.min()), 1 - 1e-6)
    heat = Image.fromarray(heat_colors((cosines - low) / (1 - low)))
    panels = [enlarge(picture, HEIGHT), enlarge(heat, HEIGHT).resize(enlarge(picture, HEIGHT).size)]
    for panel in panels:
        _frame_patch(panel, cosines.shape, row, column)
    return contact_sheet([stack([*panels, _scale(low)], horizontal=True)])


def _frame_patch(panel: Image.Image, grid: tuple[int, ...], row: int, column: int) -> None:
    """Draw a white frame with a dark rim around one patch, visible on any picture."""
    height, width = panel.height / grid[0], panel.width / grid[1]
    left, top, right, bottom = column * width, row * height, (column + 1) * width, (row + 1) * height
    draw = ImageDraw.Draw(panel)
    for margin, color in ((3, "black"), (2, "white"), (1, "white"), (0, "black")):
        draw.rectangle((left - margin, top - margin, right + margin - 1, bottom + margin - 1), outline=color)


def _scale(low: float) -> Image.Image:
    """A bar with the colours of cosines from `low` (bottom) to 1 (top), and their values beside it."""
    bar_width, text_width, ticks = 16, 48, 5
    scale = Image.new("RGB", (bar_width + text_width, HEIGHT), BACKGROUND)
    bar = heat_colors(np.linspace(1, 0, HEIGHT)[:, None].repeat(bar_width, axis=1))
    scale.paste(Image.fromarray(bar), (0, 0))
    draw = ImageDraw.Draw(scale)
    font = ImageFont.load_default(size=14)
    for tick in np.linspace(0, 1, ticks):
        y = (1 - tick) * (HEIGHT - 1)
        anchor = "la" if tick == 1 else "ld" if tick == 0 else "lm"
        draw.text((bar_width + 6, y), f"{low + tick * (1 - low):.2f}", fill="black", font=font, anchor=anchor)
    return scale
