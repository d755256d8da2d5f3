"""`torch.compile(fullgraph=True)` and export give what eager gives."""

import pytest
import torch

from tests.models.dinov3_convnext.tiny import ALL_VARIANTS, images, tiny_model

# The graph is captured and differentiated, but not turned into machine code; the slow test does that.
DIFFERENTIATED = "aot_eager"


@pytest.fixture(autouse=True)
def fresh_graphs():
    torch._dynamo.reset()


def step(model, *inputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    outputs = model(*inputs)
    outputs = outputs if isinstance(outputs, list) else [outputs]
    loss = sum(output.last_hidden_state.square().mean() for output in outputs)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    return loss.detach(), gradients


@pytest.mark.parametrize("name", ["plain", "no_layer_scale"])
@torch.no_grad()
def test_eval(name):
    model = tiny_model(**ALL_VARIANTS[name])
    sizes = images(), images(3, 64, 128)
    expected = [model(pixels).last_hidden_state for pixels in sizes]
    model.compile(fullgraph=True, backend="eager")
    torch.testing.assert_close([model(pixels).last_hidden_state for pixels in sizes], expected)


@torch.no_grad()
def test_intermediate_layers_on_a_patch_grid():
    model = tiny_model(patch_size=16)
    expected = model.get_intermediate_layers(images(), 4, reshape=True)
    compiled = torch.compile(model.get_intermediate_layers, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images(), 4, reshape=True), expected)


def test_training_on_a_crop_list():
    model = tiny_model(**ALL_VARIANTS["training_options"]).train()
    crops = [images(4), images(6, 32, 32)]
    expected = step(model, crops)
    model.compile(fullgraph=True, backend=DIFFERENTIATED)
    torch.testing.assert_close(step(model, crops), expected)


def test_blocks_compiled_one_by_one():
    model = tiny_model(**ALL_VARIANTS["training_options"]).train()
    expected = step(model, images(4))
    for stage in model.stages:
        for layer in stage.layers:
            layer.compile(fullgraph=True, backend=DIFFERENTIATED)
    torch.testing.assert_close(step(model, images(4)), expected)


@pytest.mark.slow
def test_compiled_to_machine_code():
    model = tiny_model()
    expected = step(model, images())
    model.compile(fullgraph=True)
    torch.testing.assert_close(step(model, images()), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_export():
    model = tiny_model()
    program = torch.export.export(model, (images(),))
    other = images() + 1
    torch.testing.assert_close(program.module()(other).last_hidden_state, model(other).last_hidden_state)
