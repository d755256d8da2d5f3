"""Attention: the implementations agree, and queries, keys and values come from one product or from three."""

from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from dinov3_hf.models.dinov3_vit import layers
from dinov3_hf.models.dinov3_vit.layers import DINOv3ViTAttention, is_plain_linear
from dinov3_hf.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTModel
from tests.models.dinov3_vit.tiny import SWIGLU, images, random_mask, randomize, tiny_config, tiny_model
from tests.reference.processes import run_in_processes
from tests.testing_utils import require_gpu, require_package

PROJECTIONS = ("q_proj", "k_proj", "v_proj")
BIASES = {
    "released": {},
    "none": {"query_bias": False, "value_bias": False},
    "all": {"key_bias": True},
    "values": {"query_bias": False},
}


def build(implementation: str, **fields) -> DINOv3ViTModel:
    model = DINOv3ViTModel._from_config(tiny_config(**fields), attn_implementation=implementation)
    assert model.config._attn_implementation == implementation
    return randomize(model).eval()


@torch.no_grad()
def assert_agrees_with_sdpa(implementation: str) -> None:
    crops, masks = [images(3), images(4, 8, 8)], [random_mask(3), None]
    expected = build("sdpa")(crops, masks, output_hidden_states=True)
    found = build(implementation)(crops, masks, output_hidden_states=True)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.hidden_states, other.hidden_states)
        torch.testing.assert_close(one.last_hidden_state, other.last_hidden_state)


def test_eager_agrees():
    assert_agrees_with_sdpa("eager")


def test_flex_attention_agrees():
    # transformers compiles it, which takes half a minute; this runs the same function without.
    with torch.compiler.set_stance("force_eager"):
        assert_agrees_with_sdpa("flex_attention")


@pytest.mark.slow
def test_compiled_flex_attention_agrees():
    assert_agrees_with_sdpa("flex_attention")


def test_eager_and_sdpa_have_the_same_gradients():
    grads = []
    for implementation in ("sdpa", "eager"):
        model = build(implementation)
        pixels = images().requires_grad_()
        model(pixels).last_hidden_state.square().sum().backward()
        grads.append([pixels.grad, *(parameter.grad for parameter in model.parameters())])
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


@require_gpu
@require_package("flash_attn")
@torch.no_grad()
def test_flash_attention_2_agrees():
    crops = [images(3).cuda().bfloat16(), images(4, 8, 8).cuda().bfloat16()]
    expected = build("sdpa").cuda().bfloat16()(crops)
    found = build("flash_attention_2").cuda().bfloat16()(crops)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.last_hidden_state, other.last_hidden_state, rtol=0.05, atol=0.05)


@torch.no_grad()
def test_output_attentions_whatever_the_implementation():
    expected = build("eager")(images(), output_attentions=True)
    found = build("sdpa")(images(), output_attentions=True)
    assert torch.equal(found.last_hidden_state, expected.last_hidden_state)
    assert torch.equal(torch.stack(found.attentions), torch.stack(expected.attentions))


def test_attention_dropout_acts_in_training_only():
    model = build("sdpa", attention_dropout=0.5, pos_embed_rescale=None)
    plain = build("sdpa", pos_embed_rescale=None)
    assert torch.equal(model(images()).pooler_output, plain(images()).pooler_output)
    expected = plain.train()(images()).pooler_output
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        assert (model.train()(images()).pooler_output - expected).abs().max() > 1e-2


# ---- one product or three -------------------------------------------------------------------------------------------


def products(model: nn.Module) -> int:
    """How many matrix products make queries, keys and values in a forward of the first block."""
    attention = model.get_submodule("layer.0.attention")
    with mock.patch.object(nn.functional, "linear", wraps=nn.functional.linear) as linear:
        attention.project_qkv(torch.randn(5, 32, dtype=attention.o_proj.weight.dtype))
    return linear.call_count


def three_calls(attention: DINOv3ViTAttention, states: torch.Tensor) -> torch.Tensor:
    return torch.cat([attention.get_submodule(name)(states) for name in PROJECTIONS], dim=-1)


@pytest.mark.parametrize("fields", BIASES.values(), ids=BIASES)
def test_one_product_is_three_calls(fields):
    model = tiny_model(**fields)
    assert products(model) == 1
    attention = model.layer[1].attention
    states = torch.randn(7, 32)
    torch.testing.assert_close(attention.project_qkv(states), three_calls(attention, states))
    grads = []
    for project in (attention.project_qkv, lambda states: three_calls(attention, states)):
        project(states).square().sum().backward()
        grads.append(
            [parameter.grad for name in PROJECTIONS for parameter in attention.get_submodule(name).parameters()]
        )
        model.zero_grad()
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("project", PROJECTIONS)
def test_hooks_on_a_projection_are_called(project):
    model = tiny_model()
    seen = []
    for register in ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"):
        module = model.layer[0].attention.get_submodule(project)
        handle = getattr(module, f"register_{register}")(lambda *_, register=register: seen.append(register))
        model(images().requires_grad_()).pooler_output.sum().backward()
        handle.remove()
        assert seen.pop() == register and not seen
    model(images())
    assert not seen and products(model) == 1


