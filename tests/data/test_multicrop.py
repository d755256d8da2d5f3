"""Crops equal torchvision's, their boxes have its distribution, their distortions the published frequencies."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional as tv

from dinov3_hf.data import multicrop
from dinov3_hf.data.decoding import UnreadableImage, open_image
from dinov3_hf.data.multicrop import (
    MultiCropViews,
    Window,
    check_crop_size,
    random_window,
    resize,
    sufficient_reduction,
)
from dinov3_hf.data.photometric import Distortions
from tests.data.bad_files import encode, photo, unreadable_contents
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
    ours = np.array([random_window(height, width, scale, rng) for _ in range(5000)])
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


def test_global_and_local_windows_have_their_own_scale(monkeypatch):
    scales = []
    monkeypatch.setattr(multicrop, "random_window", lambda *args: scales.append(args[2]) or random_window(*args))
    options = {"global_crop_scale": (0.4, 0.9), "local_crop_scale": (0.1, 0.3)}
    MultiCropViews(16, 8, num_local_crops=3, **options)(picture(), np.random.default_rng(0))
    assert scales == [(0.4, 0.9)] * 2 + [(0.1, 0.3)] * 3


@pytest.mark.parametrize("size", [(20, 200), (200, 20), (7, 31), (1, 9)])
def test_centre_window_where_no_box_fits(size):
    # With the whole area asked for, no attempt fits a long image, and the fallback is deterministic.
    expected = RandomResizedCrop.get_params(torch.empty(1, *size), [1.0, 1.0], [3 / 4, 4 / 3])
    assert random_window(*size, (1.0, 1.0), np.random.default_rng(0)) == expected


@pytest.mark.parametrize("box", [(3, 5, 30, 40), (0, 0, 45, 60), (10, 20, 8, 6)])
@pytest.mark.parametrize("channels", [1, 3])
def test_crops_equal_torchvisions(box, channels, monkeypatch):
    monkeypatch.setattr(multicrop, "random_window", lambda *_: Window(*box))
    image = picture(channels=channels)
    views = MultiCropViews(24, 12, num_local_crops=3, horizontal_flip=False)(image, np.random.default_rng(0))
    pixels = torch.from_numpy(image).permute(2, 0, 1).contiguous()
    for crops, size in ((views["global_crops"], 24), (views["local_crops"], 12)):
        expected = tv.resized_crop(pixels, *box, [size, size], InterpolationMode.BICUBIC, antialias=True)
        torch.testing.assert_close(crops, expected.expand_as(crops), rtol=0, atol=0)


def test_flips_mirror_half_of_the_crops(monkeypatch):
    monkeypatch.setattr(multicrop, "random_window", lambda *_: Window(0, 0, 45, 60))
    views, rng = MultiCropViews(16, 8, num_local_crops=998), np.random.default_rng(0)
    upright = MultiCropViews(16, 8, num_local_crops=998, horizontal_flip=False)(picture(), rng)["local_crops"][0]
    crops = views(picture(), rng)["local_crops"]
    flipped = (crops == upright.flip(-1)).flatten(1).all(1)
    assert torch.equal(~flipped, (crops == upright).flatten(1).all(1))
    assert 0.44 < flipped.float().mean() < 0.56


def float_crop(image, window, size):
    """torchvision's float crop of pixels (H, W, C), as uint8 values would be if they were not rounded."""
    pixels = torch.from_numpy(image).permute(2, 0, 1).float()
    crop = tv.resized_crop(pixels, *window, [size, size], InterpolationMode.BICUBIC, antialias=True)
    return crop.clamp_(0, 255)


