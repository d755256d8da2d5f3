"""The ViT's forward: what goes in, what comes out, and that its short cuts change nothing."""

import pytest
import torch
from torch import nn

from dinov3_hf.models.dinov3_vit.configuration_dinov3_vit import DINOv3ViTConfig
from dinov3_hf.models.dinov3_vit.layers import DINOv3ViTRMSNorm
from dinov3_hf.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTBackbone, DINOv3ViTModel
from tests.models.dinov3_vit.tiny import ALL_VARIANTS, images, random_mask, randomize, tiny_config, tiny_model

CROPS = {"global": (3, 16, 16), "local": (5, 8, 12), "wide": (1, 4, 24)}


def crop_list() -> list[torch.Tensor]:
    return [images(*size) for size in CROPS.values()]


def masks_of(crops: list[torch.Tensor]) -> list[torch.Tensor | None]:
    return [random_mask(len(crops[0]), 16), None, random_mask(len(crops[2]), 6)]


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


@pytest.mark.parametrize("fields", ALL_VARIANTS.values(), ids=ALL_VARIANTS)
def test_shapes(fields):
    model = tiny_model(**fields)
    config = model.config
    output = model(images(2, 16, 12, config.num_channels), output_hidden_states=True, output_attentions=True)
    num_tokens = 1 + config.num_register_tokens + 4 * 3
    assert output.last_hidden_state.shape == (2, num_tokens, 32)
    assert torch.equal(output.pooler_output, output.last_hidden_state[:, 0])
    assert [states.shape for states in output.hidden_states] == [(2, num_tokens, 32)] * 4
    assert [attention.shape for attention in output.attentions] == [(2, 2, num_tokens, num_tokens)] * 3
    for attention in output.attentions:
        torch.testing.assert_close(attention.sum(-1), torch.ones(2, 2, num_tokens))


@pytest.mark.parametrize("fields", ALL_VARIANTS.values(), ids=ALL_VARIANTS)
def test_a_crop_list_gives_what_separate_calls_give(fields):
    model = tiny_model(**{**fields, "num_channels": 3})
    crops = crop_list()
    together = model(crops, bool_masked_pos=masks_of(crops), output_hidden_states=True, output_attentions=True)
    for crop, mask, output in zip(crops, masks_of(crops), together, strict=True):
        alone = model(crop, mask, output_hidden_states=True, output_attentions=True)
        torch.testing.assert_close(output.last_hidden_state, alone.last_hidden_state)
        torch.testing.assert_close(output.pooler_output, alone.pooler_output)
        torch.testing.assert_close(output.hidden_states, alone.hidden_states)
        torch.testing.assert_close(output.attentions, alone.attentions)


