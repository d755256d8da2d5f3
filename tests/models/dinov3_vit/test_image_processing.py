"""Presets of the stock image processor."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from dinov3_hf.models.dinov3_vit.image_processing import IMAGE_STATISTICS, build_image_processor


@pytest.mark.parametrize("images", IMAGE_STATISTICS)
def test_pixels_are_scaled_and_normalized(images, tmp_path):
    build_image_processor(images, image_size=32).save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    assert "DINOv3ViT" in type(processor).__name__
    colour = (255, 51, 0)
    picture = Image.fromarray(np.full((40, 60, 3), colour, dtype=np.uint8))
    pixels = processor(picture, return_tensors="pt").pixel_values
    assert pixels.shape == (1, 3, 32, 32)
    mean, std = map(torch.tensor, IMAGE_STATISTICS[images])
    expected = (torch.tensor(colour) / 255 - mean) / std
    torch.testing.assert_close(pixels[0, :, 16, 16], expected, rtol=1e-4, atol=1e-4)


def test_statistics_are_those_of_the_released_models():
    assert IMAGE_STATISTICS["web"] == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert IMAGE_STATISTICS["satellite"] == ((0.430, 0.411, 0.296), (0.213, 0.156, 0.143))


def test_settings_override_the_preset():
    processor = build_image_processor(image_size=64, image_mean=[0.5], image_std=[0.25], do_resize=False)
    assert (list(processor.image_mean), list(processor.image_std), processor.do_resize) == ([0.5], [0.25], False)
    with pytest.raises(ValueError, match="there are no statistics for 'x-ray' images; use one of web, satellite"):
        build_image_processor("x-ray")
