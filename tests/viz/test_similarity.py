"""The map is of the cosines with the chosen patch, and its scale says which colour is which."""

import numpy as np
import pytest
import torch
from PIL import Image

from dinov3_hf.viz.similarity import cosine_maps, heat_colors, similarity_figure


def patches(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_cosines_are_those_of_torch():
    first, second = patches(4, 6, 8), patches(3, 5, 8, seed=1)
    maps = cosine_maps([first, second], 1, 4)
    for ours, image in zip(maps, (first, second), strict=True):
        expected = torch.nn.functional.cosine_similarity(torch.tensor(image), torch.tensor(first[1, 4]), dim=-1)
        np.testing.assert_allclose(ours, expected.numpy(), atol=1e-6)
    assert maps[0][1, 4] == pytest.approx(1, abs=1e-12)
    assert cosine_maps([np.zeros((2, 2, 8), np.float32)], 0, 0)[0].max() == 0


def test_nearly_equal_patches_are_told_apart():
    """Those of an untrained network: in float32 all of these cosines would be 1."""
    nearly_equal = (5 + 1e-5 * patches(4, 6, 8)).astype(np.float32)
    cosines = cosine_maps([nearly_equal], 0, 0)[0]
    assert cosines.argmax() == 0
    assert len(np.unique(cosines)) > 20
    assert (cosines[cosines < cosines.max()] < 1 - 1e-13).all()
    figure = similarity_figure([Image.new("RGB", (60, 40))], [nearly_equal], 0, 0)
    assert len({tuple(color) for color in np.asarray(figure).reshape(-1, 3)}) > 20


def test_heat_gets_lighter():
    colors = heat_colors(np.linspace(0, 1, 256))
    lightness = colors @ (0.2126, 0.7152, 0.0722)
    assert (np.diff(lightness) >= 0).all()
    assert (colors[0].sum(), colors[-1].min()) < (10, 190)


@pytest.mark.parametrize("num_pictures", [1, 2])
def test_figure_shows_the_maps_and_their_scale(num_pictures):
    images = [patches(4, 6, 8), -patches(4, 6, 8)][:num_pictures]
    cosines = cosine_maps(images, 2, 3)
    figure = np.asarray(similarity_figure([Image.new("RGB", (60, 40), (9, 9, 9))] * num_pictures, images, 2, 3))
    shown = {tuple(color) for color in figure.reshape(-1, 3)}
    low = min(cosine.min() for cosine in cosines)  # of both pictures: equal colours are equal cosines
    for value in np.concatenate([cosine.ravel() for cosine in cosines]):
        assert tuple(heat_colors((value - low) / (1 - low))) in shown
    bar = figure[:, np.flatnonzero((figure == heat_colors(np.array(0.0))).all(axis=-1).any(axis=0)).max()]
    assert tuple(bar[44]) == tuple(heat_colors(np.array(1.0)))
    assert tuple(bar[-13]) == tuple(heat_colors(np.array(0.0)))


@pytest.mark.parametrize("span", [0.0, 1e-10, 3e-4, 0.02, 0.5, 1.3, 2.0])
def test_any_span_of_cosines_has_a_scale(span):
    angles = np.arccos(1 - np.linspace(0, span, 12)).reshape(3, 4)
    image = np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    figure = similarity_figure([Image.new("RGB", (40, 30))], [image], 0, 0)
    scale = np.asarray(figure)[:, 1280 + 40 :]  # right of two panels 480 pixels high and the margins
    assert (scale == 0).all(axis=-1).any()  # text and ticks are black


@pytest.mark.parametrize(("row", "column"), [(4, 0), (0, 6), (-1, 0)])
def test_a_patch_outside_the_grid(row, column):
    with pytest.raises(
        ValueError, match=f"patch {row},{column} is outside the grid; use rows 0 to 3 and columns 0 to 5"
    ):
        cosine_maps([patches(4, 6, 8)], row, column)