def test_a_crop_list_has_the_gradients_of_separate_calls():
    model = tiny_model().train()
    model.config.pos_embed_rescale = None  # its draws would differ
    crops = crop_list()
    sum(output.last_hidden_state.square().sum() for output in model(crops)).backward()
    together = gradients(model)
    for crop in crops:
        model(crop).last_hidden_state.square().sum().backward()
    torch.testing.assert_close(together, gradients(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fields", ALL_VARIANTS.values(), ids=ALL_VARIANTS)
def test_every_parameter_matters_in_training(fields):
    model = tiny_model(**fields).train()
    channels = model.config.num_channels
    crops = [images(4, 16, 12, channels), images(6, 8, 8, channels)]
    outputs = model(crops, bool_masked_pos=[random_mask(4), None])
    weights = torch.randn(32)
    sum((output.last_hidden_state * weights).square().sum() for output in outputs).backward()
    for name, gradient in gradients(model).items():
        assert torch.isfinite(gradient).all(), name
        assert gradient.numel() == 0 or gradient.abs().max() > 0, name


def test_pixels_beyond_the_last_whole_patch_are_dropped():
    model = tiny_model()
    pixels = images(2, 19, 15)
    assert torch.equal(model(pixels).last_hidden_state, model(pixels[:, :, :16, :12]).last_hidden_state)


def test_masked_patches_are_replaced_before_the_blocks():
    model = tiny_model()
    pixels, mask = images(), random_mask()
    embeddings = model(pixels, mask, output_hidden_states=True).hidden_states[0]
    patches = embeddings[:, model.config.num_prefix_tokens :]
    assert torch.equal(patches[mask], model.embeddings.mask_token[0].expand(int(mask.sum()), -1))
    whole = model(pixels, output_hidden_states=True).hidden_states[0]
    assert torch.equal(patches[~mask], whole[:, model.config.num_prefix_tokens :][~mask])
    # What a masked patch showed has no influence.
    other = pixels.clone()
    blocks = other.unfold(2, 4, 4).unfold(3, 4, 4)  # (B, C, 4, 3, 4, 4), a view
    for image, row, column in mask.unflatten(1, (4, 3)).nonzero().tolist():
        blocks[image, :, row, column] = 9.0
    assert not torch.equal(model(other).last_hidden_state, model(pixels).last_hidden_state)
    assert torch.equal(model(other, mask).last_hidden_state, model(pixels, mask).last_hidden_state)


def test_the_mask_token_has_a_zero_gradient_without_a_mask():
    model = tiny_model().train()
    model(images()).last_hidden_state.sum().backward()
    assert torch.equal(model.embeddings.mask_token.grad, torch.zeros(1, 1, 32))


@pytest.mark.parametrize("fields", ALL_VARIANTS.values(), ids=ALL_VARIANTS)
def test_images_do_not_see_each_other(fields):
    model = tiny_model(**fields)
    pixels = images(3, 16, 12, model.config.num_channels)
    torch.testing.assert_close(model(pixels).last_hidden_state[1:2], model(pixels[1:2]).last_hidden_state)


def test_norms_of_cls_and_patches():
    model = tiny_model(untie_cls_and_patch_norms=True, untie_global_and_local_cls_norm=True)
    model.config.pos_embed_rescale = None
    crops = crop_list()[:2]
    for training in (False, True):
        model.train(training)
        for index, output in enumerate(model(crops, output_hidden_states=True)):
            prefix, patches = output.hidden_states[-1].tensor_split([3], dim=1)
            prefix_norm = model.local_cls_norm if training and index == 1 else model.cls_norm
            torch.testing.assert_close(output.last_hidden_state[:, :3], prefix_norm(prefix))
            torch.testing.assert_close(output.last_hidden_state[:, 3:], model.norm(patches))
        # The local norm belongs to lists alone.
        single = model(crops[1], output_hidden_states=True)
        torch.testing.assert_close(single.last_hidden_state[:, :3], model.cls_norm(single.hidden_states[-1][:, :3]))


def test_rms_norm():
    norm = DINOv3ViTRMSNorm(8, eps=1e-5)
    with torch.no_grad():
        norm.weight.copy_(torch.arange(8.0))
    states = torch.randn(3, 8)
    torch.testing.assert_close(norm(states), nn.functional.rms_norm(states, (8,), norm.weight, 1e-5))
    # The statistics are computed in float32; only the weight's product is in bfloat16.
    wide = nn.functional.rms_norm(states.bfloat16().float(), (8,), None, 1e-5).bfloat16()
    assert torch.equal(norm.bfloat16()(states.bfloat16()), wide * norm.weight)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("n", [1, 2, [0, 2], [2, 0], (1,)])
def test_intermediate_layers(n, norm):
    model = tiny_model(untie_cls_and_patch_norms=True)
    pixels = images()
    output = model(pixels, output_hidden_states=True)
    blocks = list(range(3))[-n:] if isinstance(n, int) else sorted(n)
    layers = model.get_intermediate_layers(pixels, n, return_class_token=True, return_extra_tokens=True, norm=norm)
    assert len(layers) == len(blocks)
    for block, (patches, cls, registers) in zip(blocks, layers, strict=True):
        prefix, expected = output.hidden_states[block + 1].tensor_split([3], dim=1)
        if norm:
            prefix, expected = model.cls_norm(prefix), model.norm(expected)
        torch.testing.assert_close(patches, expected)
        torch.testing.assert_close(torch.cat((cls[:, None], registers), 1), prefix)
    maps = model.get_intermediate_layers(pixels, n, reshape=True, norm=norm)
    assert torch.equal(maps[-1], layers[-1][0].transpose(1, 2).reshape(2, 32, 4, 3))


@pytest.mark.parametrize("n", [0, 4, -1, [], [3], [-1]])
def test_intermediate_layers_that_do_not_exist(n):
    with pytest.raises(ValueError, match="does not name blocks of this model; it has 3"):
        tiny_model().get_intermediate_layers(images(), n)


def test_backbone():
    model = tiny_model()
    fields = {"out_indices": [0, 1, 3], "return_class_token": True}
    for normalized in (True, False):
        backbone = DINOv3ViTBackbone(tiny_config(apply_layernorm=normalized, **fields)).eval()
        backbone.load_state_dict(model.state_dict())
        output = backbone(images(), output_hidden_states=True, output_attentions=True)
        whole = model(images(), output_hidden_states=True, output_attentions=True)
        torch.testing.assert_close(output.hidden_states, whole.hidden_states)
        torch.testing.assert_close(output.attentions, whole.attentions)
        for index, features, cls in zip((0, 1, 3), output.feature_maps, output.cls_tokens, strict=True):
            states = whole.hidden_states[index]
            states = model.norm(states) if normalized or index == 3 else states
            torch.testing.assert_close(features, states[:, 3:].transpose(1, 2).reshape(2, 32, 4, 3))
            torch.testing.assert_close(cls, states[:, 0])
    flat = DINOv3ViTBackbone(tiny_config(reshape_hidden_states=False, out_features=["stage2"])).eval()
    assert flat(images()).feature_maps[0].shape == (2, 12, 32)
    assert flat.channels == [32]
    flat.config.class_token_in_feature_maps = flat.config.return_class_token = True
    with_cls = flat(images())
    assert with_cls.feature_maps[0].shape == (2, 1 + 12, 32)
    assert torch.equal(with_cls.feature_maps[0][:, 0], with_cls.cls_tokens[0])


def test_tuples():
    model = tiny_model()
    output = model(images(), output_hidden_states=True)
    last, pooled, states = model(images(), output_hidden_states=True, return_dict=False)
    assert torch.equal(last, output.last_hidden_state) and torch.equal(pooled, output.pooler_output)
    assert len(states) == 4
    backbone = DINOv3ViTBackbone(model.config).eval()
    assert backbone(images(), return_dict=False)[0][0].shape == (2, 32, 4, 3)


def test_settings_of_the_configuration_are_the_defaults():
    model = tiny_model(output_hidden_states=True, output_attentions=False)
    assert model(images()).hidden_states is not None
    assert model(images(), output_hidden_states=False).hidden_states is None


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["training_options", "rmsnorm_swiglu_no_layer_scale"])
def test_gradient_checkpointing_changes_nothing(name, reentrant):
    model = tiny_model(**{**ALL_VARIANTS[name], "drop_path_rate": 0.5}).train()
    crops = [images(4).requires_grad_(), images(6, 8, 8).requires_grad_()]

    def step() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        torch.manual_seed(3)
        loss = sum(output.last_hidden_state.square().sum() for output in model(crops, [random_mask(4), None]))
        loss.backward()
        return loss.detach(), gradients(model)

    expected = step()
    recomputed = []
    model.layer[0].norm1.register_forward_hook(lambda *_: recomputed.append(1))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert model.is_gradient_checkpointing
    torch.testing.assert_close(step(), expected, rtol=0, atol=0)
    assert len(recomputed) == 2
    model.gradient_checkpointing_disable()
    step()
    assert len(recomputed) == 3


@pytest.mark.parametrize("fields", ALL_VARIANTS.values(), ids=ALL_VARIANTS)
def test_bfloat16_weights(fields):
    model = tiny_model(**fields)
    pixels = images(2, 16, 12, model.config.num_channels)
    expected = model(pixels).last_hidden_state
    found = model.bfloat16()(pixels).last_hidden_state
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize("drop_path_rate", [0.0, 0.5])
def test_autocast_keeps_the_residual_stream_in_float32(drop_path_rate):
    model = tiny_model(drop_path_rate=drop_path_rate).train()
    pixels = images(4)
    torch.manual_seed(0)
    expected = model(pixels).last_hidden_state
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(pixels, output_hidden_states=True)
    assert {states.dtype for states in output.hidden_states} == {torch.float32}
    error = (output.last_hidden_state.float() - expected).abs().max()
    assert 1e-4 < error < 0.1 * expected.abs().max()


def test_initialization():
    """Linear: normal of 0.02; patches: uniform to 1 / sqrt(C p^2); tokens: normal of 0.02, mask token 0."""
    config = DINOv3ViTConfig(hidden_size=256, num_attention_heads=4, num_hidden_layers=2, num_register_tokens=4)
    config.layerscale_value = 1e-3
    model = DINOv3ViTModel(config)
    embeddings, block = model.embeddings, model.layer[0]
    for linear in (block.attention.q_proj, block.attention.o_proj, block.mlp.up_proj, block.mlp.down_proj):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert linear.bias.eq(0).all()
    bound = (3 * 16 * 16) ** -0.5
    for parameter in (embeddings.patch_embeddings.weight, embeddings.patch_embeddings.bias):
        assert 0.9 * bound < parameter.abs().max() <= bound
    assert embeddings.patch_embeddings.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert embeddings.cls_token.std().item() == pytest.approx(0.02, rel=0.2)
    assert embeddings.register_tokens.std().item() == pytest.approx(0.02, rel=0.2)
    assert embeddings.mask_token.eq(0).all()
    assert block.layer_scale1.lambda1.eq(1e-3).all() and block.layer_scale2.lambda1.eq(1e-3).all()
    assert block.norm1.weight.eq(1).all() and block.norm1.bias.eq(0).all()


BAD_INPUT = {
    "channels": (images(channels=4), None, r"shape \(2, 4, 16, 12\) are not \(images, 3, .*set_num_channels"),
    "no batch": (images()[0], None, r"shape \(3, 16, 12\) are not"),
    "small": (images(height=3), None, r"images of \(3, 12\) pixels are smaller than one patch of 4"),
    "mask": (images(), random_mask(2, 9), r"shape \(2, 9\) does not fit 2 images of 4 x 3 patches"),
    "mask batch": (images(), random_mask(1), r"shape \(1, 12\) does not fit 2 images"),
    "one mask for a list": ([images(), images()], random_mask(), "must be a list of 2 masks"),
    "too few masks": ([images(), images()], [None], "must be a list of 2 masks"),
    "masks for one batch": (images(), [None, None], "must be a list of 1 masks"),
}


@pytest.mark.parametrize(("pixels", "mask", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input(pixels, mask, message):
    with pytest.raises(ValueError, match=message):
        tiny_model()(pixels, mask)


def test_a_model_moves_and_copies_whole():
    """Nothing of the forward is left behind on another device or in another dtype: there are no buffers."""
    model = randomize(DINOv3ViTModel(tiny_config()))
    assert not list(model.buffers())
    twin = DINOv3ViTModel(tiny_config())
    twin.load_state_dict(model.double().state_dict())
    assert torch.equal(twin.eval()(images()).pooler_output, model.float().eval()(images()).pooler_output)
