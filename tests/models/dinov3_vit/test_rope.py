"""Rotary embedding: tables, rotation, and how often the augmentation is drawn."""

import math
from unittest import mock

import pytest
import torch

from dinov3_hf.models.dinov3_vit import modeling_dinov3_vit
from dinov3_hf.models.dinov3_vit.rope import (
    RopeDraws,
    RopeParameters,
    patch_coordinates,
    rope_periods,
    rope_tables,
    rotate,
    rotation_tables,
)
from tests.models.dinov3_vit.tiny import images, tiny_config, tiny_model

PARAMETERS = RopeParameters(16, 100.0, None, None, "separate", torch.float32)
CPU = torch.device("cpu")


def rotated_by_complex_numbers(tokens: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """(N, d) tokens whose pair (i, i + d/2) is a complex number turned by angle i of (N, d/2)."""
    first, second = tokens.chunk(2, dim=-1)
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((turned.real, turned.imag), dim=-1)


def test_rotation_is_one_of_complex_numbers():
    grid, num_prefix_tokens = (2, 3), 2
    cos, sin = rotation_tables(PARAMETERS, grid, num_prefix_tokens, None, CPU)
    tokens = torch.randn(1, 8, 2, 3, 16)
    found = rotate(tokens, cos[0], sin[0])
    assert torch.equal(found[:, :num_prefix_tokens], tokens[:, :num_prefix_tokens])
    periods = 100 ** (torch.arange(4) / 4)
    for row in range(2):
        for column in range(3):
            y, x = (2 * (row + 0.5) / 2 - 1, 2 * (column + 0.5) / 3 - 1)
            angles = 2 * math.pi * torch.cat((y / periods, x / periods)).expand(6, -1)
            patch = tokens[0, num_prefix_tokens + 3 * row + column].flatten(0, 1)
            expected = rotated_by_complex_numbers(patch, angles)
            found_patch = found[0, num_prefix_tokens + 3 * row + column].flatten(0, 1)
            torch.testing.assert_close(found_patch, expected, rtol=1e-5, atol=1e-5)


def test_rotation_leaves_its_input_alone_and_has_the_gradient_of_a_rotation():
    cos, sin = rotation_tables(PARAMETERS, (2, 3), 1, None, CPU)
    tokens = torch.randn(2, 7, 2, 3, 16)
    copy = tokens.clone().requires_grad_()
    weights = torch.randn_like(tokens)
    (rotate(copy, cos[0], sin[0]) * weights).sum().backward()
    assert torch.equal(copy, tokens)
    # The transpose of a rotation is the rotation back.
    torch.testing.assert_close(copy.grad, rotate(weights, cos[0], -sin[0]))


@pytest.mark.parametrize(
    ("normalization", "rows", "columns"),
    [
        ("separate", [-0.5, 0.5], [-0.75, -0.25, 0.25, 0.75]),
        ("max", [-0.75, -0.25], [-0.75, -0.25, 0.25, 0.75]),
        ("min", [-0.5, 0.5], [-0.5, 0.5, 1.5, 2.5]),
    ],
)
def test_coordinates(normalization, rows, columns):
    expected = [[row, column] for row in rows for column in columns]
    assert patch_coordinates((2, 4), normalization, torch.float32).tolist() == expected


def test_periods():
    torch.testing.assert_close(rope_periods(PARAMETERS), torch.tensor([1.0, 10**0.5, 10.0, 10**1.5]))
    given = PARAMETERS._replace(theta=None, min_period=0.5, max_period=32.0)
    torch.testing.assert_close(rope_periods(given), torch.tensor([0.5, 2.0, 8.0, 32.0]))


def test_augmentation_shifts_then_stretches():
    draws = RopeDraws(
        shift=torch.tensor([[0.1, -0.2]]), jitter=torch.tensor([[0.3, -0.4]]), rescale=torch.tensor([[0.5]])
    )
    cos, sin = rope_tables(PARAMETERS, (2, 4), draws)
    coordinates = patch_coordinates((2, 4), "separate", torch.float32)
    coordinates = (coordinates + draws.shift) * (draws.jitter + 0.5).exp()
    angles = 2 * math.pi * coordinates[..., None] / rope_periods(PARAMETERS)
    torch.testing.assert_close(cos[0], angles.flatten(1).repeat(1, 2).cos(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sin[0], angles.flatten(1).repeat(1, 2).sin(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tables_have_their_dtype_whatever_surrounds_them(dtype):
    parameters = PARAMETERS._replace(dtype=dtype)
    expected = rope_tables(parameters, (3, 5))
    assert {table.dtype for table in expected} == {dtype}
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, rope_tables(parameters, (3, 5), device=CPU), expected))
    model = tiny_model(rope_dtype=str(dtype).removeprefix("torch.")).bfloat16()
    assert model.rope_parameters.dtype == dtype


def test_bfloat16_queries_are_rotated_in_float32():
    cos, sin = rotation_tables(PARAMETERS, (2, 3), 1, None, CPU)
    tokens = torch.randn(2, 7, 2, 3, 16).bfloat16()
    assert torch.equal(rotate(tokens, cos[0], sin[0]), rotate(tokens.float(), cos[0], sin[0]).bfloat16())


def test_float32_queries_are_rounded_to_a_bfloat16_table():
    cos, sin = rotation_tables(PARAMETERS._replace(dtype=torch.bfloat16), (2, 3), 1, None, CPU)
    tokens = torch.randn(2, 7, 2, 3, 16)
    found = rotate(tokens, cos[0], sin[0])
    assert found.dtype == torch.float32
    assert torch.equal(found, found.bfloat16().float())
    # Prefix tokens are not turned, but rounded all the same, as in the original.
    assert torch.equal(found[:, :1], tokens[:, :1].bfloat16().float())


def test_tables_made_in_inference_mode_serve_training():
    parameters = PARAMETERS._replace(theta=101.0)  # not in the cache yet
    with torch.inference_mode():
        cos, sin = rotation_tables(parameters, (2, 3), 1, None, CPU)
    assert not cos.is_inference() and not sin.is_inference()
    model = tiny_model(rope_theta=102.0)
    with torch.inference_mode():
        model(images())
    model(images().requires_grad_()).pooler_output.sum().backward()


# ---- how often it is drawn ---------------------------------------------------------------------------------------

AUGMENTED = {"pos_embed_shift": 0.2, "pos_embed_jitter": 1.5, "pos_embed_rescale": 2.0}
BOUNDS = [(-0.2, 0.2, 2), (-0.405465, 0.405465, 2), (-0.693147, 0.693147, 1)]  # s, ln j, ln r


def draws_of(model, crops) -> list[tuple[float, float, int]]:
    with mock.patch.object(modeling_dinov3_vit, "draw_uniform", wraps=modeling_dinov3_vit.draw_uniform) as draw:
        model(crops)
    return [
        (round(low, 6), round(high, 6), count) for low, high, count, _ in (call.args for call in draw.call_args_list)
    ]


@pytest.mark.parametrize("num_groups", [1, 2])
def test_drawn_per_block_and_per_group_or_once(num_groups):
    crops = [images(), images(3, 8, 8)][:num_groups]
    per_block = tiny_model(**AUGMENTED).train()
    assert draws_of(per_block, crops) == BOUNDS * num_groups * 3
    once = tiny_model(**AUGMENTED, rope_augmentation_per_block=False).train()
    assert draws_of(once, crops) == BOUNDS * num_groups
    assert draws_of(per_block.eval(), crops) == []
    assert draws_of(tiny_model(pos_embed_rescale=None).train(), crops) == []


@pytest.mark.parametrize("per_block", [True, False])
def test_each_block_uses_its_draw(per_block):
    model = tiny_model(**AUGMENTED, rope_augmentation_per_block=per_block).train()
    tables = [[] for _ in range(3)]
    for layer, seen in zip(model.layer, tables, strict=True):
        layer.register_forward_pre_hook(lambda _, args, seen=seen: seen.extend(args[2]))
    model([images(), images(3, 8, 8)])
    for group in (0, 1):
        cosines = [seen[group][0] for seen in tables]
        assert all(torch.equal(cosine, cosines[0]) != per_block for cosine in cosines[1:])
    # Groups never share a draw: the same patch of equal grids is turned by different angles.
    for seen in tables:
        seen.clear()
    model([images(), images()])
    assert not torch.equal(tables[0][0][0], tables[0][1][0])


def test_augmentation_is_uniform_in_its_bounds():
    numbers = modeling_dinov3_vit.draw_uniform(-0.3, 0.3, 4000, CPU)
    assert numbers.dtype == torch.float32 and numbers.shape == (4000,)
    assert -0.3 <= numbers.min() < -0.29 and 0.29 < numbers.max() <= 0.3
    assert numbers.std().item() == pytest.approx(0.6 / 12**0.5, rel=0.05)


def test_tables_follow_the_size_of_the_image():
    """A square image cut to a rectangle is not the rectangle's table: coordinates span each image."""
    config = tiny_config()
    parameters = RopeParameters.from_config(config)
    square, wide = (rope_tables(parameters, grid)[0][0] for grid in ((4, 4), (2, 4)))
    assert square.shape == (16, 16) and wide.shape == (8, 16)
    assert not torch.allclose(square[:8], wide)
