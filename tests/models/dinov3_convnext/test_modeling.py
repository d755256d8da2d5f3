"""The ConvNeXt's forward: what goes in, what comes out, and that its options change what they should."""

import pytest
import torch
from torch import nn

from dinov3_hf.models.dinov3_convnext.configuration_dinov3_convnext import DINOv3ConvNextConfig
from dinov3_hf.models.dinov3_convnext.modeling_dinov3_convnext import DINOv3ConvNextBackbone, DINOv3ConvNextModel
from tests.models.dinov3_convnext.tiny import ALL_VARIANTS, images, randomize, tiny_config, tiny_model

WIDTHS = [8, 12, 16, 24]
# Feature maps of images of 96 x 64 pixels.
MAPS = [(2, 8, 24, 16), (2, 12, 12, 8), (2, 16, 6, 4), (2, 24, 3, 2)]
ON_PATCHES = [(2, width, 6, 4) for width in WIDTHS]


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


def backbone_of(model: DINOv3ConvNextModel, **fields) -> DINOv3ConvNextBackbone:
    backbone = DINOv3ConvNextBackbone(tiny_config(patch_size=model.config.patch_size, **fields)).eval()
    state = model.state_dict()
    backbone.load_state_dict({name: tensor for name, tensor in state.items() if not name.startswith("layer_norm.")})
    return backbone