def test_a_parametrized_projection():
    model = tiny_model()
    expected = model(images()).last_hidden_state
    parametrizations.weight_norm(model.layer[0].attention.k_proj)
    assert not is_plain_linear(model.layer[0].attention.k_proj)
    assert products(model) > 1
    torch.testing.assert_close(model(images()).last_hidden_state, expected)


@require_package("peft")
def test_lora_on_the_projections():
    from peft import LoraConfig, get_peft_model

    pixels = images()
    expected = tiny_model()(pixels).last_hidden_state
    adapted = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=list(PROJECTIONS), lora_dropout=0.0)).eval()
    model = adapted.get_base_model()
    assert products(model) == 3 + 2 * 3
    # LoRA starts as the identity.
    torch.testing.assert_close(adapted(pixels).last_hidden_state, expected)

    adapted(pixels).last_hidden_state.square().sum().backward()
    trained = {name: parameter.grad for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert len(trained) == 3 * 3 * 2
    assert all(name.split(".")[-3] in ("lora_A", "lora_B") for name in trained)
    assert all(gradient.abs().max() > 0 for name, gradient in trained.items() if "lora_B" in name)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    changed = adapted(pixels).last_hidden_state
    assert (changed - expected).abs().max() > 0.1
    merged = adapted.merge_and_unload()
    assert products(merged) == 1
    torch.testing.assert_close(merged(pixels).last_hidden_state, changed, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization:DeprecationWarning")
@pytest.mark.parametrize("fields", [{}, SWIGLU], ids=["mlp", "swiglu"])
@torch.no_grad()
def test_dynamic_int8_projections(fields):
    model = tiny_model(**fields)
    pixels = images()
    expected = model(pixels).last_hidden_state
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert not is_plain_linear(quantized.layer[0].attention.q_proj)
    found = quantized(pixels).last_hidden_state
    assert 0 < (found - expected).abs().max() < 0.3
    attention = quantized.layer[0].attention
    states = torch.randn(7, 32)
    assert torch.equal(attention.project_qkv(states), three_calls(attention, states))


class DoublingTensor(torch.Tensor):
    """A weight that only itself knows how to multiply with, as those of quantisation libraries are."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        result = super().__torch_function__(function, types, args, kwargs or {})
        return 2 * result if function is nn.functional.linear else result


@torch.no_grad()
def test_a_weight_of_a_tensor_subclass():
    attention = tiny_model().layer[0].attention
    states = torch.randn(7, 32)
    query, key_and_value = attention.project_qkv(states).tensor_split([32], dim=1)
    attention.q_proj.weight = nn.Parameter(attention.q_proj.weight.detach().as_subclass(DoublingTensor))
    assert not is_plain_linear(attention.q_proj)
    expected = torch.cat((2 * query, key_and_value), dim=1)
    torch.testing.assert_close(attention.project_qkv(states).as_subclass(torch.Tensor), expected)


def test_an_offloaded_projection():
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model = tiny_model()
    expected = model(images()).last_hidden_state
    for name in PROJECTIONS:
        add_hook_to_module(
            model.layer[0].attention.get_submodule(name), AlignDevicesHook(execution_device="cpu", offload=True)
        )
    assert model.layer[0].attention.q_proj.weight.is_meta
    torch.testing.assert_close(model(images()).last_hidden_state, expected)


def sharded_forward(granularity: str) -> dict[str, torch.Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    mesh = init_device_mesh("cpu", (2,))
    model = tiny_model()
    for layer in model.layer:
        if granularity == "projections":
            for name in PROJECTIONS:
                fully_shard(layer.attention.get_submodule(name), mesh=mesh)
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    weight = model.layer[0].attention.q_proj.weight
    assert isinstance(weight, DTensor) and weight.to_local().shape == (16, 32)
    with mock.patch.object(layers, "is_plain_linear", wraps=is_plain_linear) as asked:
        output = model(images()).last_hidden_state
    assert asked.called
    output.square().sum().backward()
    results = {"output": output.detach()}
    for name in (*PROJECTIONS, "o_proj"):
        results[name] = model.layer[0].attention.get_submodule(name).weight.grad.full_tensor()
    return results


@pytest.mark.parametrize("granularity", ["blocks", "projections"])
def test_sharded_over_two_processes(granularity):
    model = tiny_model()
    output = model(images()).last_hidden_state
    output.square().sum().backward()
    for rank in run_in_processes(sharded_forward, 2, granularity):
        torch.testing.assert_close(rank["output"], output.detach())
        for name in (*PROJECTIONS, "o_proj"):
            expected = model.layer[0].attention.get_submodule(name).weight.grad
            torch.testing.assert_close(rank[name], expected, rtol=1e-4, atol=1e-4)