def detailed_photo(height, width):
    """A photo with edges and fine texture: uint8 (height, width, 3)."""
    rows, columns = np.mgrid[:height, :width]
    texture = 20 * np.sin(rows / 3.1 + columns / 5.3) + 20 * (((rows // 16) + (columns // 24)) % 2)
    return (photo(height, width) * 0.7 + 20 + texture[..., None]).clip(0, 255).astype(np.uint8)


def test_crops_are_close_to_torchvisions_on_floats():
    image = detailed_photo(375, 500)
    rng = np.random.default_rng(0)
    for scale, size in (((0.32, 1.0), 256), ((0.05, 0.32), 112)):
        for _ in range(5):
            top, left, height, width = window = random_window(375, 500, scale, rng)
            part = torch.from_numpy(image).permute(2, 0, 1)[None, :, top : top + height, left : left + width]
            error = (resize(part, size)[0].float() - float_crop(image, window, size)).abs()
            assert error.mean() < 0.35  # grey levels: 0.25 for rounding once to whole ones; there are two passes
            assert error.max() <= 2


@pytest.mark.parametrize(("reduction", "size"), [(2, 256), (2, 100), (4, 64), (8, 48)])
def test_crops_of_reduced_jpegs_are_close_to_those_of_full_ones(reduction, size):
    content = encode(detailed_photo(800, 1000), "JPEG", quality=95)
    full = open_image(content, 3)
    window = Window(8 * 20, 8 * 10, 8 * 70, 8 * 80)
    views = MultiCropViews(size, 8, num_local_crops=0, horizontal_flip=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multicrop, "random_window", lambda *_: window)
        patch.setattr(multicrop, "sufficient_reduction", lambda *_: reduction)
        crop = views(full, np.random.default_rng(0))["global_crops"][0].float()
    expected = float_crop(full.decode(), window, size)
    moved = float_crop(full.decode(), window._replace(left=window.left + reduction), size)
    error = (crop - expected).abs().mean()
    assert error < 2  # grey levels; the same order as what a window one pixel further makes
    assert error < (crop - moved).abs().mean()


@pytest.mark.parametrize("reduction", [1, 2, 4, 8])
def test_windows_of_a_reduced_image(reduction):
    rng = np.random.default_rng(0)
    for _ in range(200):
        height, width = rng.integers(40, 3000, 2).tolist()
        window = random_window(height, width, (0.05, 1.0), rng)
        top, left, crop_height, crop_width = reduced = window.reduced(reduction)
        assert 0 <= top <= top + crop_height <= -(-height // reduction)
        assert 0 <= left <= left + crop_width <= -(-width // reduction)
        for edge, full in zip(reduced[:2], window[:2], strict=True):
            assert abs(edge - full / reduction) <= 0.5
        assert abs(crop_height - window.height / reduction) <= 1
    assert window.reduced(1) == window


@pytest.mark.parametrize(
    ("sides", "expected"),
    [((100,), 1), ((198,), 1), ((199,), 2), ((397,), 2), ((398,), 4), ((5000,), 8), ((5000, 210), 2), ((5000, 90), 1)],
)
def test_the_smallest_sufficient_size_is_decoded(sides, expected):
    windows = [Window(0, 0, side, side + 5) for side in sides] + [Window(0, 0, 9000, 9000)]
    sizes = [100] * len(sides) + [500]
    assert sufficient_reduction((1, 2, 4, 8), windows, sizes) == expected
    assert sufficient_reduction((1,), windows, sizes) == 1
    assert sufficient_reduction((1, 2, 4, 8), [], []) == 8


def test_large_jpegs_are_decoded_small_and_draw_the_same():
    image = photo(1500, 2000)
    views = MultiCropViews(32, 16, num_local_crops=4)
    decoded = []

    def watched(content):
        opened = open_image(content, 3)

        def decoder(reduction):
            decoded.append(reduction)
            return opened.decoder(reduction)

        return replace(opened, decoder=decoder)

    jpeg, png = (views(watched(encode(image, kind)), np.random.default_rng(0)) for kind in ("JPEG", "PNG"))
    assert decoded == [8, 1]
    for name in ("global_crops", "local_crops"):
        assert (jpeg[name].float() - png[name].float()).abs().mean() < 2
    np.testing.assert_array_equal(
        jpeg["local_photometric"]["jitter_factor"], png["local_photometric"]["jitter_factor"]
    )


def test_corrupt_images_are_noticed():
    with pytest.raises(UnreadableImage, match="truncated"):
        MultiCropViews(16, 8)(open_image(unreadable_contents()["truncated.jpg"], 3), np.random.default_rng(0))


@pytest.mark.parametrize(("gram_crop_size", "larger"), [(48, 48), (24, 24), (16, 24)])
def test_gram_crops_share_window_and_flip_with_the_global_ones(gram_crop_size, larger):
    image, rng = photo(90, 120), np.random.default_rng
    options = {"global_crop_size": 24, "local_crop_size": 12, "num_local_crops": 2}
    views = MultiCropViews(**options, gram_crop_size=gram_crop_size)
    for seed in range(8):
        sample = views(image, rng(seed))
        # The crop at the larger of the two sizes, which draws the same.
        base = MultiCropViews(**options | {"global_crop_size": larger})(image, rng(seed))
        for name, size in (("global_crops", 24), ("gram_crops", gram_crop_size)):
            assert sample[name].shape == (2, 3, size, size)
            expected = base["global_crops"] if size == larger else resize(base["global_crops"], size)
            assert (sample[name].int() - expected.int()).abs().max() <= 1  # a flip before or after rounds differently
        torch.testing.assert_close(sample["local_crops"], base["local_crops"], rtol=0, atol=0)
        np.testing.assert_array_equal(sample["global_photometric"]["jitter"], base["global_photometric"]["jitter"])
    assert "gram_crops" not in base


@pytest.mark.parity
@pytest.mark.parametrize(("case", "gram_crop_size"), [("plain", None), ("gram_no_distortions", 512)])
def test_shapes_are_the_recorded_ones(case, gram_crop_size):
    recorded = PUBLISHED["measured_shapes"][case]
    sample = MultiCropViews(256, 112, gram_crop_size=gram_crop_size)(picture(375, 500), np.random.default_rng(0))
    names = {"global_crops": "global_crops", "local_crops": "local_crops", "gram_crops": "gram_teacher_crops"}
    assert [name for name in names if name in sample] == [ours for ours, native in names.items() if native in recorded]
    for ours, native in names.items():
        if native in recorded:
            assert sample[ours].dtype == torch.uint8
            assert [list(crop.shape) for crop in sample[ours]] == recorded[native]


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
    num_draws = 5000
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


def test_pictures_of_any_kind_give_the_same_views():
    views = MultiCropViews(16, 8, num_local_crops=2)
    array = picture()

    def crops(image):
        return views(image, np.random.default_rng(0))["local_crops"]

    expected = crops(array)
    read_only = array.copy()
    read_only.flags.writeable = False
    for image in (Image.fromarray(array), array[:, ::-1][:, ::-1], read_only, open_image(encode(array, "PNG"), 3)):
        torch.testing.assert_close(crops(image), expected, rtol=0, atol=0)
    grey = Image.fromarray(array).convert("L")
    torch.testing.assert_close(crops(grey), crops(np.array(grey)[..., None]), rtol=0, atol=0)
    assert crops(grey).shape == (2, 1, 8, 8)
    with pytest.raises(ValueError, match="uint8 pixels, not float64"):
        crops(np.zeros((4, 5, 3)))


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
        ({"gram_crop_size": 0}, "gram_crop_size 0 must be positive"),
    ],
)
def test_impossible_options(options, message):
    with pytest.raises(ValueError, match=message):
        MultiCropViews(**{"global_crop_size": 16, "local_crop_size": 8} | options)