@pytest.mark.parametrize("fields", ALL_VARIANTS.values(), ids=ALL_VARIANTS)
def test_shapes(fields):
    model = tiny_model(**fields)
    config = model.config
    pixels = images(channels=config.num_channels)
    output = model(pixels, output_hidden_states=True)
    num_positions = (96 // config.stride) * (64 // config.stride)
    assert output.last_hidden_state.shape == (2, 1 + num_positions, config.hidden_size)
    assert torch.equal(output.pooler_output, output.last_hidden_state[:, 0])
    assert output.hidden_states[0] is pixels
    expected = [(2, width, 24 >> i, 16 >> i) for i, width in enumerate(config.hidden_sizes)]
    assert [states.shape for states in output.hidden_states[1:]] == expected
    assert model(pixels).hidden_states is None


def test_the_pooled_token_is_the_mean_before_the_norm():
    model = tiny_model()
    output = model(images(), output_hidden_states=True)
    positions = output.hidden_states[-1].flatten(2).transpose(1, 2)
    tokens = torch.cat((positions.mean(1, keepdim=True), positions), dim=1)
    torch.testing.assert_close(output.last_hidden_state, model.layer_norm(tokens))


def test_a_crop_list_gives_what_separate_calls_give():
    model = tiny_model()
    crops = [images(3), images(5, 64, 64), images(1, 32, 128)]
    together = model(crops, bool_masked_pos=[None] * 3, output_hidden_states=True)
    for crop, output in zip(crops, together, strict=True):
        alone = model(crop, output_hidden_states=True)
        assert torch.equal(output.last_hidden_state, alone.last_hidden_state)
        assert all(map(torch.equal, output.hidden_states, alone.hidden_states))


def test_masks_are_ignored():
    model = tiny_model()
    mask = torch.ones(2, 24, dtype=torch.bool)
    assert torch.equal(model(images(), bool_masked_pos=mask).pooler_output, model(images()).pooler_output)


@pytest.mark.parametrize("fields", ALL_VARIANTS.values(), ids=ALL_VARIANTS)
def test_every_parameter_matters_in_training(fields):
    model = tiny_model(
        **fields,
    ).train()
    tokens = model(images(8, channels=model.config.num_channels)).last_hidden_state
    (tokens * torch.randn(tokens.shape[-1])).square().sum().backward()
    for name, gradient in gradients(model).items():
        assert torch.isfinite(gradient).all(), name
        assert gradient.abs().max() > 0, name


def test_images_do_not_see_each_other():
    model, pixels = tiny_model(), images(3)
    torch.testing.assert_close(model(pixels).last_hidden_state[1:2], model(pixels[1:2]).last_hidden_state)


def test_pixels_beyond_the_last_position_are_dropped_by_the_stem():
    model, pixels = tiny_model(), images(2, 99, 67)
    assert torch.equal(model(pixels).last_hidden_state, model(pixels[:, :, :96, :64]).last_hidden_state)


def test_no_layer_scale_has_no_gamma():
    names = tiny_model(layer_scale_init_value=None).state_dict()
    assert not any("gamma" in name for name in names)
    assert sum("gamma" in name for name in tiny_model().state_dict()) == 5
    # A LayerScale of zeros is one: blocks that begin as the identity, as transformers builds them.
    model = DINOv3ConvNextModel(tiny_config(layer_scale_init_value=0.0))
    features = torch.randn(1, 8, 4, 4)
    assert model.stages[0].layers[0].gamma.eq(0).all()
    assert torch.equal(model.stages[0].layers[0](features), features)


# ---- feature maps ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("n", [1, 2, 4, [0, 2], [3, 1], (1,)])
def test_intermediate_layers(n, norm):
    model = tiny_model()
    output = model(images(), output_hidden_states=True)
    stages = list(range(4))[-n:] if isinstance(n, int) else sorted(n)
    layers = model.get_intermediate_layers(images(), n, return_class_token=True, return_extra_tokens=True, norm=norm)
    maps = model.get_intermediate_layers(images(), n, reshape=True, norm=norm)
    for stage, (patches, cls, extra), features in zip(stages, layers, maps, strict=True):
        states = output.hidden_states[stage + 1]
        tokens = torch.cat((states.mean((2, 3))[:, None], states.flatten(2).transpose(1, 2)), dim=1)
        if norm and stage == 3:
            tokens = model.layer_norm(tokens)
        torch.testing.assert_close(torch.cat((cls[:, None], patches), dim=1), tokens)
        assert extra.shape == (2, 0, WIDTHS[stage])
        assert features.shape == MAPS[stage] and features.is_contiguous()
        assert torch.equal(features.flatten(2).transpose(1, 2), patches)


def test_intermediate_layers_on_a_patch_grid():
    """The map is resized before the norm; the mean is taken before that."""
    model, whole = tiny_model(patch_size=16), tiny_model()
    maps = whole.get_intermediate_layers(images(), 4, reshape=True, return_class_token=True, norm=False)
    found = model.get_intermediate_layers(images(), 4, reshape=True, return_class_token=True)
    for stage, ((features, cls), (resized, pooled)) in enumerate(zip(maps, found, strict=True)):
        expected = nn.functional.interpolate(features, (6, 4), mode="bilinear", antialias=True)
        if stage == 3:
            expected = model.layer_norm(expected.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            cls = model.layer_norm(cls)
        torch.testing.assert_close(resized, expected)
        torch.testing.assert_close(pooled, cls)
    assert torch.equal(model(images()).last_hidden_state, whole(images()).last_hidden_state)


def test_a_forward_on_a_patch_grid():
    """What distillation trains is what `get_intermediate_layers` gives of the saved model."""
    model, with_patches = tiny_model(), tiny_model(patch_size=16)
    crops = [images(), images(2, 64, 64)]
    for pixels, output in zip(crops, model(crops, patch_size=16), strict=True):
        [(patches, cls)] = with_patches.get_intermediate_layers(pixels, 1, return_class_token=True)
        assert torch.equal(output.last_hidden_state, torch.cat((cls[:, None], patches), dim=1))
        assert torch.equal(output.pooler_output, model(pixels).pooler_output)


@pytest.mark.parametrize("n", [0, 5, -1, [], [4], [-1]])
def test_intermediate_layers_that_do_not_exist(n):
    with pytest.raises(ValueError, match="does not name stages of this model; it has 4, counted from 0"):
        tiny_model().get_intermediate_layers(images(), n)


def test_backbone():
    model = tiny_model()
    states = model(images(), output_hidden_states=True).hidden_states
    backbone = backbone_of(model, out_indices=[0, 1, 4])
    output = backbone(images(), output_hidden_states=True)
    assert all(map(torch.equal, output.hidden_states, states))
    assert all(map(torch.equal, output.feature_maps, [states[0], states[1], states[4]]))
    assert backbone.channels == [3, 8, 24]
    assert backbone(images()).hidden_states is None
    assert backbone(images(), return_dict=False)[0][2].shape == MAPS[3]


def test_backbone_on_a_patch_grid():
    model = tiny_model(patch_size=16)
    backbone = backbone_of(model, out_features=["stage1", "stage2", "stage3", "stage4"])
    output = backbone(images(), output_hidden_states=True)
    assert [features.shape for features in output.feature_maps] == ON_PATCHES
    expected = model.get_intermediate_layers(images(), 4, reshape=True, norm=False)
    assert all(map(torch.equal, output.feature_maps, expected))
    assert [states.shape for states in output.hidden_states[1:]] == MAPS
    # What is called the stem are the images.
    assert backbone_of(model, out_features=["stem"])(images()).feature_maps[0].shape == (2, 3, 6, 4)


def test_stages_after_the_last_one_asked_for_are_not_computed():
    computed = []
    model = tiny_model()
    backbone = backbone_of(model, out_features=["stage2"])
    for network in (model, backbone):
        for index, stage in enumerate(network.stages):
            stage.register_forward_hook(lambda *_, index=index: computed.append(index))
    backbone(images())
    model.get_intermediate_layers(images(), [1])
    assert computed == [0, 1, 0, 1]


def test_tuples_and_defaults_of_the_configuration():
    model = tiny_model(output_hidden_states=True)
    output = model(images())
    last, pooled, states = model(images(), return_dict=False)
    assert torch.equal(last, output.last_hidden_state) and torch.equal(pooled, output.pooler_output)
    assert len(states) == 5
    assert model(images(), output_hidden_states=False).hidden_states is None


# ---- training ----------------------------------------------------------------------------------------------------


def test_drop_path_rates_rise_linearly_over_all_blocks():
    model = DINOv3ConvNextModel(tiny_config(depths=[2, 1, 3, 1], drop_path_rate=0.6))
    rates = [layer.drop_path_rate for stage in model.stages for layer in stage.layers]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    one = DINOv3ConvNextModel(DINOv3ConvNextConfig(hidden_sizes=[8], depths=[1], drop_path_rate=0.6))
    assert one.stages[0].layers[0].drop_path_rate == 0


def test_drop_path_skips_whole_images_independently():
    """Per image: the branch divided by 1 - p with probability 1 - p, else nothing."""
    layer = tiny_model(drop_path_rate=0.3).stages[3].layers[0]
    assert layer.drop_path_rate == pytest.approx(0.3)
    features = torch.randn(24, 3, 2, generator=torch.Generator().manual_seed(0)).expand(4000, -1, -1, -1)
    branch = layer(features[:1]) - features[:1]
    added = (layer.train()(features) - features).flatten(1)  # (4000, D * h * w)
    kept = added.abs().amax(1) > 0
    torch.testing.assert_close(added[kept], (branch / 0.7).flatten(1).expand(int(kept.sum()), -1))
    assert kept.float().mean().item() == pytest.approx(0.7, abs=0.03)  # four standard errors
    assert (kept[1:] == kept[:-1]).float().mean().item() == pytest.approx(0.7**2 + 0.3**2, abs=0.04)
    assert (layer.eval()(features[:2]) - features[:2]).flatten(1).equal((branch).flatten(1).expand(2, -1))


def test_given_numbers_decide_which_images_a_block_skips():
    model = tiny_model(drop_path_rate=0.5).train()
    num_blocks = sum(model.config.depths)
    crops = [images(4), images(6, 32, 32)]
    draws = [torch.rand(num_blocks, len(pixels), generator=torch.Generator().manual_seed(5)) for pixels in crops]
    expected = model(crops, draws=draws)
    assert not torch.equal(model(crops)[0].pooler_output, expected[0].pooler_output)
    for pixels, drawn, whole in zip(crops, draws, expected, strict=True):
        for rows in (slice(0, 1), slice(1, None)):
            torch.testing.assert_close(
                model(pixels[rows], draws=[drawn[:, rows]]).pooler_output, whole.pooler_output[rows]
            )
    model.eval()
    assert torch.equal(model(crops, draws=draws)[0].pooler_output, model(crops)[0].pooler_output)
    layer = model.train().stages[3].layers[0]
    features = torch.randn(3, 24, 3, 2)
    skipped = layer(features, torch.tensor([layer.drop_path_rate - 1e-3, layer.drop_path_rate, 0.99])) == features
    assert skipped.flatten(1).all(1).tolist() == [True, False, False]


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["training_options", "no_layer_scale"])
def test_gradient_checkpointing_changes_nothing(name, reentrant):
    model = tiny_model(**{**ALL_VARIANTS[name], "drop_path_rate": 0.5}).train()
    crops = [images(4).requires_grad_(), images(6, 32, 32).requires_grad_()]

    def step() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        torch.manual_seed(3)
        loss = sum(output.last_hidden_state.square().sum() for output in model(crops))
        loss.backward()
        return loss.detach(), gradients(model)

    expected = step()
    computed = []
    model.stages[2].layers[0].layer_norm.register_forward_hook(lambda *_: computed.append(1))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert model.is_gradient_checkpointing
    torch.testing.assert_close(step(), expected, rtol=0, atol=0)
    assert len(computed) == 4  # each of two crop groups twice
    model.gradient_checkpointing_disable()
    step()
    assert len(computed) == 6


# ---- precision, layout, initialisation ---------------------------------------------------------------------------


@pytest.mark.parametrize("fields", ALL_VARIANTS.values(), ids=ALL_VARIANTS)
def test_bfloat16_weights(fields):
    model = tiny_model(**fields)
    pixels = images(channels=model.config.num_channels)
    expected = [model(pixels).last_hidden_state, model.get_intermediate_layers(pixels)[0]]
    model.bfloat16()
    for one, other in zip(
        [model(pixels).last_hidden_state, model.get_intermediate_layers(pixels)[0]], expected, strict=True
    ):
        assert one.dtype == torch.bfloat16
        assert (one.float() - other).abs().max() < 0.1 * other.abs().max()
    assert model.train()(pixels).last_hidden_state.dtype == torch.bfloat16


def test_autocast():
    model = tiny_model(drop_path_rate=0.5).train()
    torch.manual_seed(0)
    expected = model(images(4)).last_hidden_state
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(images(4)).last_hidden_state
    error = (found.float() - expected).abs().max()
    assert 1e-4 < error < 0.1 * expected.abs().max()


def test_channels_last_images_give_the_same():
    model = tiny_model()
    found = model(images().contiguous(memory_format=torch.channels_last), output_hidden_states=True)
    assert found.hidden_states[-1].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found.last_hidden_state, model(images()).last_hidden_state)


