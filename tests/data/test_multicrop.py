"""Crops equal torchvision's, their boxes have its distribution, their distortions the published frequencies."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional as tv

from dinov3_hf.data import multicrop
from dinov3_hf.data.multicrop import MultiCropViews, check_crop_size, image_tensor, random_crop_box
from dinov3_hf.data.photometric import Distortions
from tests.testing_utils import FIXTURES

PUBLISHED = json.loads((FIXTURES / "i_augmentation" / "augmentation.json").read_text())


def picture(height=45, width=60, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def kolmogorov_distance(a, b):
    """Largest difference between two empirical distribution functions."""
    a, b = np.sort(a), np.sort(b)
    points = np.concatenate([a, b])
    return np.abs(np.searchsorted(a, points, "right") / len(a) - np.searchsorted(b, points, "right") / len(b)).max()


@pytest.mark.parametrize("scale", [(0.32, 1.0), (0.05, 0.32)])
@pytest.mark.parametrize("size", [(375, 500), (300, 100)])
def test_boxes_have_torchvisions_distribution(scale, size):
    height, width = size
    rng = np.random.default_rng(0)
    ours = np.array([random_crop_box(height, width, scale, rng) for _ in range(5000)])
    image = torch.empty(1, height, width)
    aspects = list(PUBLISHED["random_resized_crop"]["aspect_ratio"])
    theirs = np.array([RandomResizedCrop.get_params(image, list(scale), aspects) for _ in range(5000)])

    def features(boxes):
        top, left, crop_height, crop_width = boxes.T.astype(float)
        yield crop_height * crop_width
        yield crop_width / crop_height
        yield top / np.maximum(height - crop_height, 1)
        yield left / np.maximum(width - crop_width, 1)

    for our_values, their_values in zip(features(ours), features(theirs), strict=True):
        # 1.95 * sqrt(2 / n) is the 0.1 % point of the two-sample Kolmogorov-Smirnov test; boxes on whole pixels tie.
        assert kolmogorov_distance(our_values, their_values) < 1.95 * np.sqrt(2 / 5000)


@pytest.mark.parametrize("size", [(20, 200), (200, 20), (7, 31), (1, 9)])
def test_centre_window_where_no_box_fits(size):
    # With the whole area asked for, no attempt fits a long image, and the fallback is deterministic.
    expected = RandomResizedCrop.get_params(torch.empty(1, *size), [1.0, 1.0], [3 / 4, 4 / 3])
    assert random_crop_box(*size, (1.0, 1.0), np.random.default_rng(0)) == expected


@pytest.mark.parametrize("box", [(3, 5, 30, 40), (0, 0, 45, 60), (10, 20, 8, 6)])
@pytest.mark.parametrize("channels", [1, 3])
def test_crops_equal_torchvisions(box, channels, monkeypatch):
    monkeypatch.setattr(multicrop, "random_crop_box", lambda *_: box)
    image = picture(channels=channels)
    views = MultiCropViews(24, 12, num_local_crops=3, horizontal_flip=False)(image, np.random.default_rng(0))
    pixels = torch.from_numpy(image).permute(2, 0, 1).contiguous()
    for crops, size in ((views["global_crops"], 24), (views["local_crops"], 12)):
        expected = tv.resized_crop(pixels, *box, [size, size], InterpolationMode.BICUBIC, antialias=True)
        torch.testing.assert_close(crops, expected.expand_as(crops), rtol=0, atol=0)


def test_flips_mirror_half_of_the_crops(monkeypatch):
    monkeypatch.setattr(multicrop, "random_crop_box", lambda *_: (0, 0, 45, 60))
    views, rng = MultiCropViews(16, 8, num_local_crops=998), np.random.default_rng(0)
    upright = MultiCropViews(16, 8, num_local_crops=998, horizontal_flip=False)(picture(), rng)["local_crops"][0]
    crops = views(picture(), rng)["local_crops"]
    flipped = (crops == upright.flip(-1)).flatten(1).all(1)
    assert torch.equal(~flipped, (crops == upright).flatten(1).all(1))
    assert 0.44 < flipped.float().mean() < 0.56


@pytest.mark.parity
def test_shapes_are_the_recorded_ones():
    views = MultiCropViews(256, 112)(picture(375, 500), np.random.default_rng(0))
    for name in ("global_crops", "local_crops"):
        assert views[name].dtype == torch.uint8
        assert [list(crop.shape) for crop in views[name]] == PUBLISHED["measured_shapes"]["plain"][name]


def test_defaults_are_the_published_ones():
    assert list(MultiCropViews(224, 96).global_crop_scale) == PUBLISHED["random_resized_crop"]["global_scale_default"]
    assert list(MultiCropViews(224, 96).local_crop_scale) == PUBLISHED["random_resized_crop"]["local_scale_default"]
    jitter = PUBLISHED["colour_jitter"]
    blur = PUBLISHED["gaussian_blur"]
    assert Distortions() == Distortions(
        jitter=(jitter["brightness"], jitter["contrast"], jitter["saturation"], jitter["hue"]),
        jitter_probability=jitter["apply_probability"],
        greyscale_probability=PUBLISHED["greyscale_probability"],
        blur_probabilities=tuple(
            blur[name]["effective_apply_probability"] for name in ("global_crop_1", "global_crop_2", "local_crops")
        ),
        solarize_probability=PUBLISHED["solarize"]["probability"],
    )


@pytest.mark.parity
def test_distortions_have_the_published_frequencies():
    num_draws = 4000
    rng = np.random.default_rng(0)
    draws = [Distortions().draw(3, rng) for _ in range(num_draws)]
    drawn = {name: np.stack([draw[name] for draw in draws]) for name in draws[0]}  # (draws, 5 crops, ...)

    def share_is(values, expected):
        standard_error = np.sqrt(expected * (1 - expected) / values.size)
        assert abs(values.mean() - expected) <= 4 * standard_error

    for crop in range(5):
        share_is(drawn["jitter"][:, crop], 0.8)
        share_is(drawn["greyscale"][:, crop], 0.2)
        share_is(drawn["blur_sigma"][:, crop] > 0, [0.0, 0.9, 0.5, 0.5, 0.5][crop])
        share_is(drawn["solarize"][:, crop], [0.0, 0.2, 0.0, 0.0, 0.0][crop])

    sigma = drawn["blur_sigma"][drawn["blur_sigma"] > 0]
    for values, low, high in (
        (sigma, *PUBLISHED["gaussian_blur"]["sigma_range"]),
        (drawn["jitter_factor"][..., 0], 0.6, 1.4),
        (drawn["jitter_factor"][..., 1], 0.6, 1.4),
        (drawn["jitter_factor"][..., 2], 0.8, 1.2),
        (drawn["jitter_factor"][..., 3], -0.1, 0.1),
    ):
        uniform = np.linspace(low, high, 10001)
        assert kolmogorov_distance(values.ravel(), uniform) < 1.95 * np.sqrt(1 / values.size + 1 / 10001)
    orders = Counter(map(tuple, drawn["jitter_order"].reshape(-1, 4).tolist()))
    assert len(orders) == 24
    # Chi square with 23 degrees of freedom: 49.7 is the 0.1 % point.
    expected = 5 * num_draws / 24
    assert sum((count - expected) ** 2 / expected for count in orders.values()) < 49.7


@pytest.mark.invariant
def test_views_depend_on_image_and_generator_only():
    views = MultiCropViews(16, 8, num_local_crops=2)
    first, again, other = (views(picture(), np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert torch.equal(first["global_crops"], again["global_crops"])
    assert torch.equal(first["local_crops"], again["local_crops"])
    assert not torch.equal(first["global_crops"], other["global_crops"])
    for name, values in first["global_photometric"].items():
        np.testing.assert_array_equal(values, again["global_photometric"][name])


def test_no_local_crops():
    views = MultiCropViews(16, 8, num_local_crops=0)(picture(), np.random.default_rng(0))
    assert views["local_crops"].shape == (0, 3, 8, 8)
    assert all(len(values) == 0 for values in views["local_photometric"].values())


def test_pictures_become_tensors():
    array = picture(4, 5)
    for image in (array, Image.fromarray(array), array[:, ::-1][:, ::-1]):
        torch.testing.assert_close(image_tensor(image), torch.from_numpy(array).permute(2, 0, 1))
    assert image_tensor(Image.fromarray(array).convert("L")).shape == (1, 4, 5)
    with pytest.raises(ValueError, match="uint8 pixels, not float64"):
        image_tensor(np.zeros((4, 5, 3)))


@pytest.mark.parametrize(
    ("size", "patch", "remedy"), [(100, 16, "use 96 or 112"), (10, 16, "use 16"), (0, 4, "use 4"), (-5, 4, "use 4")]
)
def test_crop_sizes_that_do_not_divide(size, patch, remedy):
    with pytest.raises(ValueError, match=f"local_crop_size {size} is not a multiple of patch_size {patch}; {remedy}"):
        check_crop_size("local_crop_size", size, patch)
    check_crop_size("local_crop_size", 3 * patch, patch)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"local_crop_size": 4}, "local_crop_size 4 is too small to blur; use at least 5"),
        ({"global_crop_scale": (0.5, 0.3)}, r"global_crop_scale \(0.5, 0.3\) must be"),
        ({"local_crop_scale": (0, 0.3)}, r"local_crop_scale \(0, 0.3\) must be"),
        ({"num_local_crops": -1}, "num_local_crops -1 is negative"),
    ],
)
def test_impossible_options(options, message):
    with pytest.raises(ValueError, match=message):
        MultiCropViews(**{"global_crop_size": 16, "local_crop_size": 8} | options)
