"""Stochastic depth: an exact subset of the images goes through a branch, and only those are computed."""

import itertools
from unittest import mock

import pytest
import torch

from dinov3_hf.models.dinov3_vit import modeling_dinov3_vit
from dinov3_hf.models.dinov3_vit.layers import DINOv3ViTLayer, ForwardDraws, unpack
from dinov3_hf.training.forward_draws import StudentDraws
from tests.models.dinov3_vit.tiny import images, tiny_model

QUIET = {"pos_embed_rescale": None}


def test_the_formula():
    """x + B/kept * branch for the kept images, x for the others; separately for the two branches and each group."""
    model = tiny_model(**QUIET, drop_path_rate=0.4).train()
    crops = [images(5), images(3, 8, 8)]
    permutations = []

    def draw(n: int, device: torch.device) -> torch.Tensor:
        permutations.append(torch.randperm(n, device=device))
        return permutations[-1]

    with mock.patch.object(modeling_dinov3_vit, "draw_permutation", draw):
        found = model(crops, output_hidden_states=True)

    assert [len(permutation) for permutation in permutations] == [5, 3, 5, 3] * 3  # attention, then FFN
    plain = tiny_model(**QUIET).train()
    for index, output in enumerate(found):
        for block, layer in enumerate(plain.layer):
            states = output.hidden_states[block]
            attention_order, mlp_order = permutations[4 * block + index], permutations[4 * block + 2 + index]
            states = branch(plain, layer, "attention", states, attention_order, crops[index])
            states = branch(plain, layer, "mlp", states, mlp_order, crops[index])
            torch.testing.assert_close(output.hidden_states[block + 1], states)


def branch(model, layer: DINOv3ViTLayer, name: str, states, order, pixels) -> torch.Tensor:
    """One branch by the definition, computed for all images."""
    num_images = len(states)
    kept = order[: max(int(num_images * 0.6), 1)]
    rotations = model._rotations([model.patch_grid(pixels)], ForwardDraws(), states.device)[0]
    if name == "attention":
        groups = [modeling_dinov3_vit.CropGroup(*states.shape[:2])]
        output = layer.attention(layer.norm1(states.flatten(0, 1)), groups, rotations)[0]
        output = unpack(layer.layer_scale1(output), groups)[0]
    else:
        output = layer.layer_scale2(layer.mlp(layer.norm2(states)))
    is_kept = torch.zeros(num_images, 1, 1)
    is_kept[kept] = num_images / len(kept)
    return states + is_kept * output


@pytest.mark.parametrize(
    ("rate", "num_images", "num_kept"), [(0.3, 10, 7), (0.3, 3, 2), (0.9, 4, 1), (0.99, 1, 1), (0.5, 1, 1)]
)
def test_only_the_kept_images_are_computed(rate, num_images, num_kept):
    model = tiny_model(**QUIET, drop_path_rate=rate).train()
    rows = []
    for layer in model.layer:
        for norm in (layer.norm1, layer.norm2):
            norm.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    model(images(num_images))
    num_tokens = 3 + 12
    assert rows == [num_kept * num_tokens] * 6


def test_all_images_in_eval_mode():
    model, plain = tiny_model(drop_path_rate=0.5), tiny_model()
    assert torch.equal(model(images()).last_hidden_state, plain(images()).last_hidden_state)


def test_dropped_images_pass_unchanged():
    model = tiny_model(**QUIET, drop_path_rate=0.9).train()
    states = model(images(4), output_hidden_states=True).hidden_states
    for before, after in itertools.pairwise(states):
        changed = (before != after).flatten(1).any(1)
        assert 1 <= changed.sum() <= 2  # one image by each branch


