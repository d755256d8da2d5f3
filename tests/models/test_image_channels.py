"""Backbones that are given images of other channels."""

import pytest
import torch

from dinov3_hf.models.backbone_parts import convert_patch_embedding_channels
from dinov3_hf.models.dinov3_convnext.configuration_dinov3_convnext import DINOv3ConvNextConfig
from dinov3_hf.models.dinov3_convnext.modeling_dinov3_convnext import DINOv3ConvNextModel
from dinov3_hf.models.dinov3_vit.configuration_dinov3_vit import DINOv3ViTConfig
from dinov3_hf.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTModel
from dinov3_hf.models.image_channels import ChannelStatistics, change_channels, statistics_for
from tests.testing_utils import require_package

RGB = ChannelStatistics((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def vit() -> DINOv3ViTModel:
    config = DINOv3ViTConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, patch_size=8
    )
    return DINOv3ViTModel(config).eval()


def convnext() -> DINOv3ConvNextModel:
    config = DINOv3ConvNextConfig(hidden_sizes=[8, 8, 12, 16], depths=[1, 1, 1, 1], layer_scale_init_value=0.5)
    return DINOv3ConvNextModel(config).eval()


def normalised(pixels: torch.Tensor, statistics: ChannelStatistics) -> torch.Tensor:
    mean, std = (torch.tensor(values)[:, None, None] for values in statistics)
    return (pixels - mean) / std


@pytest.mark.parametrize("build", [vit, convnext])
@pytest.mark.parametrize("grey", [statistics_for(1, RGB), ChannelStatistics((0.2,), (0.31,))])
def test_a_grey_image_gives_what_it_gave_as_three_equal_channels(build, grey):
    model = build()
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.1)
    torch.nn.init.normal_(model.get_input_embeddings().bias, std=0.1)
    pixels = torch.rand(2, 1, 64, 96)
    with torch.no_grad():
        expected = model(normalised(pixels.expand(-1, 3, -1, -1), RGB)).last_hidden_state
        change_channels(model, 1, RGB, grey)
        found = model(normalised(pixels, grey)).last_hidden_state
    assert model.config.num_channels == model.get_input_embeddings().in_channels == 1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)


def test_statistics_of_new_channels():
    mean, std = statistics_for(1, RGB)
    assert mean == (pytest.approx(0.449),) and std == (pytest.approx(0.226),)
    assert statistics_for(5, RGB).mean == (0.485, 0.456, 0.406, 0.485, 0.456)
    assert statistics_for(3, ChannelStatistics((0.5,), (0.2,))) == ((0.5,) * 3, (0.2,) * 3)


@require_package("timm")
@pytest.mark.parametrize("num_channels", [1, 2, 3, 4, 13])
def test_the_rule_is_that_of_timm(num_channels):
    from timm.models import adapt_input_conv

    weight = torch.randn(4, 3, 8, 8)
    found = convert_patch_embedding_channels(weight, num_channels)
    torch.testing.assert_close(found, adapt_input_conv(num_channels, weight), rtol=1e-6, atol=1e-6)


def test_several_channels_keep_the_bias_and_take_images_of_theirs():
    model = vit()
    bias = model.get_input_embeddings().bias.detach().clone()
    change_channels(model, 4, RGB, statistics_for(4, RGB))
    assert torch.equal(model.get_input_embeddings().bias, bias)
    assert model(torch.rand(1, 4, 16, 16)).pooler_output.isfinite().all()


def test_the_same_number_of_channels_changes_nothing():
    model = vit()
    weight = model.get_input_embeddings().weight
    change_channels(model, 3, RGB, ChannelStatistics((0.5,) * 3, (0.5,) * 3))
    assert model.get_input_embeddings().weight is weight
