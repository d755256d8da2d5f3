"""Every operation equals torchvision's float function of one image at a time; so does the whole chain."""

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as tv

from dinov3_hf.data import photometric
from dinov3_hf.data.photometric import (
    Distortions,
    Photometric,
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    gaussian_blur,
    remove_colour,
    solarize,
)
from tests.testing_utils import require_gpu

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TOLERANCE = {"rtol": 0, "atol": 2e-6}


def images(channels=3):
    """Random ones, and the corner cases of hue: grey, saturated, ties between channels."""
    pixels = torch.rand(12, channels, 14, 11)
    pixels[0] = pixels[0, :1]
    pixels[1] = (pixels[1] > 0.5).float()
    pixels[2] = torch.randint(0, 3, pixels[2].shape) / 2
    return pixels


@pytest.mark.parametrize(
    ("ours", "theirs", "low", "high"),
    [
        (adjust_brightness, tv.adjust_brightness, 0.0, 2.0),
        (adjust_contrast, tv.adjust_contrast, 0.0, 2.0),
        (adjust_saturation, tv.adjust_saturation, 0.0, 2.0),
        (adjust_hue, tv.adjust_hue, -0.5, 0.5),
        (gaussian_blur, lambda image, sigma: tv.gaussian_blur(image, [9, 9], [sigma, sigma]), 0.1, 2.0),
    ],
)
def test_operations_with_a_parameter(ours, theirs, low, high):
    pixels = images()
    values = torch.linspace(low, high, len(pixels))
    expected = torch.stack([theirs(image, value.item()) for image, value in zip(pixels, values, strict=True)])
    torch.testing.assert_close(ours(pixels, values), expected, **TOLERANCE)


def test_operations_without_a_parameter():
    pixels = images()
    torch.testing.assert_close(remove_colour(pixels), tv.rgb_to_grayscale(pixels, 3), **TOLERANCE)
    pixels[0, 0, 0] = 128 / 255  # the threshold itself is inverted
    torch.testing.assert_close(solarize(pixels), tv.solarize(pixels, 128 / 255), rtol=0, atol=0)


def reference(crop, parameters, i):
    """One crop, one operation after the other."""
    image = tv.to_dtype(crop, torch.float32, scale=True)
    colour = len(crop) == 3
    adjustments = [tv.adjust_brightness, tv.adjust_contrast]
    adjustments += [tv.adjust_saturation, tv.adjust_hue] if colour else []
    if parameters["jitter"][i]:
        for operation in parameters["jitter_order"][i]:
            if operation < len(adjustments):
                image = adjustments[operation](image, float(parameters["jitter_factor"][i, operation]))
    if parameters["greyscale"][i] and colour:
        image = tv.rgb_to_grayscale(image, 3)
    if sigma := float(parameters["blur_sigma"][i]):
        image = tv.gaussian_blur(image, [9, 9], [sigma, sigma])
    if parameters["solarize"][i]:
        image = tv.solarize(image, 128 / 255)
    return tv.normalize(image, MEAN[: len(crop)], STD[: len(crop)])


def batch(channels, num_crops=66, size=13):
    generator = torch.Generator().manual_seed(1)
    crops = torch.randint(0, 256, (num_crops, channels, size, size), dtype=torch.uint8, generator=generator)
    distortions = Distortions(solarize_probability=1.0)
    parameters = distortions.draw(num_crops - 2, np.random.default_rng(1))
    parameters["solarize"] = np.arange(num_crops) % 3 == 0
    return crops, parameters


@pytest.mark.parametrize("chunk_elements", [1, 2000, 2**18])
def test_chain_equals_torchvision_crop_by_crop(chunk_elements, monkeypatch):
    monkeypatch.setattr(photometric, "CPU_CHUNK_ELEMENTS", chunk_elements)
    crops, parameters = batch(3)
    expected = torch.stack([reference(crop, parameters, i) for i, crop in enumerate(crops)])
    output = Photometric(MEAN, STD)(crops, parameters)
    assert output.dtype == torch.float32
    assert not output.requires_grad
    torch.testing.assert_close(output, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_images_without_colour_skip_what_needs_it(channels):
    crops, parameters = batch(channels)
    photometric = Photometric([0.1 * (i + 1) for i in range(channels)], [0.2] * channels)
    output = photometric(crops, parameters)
    if channels == 1:
        expected = torch.stack([reference(crop, parameters, i) for i, crop in enumerate(crops)]) * STD[0] + MEAN[0]
        torch.testing.assert_close(output * 0.2 + 0.1, expected, rtol=0, atol=2e-5)
    parameters = parameters | {"greyscale": ~parameters["greyscale"]}
    torch.testing.assert_close(photometric(crops, parameters), output)


@pytest.mark.parametrize("channels", [2, 5])
def test_channels_without_colour_share_brightness_contrast_blur_and_solarizing(channels):
    crops, parameters = batch(channels)
    output = Photometric([0.0] * channels, [1.0] * channels)(crops, parameters)
    for i, crop in enumerate(crops):
        image = crop / 255
        for operation in parameters["jitter_order"][i] if parameters["jitter"][i] else ():
            factor = float(parameters["jitter_factor"][i, operation])
            if operation == 0:
                image = (image * factor).clamp(0, 1)
            elif operation == 1:  # about the mean of all channels, which keeps the balance between them
                image = (image * factor + image.mean() * (1 - factor)).clamp(0, 1)
        if sigma := float(parameters["blur_sigma"][i]):
            image = tv.gaussian_blur(image, [9, 9], [sigma, sigma])
        if parameters["solarize"][i]:
            image = torch.where(image >= 128 / 255, 1 - image, image)
        torch.testing.assert_close(output[i], image, rtol=0, atol=2e-5)


def test_without_distortions_only_normalisation_is_left():
    crops, parameters = batch(3)
    nothing = {name: np.zeros_like(values) for name, values in parameters.items()}
    expected = tv.normalize(crops / 255, MEAN, STD)
    torch.testing.assert_close(Photometric(MEAN, STD)(crops, nothing), expected)
    torch.testing.assert_close(Photometric(MEAN, STD)(crops), expected)
    torch.testing.assert_close(crops, batch(3)[0])  # the input stays


def test_no_crops():
    parameters = {name: values[:0] for name, values in batch(3)[1].items()}
    output = Photometric(MEAN, STD)(torch.empty(0, 3, 8, 8, dtype=torch.uint8), parameters)
    assert output.shape == (0, 3, 8, 8)


def test_autocast_changes_nothing():
    crops, parameters = batch(3)
    expected = Photometric(MEAN, STD)(crops, parameters)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(Photometric(MEAN, STD)(crops, parameters), expected, rtol=0, atol=0)


@require_gpu
def test_devices_agree():
    crops, parameters = batch(3)
    expected = Photometric(MEAN, STD)(crops, parameters)
    output = Photometric(MEAN, STD).cuda()(crops.cuda(), parameters)
    torch.testing.assert_close(output.cpu(), expected, rtol=0, atol=2e-5)
