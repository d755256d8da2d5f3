"""`torch.compile(fullgraph=True)` and export give what eager gives."""

import pytest
import torch

from dinov3_hf.training.forward_draws import StudentDraws
from tests.models.dinov3_vit.tiny import ALL_VARIANTS, images, random_mask, tiny_model

# The graph is captured and differentiated, but not turned into machine code; the slow test does that.
DIFFERENTIATED = "aot_eager"


@pytest.fixture(autouse=True)
def fresh_graphs():
    torch._dynamo.reset()


def step(model, *inputs, **draws) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    outputs = model(*inputs, **draws)
    outputs = outputs if isinstance(outputs, list) else [outputs]
    loss = sum(output.last_hidden_state.square().mean() for output in outputs)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    return loss.detach(), gradients


@pytest.mark.parametrize("name", ["mlp", "rmsnorm_swiglu_no_layer_scale", "both_norms", "rope_bfloat16"])
@torch.no_grad()
def test_eval(name):
    model = tiny_model(**ALL_VARIANTS[name])
    expected = model(images(), random_mask())
    model.compile(fullgraph=True, backend="eager")
    found = model(images(), random_mask())
    torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state)
    torch.testing.assert_close(found.pooler_output, expected.pooler_output)


@torch.no_grad()
def test_images_of_another_size():
    model = tiny_model()
    sizes = images(), images(3, 24, 12)
    expected = [model(pixels).last_hidden_state for pixels in sizes]
    model.compile(fullgraph=True, backend="eager")
    torch.testing.assert_close([model(pixels).last_hidden_state for pixels in sizes], expected)


def test_training_on_a_crop_list():
    model = tiny_model(**ALL_VARIANTS["training_options"]).train()
    inputs = [images(4), images(6, 8, 8)], [random_mask(4), None]
    expected = step(model, *inputs)
    model.compile(fullgraph=True, backend=DIFFERENTIATED)
    torch.testing.assert_close(step(model, *inputs), expected)


def test_training_with_given_draws():
    """Their shapes are those of every step, so that one graph serves all of them."""
    model = tiny_model(**ALL_VARIANTS["training_options"]).train()
    inputs = [images(4), images(6, 8, 8)], [random_mask(4), None]
    source = StudentDraws(model.config, (2, 3), group_size=2, seed=0)
    draws = [source.at(number, range(2), torch.device("cpu")) for number in range(3)]
    expected = [step(model, *inputs, draws=drawn) for drawn in draws]
    assert len({loss.item() for loss, _ in expected}) == 3
    model.compile(fullgraph=True, backend=DIFFERENTIATED)
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = [step(model, *inputs, draws=drawn) for drawn in draws]
    torch.testing.assert_close(found, expected)


def test_blocks_compiled_one_by_one():
    model = tiny_model(**ALL_VARIANTS["training_options"]).train()
    inputs = [images(4), images(6, 8, 8)], [random_mask(4), None]
    expected = step(model, *inputs)
    for layer in model.layer:
        layer.compile(fullgraph=True, backend=DIFFERENTIATED)
    torch.testing.assert_close(step(model, *inputs), expected)


@pytest.mark.slow
def test_compiled_to_machine_code():
    model = tiny_model(pos_embed_rescale=None)  # machine code draws other random numbers
    expected = step(model, images())
    model.compile(fullgraph=True)
    torch.testing.assert_close(step(model, images()), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_export():
    model = tiny_model()
    program = torch.export.export(model, (images(),))
    other = images() + 1
    torch.testing.assert_close(program.module()(other).last_hidden_state, model(other).last_hidden_state)