def test_initialization():
    """Matrices and convolutions: normal of 0.02; biases 0; norms 1 and 0; LayerScale as configured."""
    config = DINOv3ConvNextConfig(hidden_sizes=[32, 64, 96, 128], depths=[1] * 4, layer_scale_init_value=1e-3)
    model = DINOv3ConvNextModel(config)
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            error = 5 * 0.02 / (2 * module.weight.numel()) ** 0.5
            assert module.weight.std().item() == pytest.approx(0.02, abs=error), name
            assert module.weight.mean().item() == pytest.approx(0, abs=2 * error), name
            assert module.bias.eq(0).all(), name
        elif isinstance(module, nn.LayerNorm):
            assert module.weight.eq(1).all() and module.bias.eq(0).all(), name
    assert all(layer.gamma.eq(1e-3).all() for stage in model.stages for layer in stage.layers)


# ---- bad input ---------------------------------------------------------------------------------------------------

BAD_INPUT = {
    "channels": (images(channels=4), r"shape \(2, 4, 96, 64\) are not \(images, 3, .*set_num_channels"),
    "no batch": (images()[0], r"shape \(3, 96, 64\) are not"),
    "small": (images(height=31), r"images of \(31, 64\) pixels are smaller than the stride of 32 pixels"),
}


@pytest.mark.parametrize(("pixels", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input(pixels, message):
    with pytest.raises(ValueError, match=message):
        tiny_model()(pixels)


def test_images_smaller_than_a_patch():
    model = tiny_model(patch_size=72)
    assert model(images()).last_hidden_state.shape == (2, 7, 24)
    with pytest.raises(ValueError, match=r"images of \(96, 64\) pixels are smaller than one patch of 72"):
        model.get_intermediate_layers(images())


def test_a_model_copies_whole():
    model = randomize(DINOv3ConvNextModel(tiny_config()))
    assert not list(model.buffers())
    twin = DINOv3ConvNextModel(tiny_config())
    twin.load_state_dict(model.double().state_dict())
    assert torch.equal(twin.eval()(images()).pooler_output, model.float().eval()(images()).pooler_output)
