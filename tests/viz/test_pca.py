"""Colours are the leading principal components, the same for equal patches wherever they are."""

import numpy as np
import pytest
from PIL import Image

from dinov3_hf.viz.pca import pca_colors, pca_figure


def features(*shape: int, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    """Float32 features (..., D) whose variance falls from one direction to the next."""
    rng = np.random.default_rng(seed)
    directions = np.linalg.qr(np.random.default_rng(9).normal(size=(shape[-1], shape[-1])))[0]
    values = rng.gamma(1.0, size=shape) * 0.5 ** np.arange(shape[-1])
    return (scale * values @ directions + 3).astype(np.float32)


def test_colours_are_the_first_three_components():
    patches = features(20, 30, 8)
    colors = pca_colors([patches])[0].reshape(-1, 3).astype(float)
    rows = patches.reshape(-1, 8).astype(np.float64)
    rows -= rows.mean(axis=0)
    left, values, _ = np.linalg.svd(rows, full_matrices=False)
    components = left[:, :3] * values[:3]
    for channel in range(3):
        inside = (colors[:, channel] > 0) & (colors[:, channel] < 255)
        assert 0.95 < inside.mean() < 0.99  # a percent is cut off at either end, and some round to it
        assert abs(np.corrcoef(colors[inside, channel], components[inside, channel])[0, 1]) > 0.9999
        assert {colors[:, channel].min(), colors[:, channel].max()} == {0, 255}


def test_few_patches_are_bright_among_many_dark_ones():
    colors = pca_colors([features(20, 30, 8)])[0]
    assert (np.median(colors, axis=(0, 1)) < 110).all()


def test_the_sign_of_the_features_does_not_matter():
    patches = features(20, 30, 8)
    np.testing.assert_array_equal(pca_colors([patches])[0], pca_colors([-patches])[0])


def test_equal_patches_have_equal_colours_across_images():
    first, second = features(4, 6, 8), features(5, 3, 8, seed=1)
    second[2, 1] = first[1, 4]
    colors = pca_colors([first, second])
    assert [image.shape for image in colors] == [(4, 6, 3), (5, 3, 3)]
    np.testing.assert_array_equal(colors[1][2, 1], colors[0][1, 4])


def test_small_differences_show_and_rounding_does_not():
    """An untrained network with small LayerScale differs from patch to patch by 1e-5; equal patches by nothing."""
    small = features(20, 30, 8, scale=1e-3)
    assert pca_colors([small])[0].std(axis=(0, 1)).min() > 20
    equal = np.broadcast_to(features(8), (20, 30, 8))
    assert np.ptp(pca_colors([equal])[0], axis=(0, 1)).max() == 0
    nearly_equal = np.nextafter(equal, np.inf, where=np.indices(equal.shape).sum(axis=0) % 2 == 0, out=equal.copy())
    assert np.ptp(pca_colors([nearly_equal])[0].astype(int), axis=(0, 1)).max() < 255


def test_too_few_features():
    with pytest.raises(ValueError, match="at least 3 features a patch; these have 2"):
        pca_colors([features(4, 4, 2)])


def test_figure():
    pictures = [Image.new("RGB", (60, 40), (9, 9, 9)), Image.new("RGB", (30, 50), (9, 9, 9))]
    patches = [features(4, 6, 8), features(5, 3, 8, seed=1)]
    figure = np.asarray(pca_figure(pictures, patches)).reshape(-1, 3)
    shown = {tuple(color) for color in figure}
    assert {(9, 9, 9), *(tuple(color) for image in pca_colors(patches) for color in image.reshape(-1, 3))} <= shown