def test_the_mean_over_draws_is_the_whole_branch():
    """Scaling by images / kept makes a block's output right on average."""
    model, plain = tiny_model(**QUIET, drop_path_rate=0.5, num_hidden_layers=1), tiny_model(num_hidden_layers=1)
    model.train()
    with torch.no_grad():
        model.layer[0].layer_scale2.lambda1.zero_()  # one branch, so that the expectation is exact
        plain.layer[0].layer_scale2.lambda1.zero_()
        expected = plain(images(4), output_hidden_states=True).hidden_states[-1]
        draws = [model(images(4), output_hidden_states=True).hidden_states[-1] for _ in range(400)]
    error = (torch.stack(draws).mean(0) - expected).abs().max()
    assert error < 0.3 * (draws[0] - expected).abs().max()


def test_all_parameters_have_gradients():
    model = tiny_model(**QUIET, drop_path_rate=0.6).train()
    sum(output.last_hidden_state.square().sum() for output in model([images(4), images(2, 8, 8)])).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name


# ---- given numbers -----------------------------------------------------------------------------------------------

AUGMENTED = {"pos_embed_shift": 0.2, "pos_embed_jitter": 1.5, "pos_embed_rescale": 2.0}
CROPS = [images(8), images(12, 8, 8)]  # 2 and 3 crops of 4 images, crop-major


def student_draws(model, group_size=2) -> StudentDraws:
    return StudentDraws(model.config, (2, 3), group_size, seed=0)


def test_given_numbers_take_the_place_of_the_models_own():
    model = tiny_model(**AUGMENTED, drop_path_rate=0.4).train()
    draws = student_draws(model).at(0, range(4), images().device)
    replayed = [permutation for block in range(3) for branch in range(2) for permutation in
                (kept[block, branch] for kept in draws.kept_images)]  # fmt: skip
    uniform = [values for table in range(3) for group in draws.rope for values in
               (drawn[table] for drawn in (group.shift, group.jitter, group.rescale))]  # fmt: skip
    state = torch.get_rng_state()
    given = model(CROPS, draws=draws)
    assert torch.equal(torch.get_rng_state(), state)
    with (
        mock.patch.object(modeling_dinov3_vit, "draw_permutation", lambda n, device: replayed.pop(0)),
        mock.patch.object(modeling_dinov3_vit, "draw_uniform", lambda *_: uniform.pop(0)),
    ):
        own = model(CROPS)
    assert not replayed and not uniform
    for ours, theirs in zip(given, own, strict=True):
        assert torch.equal(ours.last_hidden_state, theirs.last_hidden_state)
    assert not torch.equal(given[0].last_hidden_state, model(CROPS)[0].last_hidden_state)


@pytest.mark.invariant
@pytest.mark.parametrize("size", [2, 4])
def test_parts_of_a_batch_give_what_the_batch_gives(size):
    model = tiny_model(**AUGMENTED, drop_path_rate=0.4).train()
    draws = student_draws(model)
    images_of = [crops.unflatten(0, (-1, 4)) for crops in CROPS]
    whole = model(CROPS, draws=draws.at(3, range(8, 12), CROPS[0].device))
    for start in range(0, 4, size):
        part = [crops[:, start : start + size].flatten(0, 1) for crops in images_of]
        found = model(part, draws=draws.at(3, range(8 + start, 8 + start + size), CROPS[0].device))
        for output, expected in zip(found, whole, strict=True):
            expected = expected.last_hidden_state.unflatten(0, (-1, 4))[:, start : start + size].flatten(0, 1)
            torch.testing.assert_close(output.last_hidden_state, expected)


def test_given_numbers_are_not_read_in_eval_mode():
    model = tiny_model(**AUGMENTED, drop_path_rate=0.4)
    draws = student_draws(model).at(0, range(4), images().device)
    assert torch.equal(model(CROPS, draws=draws)[0].last_hidden_state, model(CROPS)[0].last_hidden_state)


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_sees_the_given_numbers(reentrant):
    model = tiny_model(**AUGMENTED, drop_path_rate=0.4).train()
    draws = student_draws(model).at(0, range(4), images().device)

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        crops = [pixels.clone().requires_grad_() for pixels in CROPS]
        sum(output.last_hidden_state.square().sum() for output in model(crops, draws=draws)).backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    expected = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.testing.assert_close(gradients(), expected, rtol=0, atol=0)
