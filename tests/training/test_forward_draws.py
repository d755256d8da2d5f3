"""The random numbers of the student's forward passes: what they are a function of, and their shares."""

import pytest
import torch
from torch import Tensor

from dinov3_hf.models.dinov3_convnext.configuration_dinov3_convnext import DINOv3ConvNextConfig
from dinov3_hf.models.dinov3_vit.layers import ForwardDraws
from dinov3_hf.training.forward_draws import StudentDraws
from tests.models.dinov3_convnext.tiny import tiny_config as convnext_config
from tests.models.dinov3_vit.tiny import tiny_config
from tests.training.test_ssl_trainer import BACKBONE, make_args

CPU = torch.device("cpu")
AUGMENTED = {"pos_embed_shift": 0.2, "pos_embed_jitter": 1.5, "pos_embed_rescale": 2.0}
NUM_CROPS = (2, 3)


def vit_draws(group_size=4, seed=0, num_crops=NUM_CROPS, **fields) -> StudentDraws:
    config = tiny_config(**{"drop_path_rate": 0.4, **AUGMENTED, **fields})
    return StudentDraws(config, num_crops, group_size, seed)


def is_kept(draws: ForwardDraws, num_images: int) -> list[Tensor]:
    """For each crop group bool (L, 2, C, B)."""
    masks = []
    for kept, crops in zip(draws.kept_images, NUM_CROPS, strict=True):
        mask = torch.zeros(*kept.shape[:2], crops * num_images, dtype=torch.bool).scatter_(2, kept, True)
        assert mask.sum() == kept.numel()  # no image twice
        masks.append(mask.unflatten(2, (crops, num_images)))
    return masks


@pytest.mark.parametrize(
    ("rate", "group_size", "num_kept"),
    [
        (0.4, 4, [4, 7]),  # of 2 x 4 and 3 x 4 crops
        (0.3, 1, [1, 2]),
        (0.9, 1, [1, 1]),
        (0.1, 8, [14, 21]),
    ],
)
def test_an_exact_share_of_each_group_in_each_branch(rate, group_size, num_kept):
    draws = vit_draws(group_size, drop_path_rate=rate).at(7, range(2 * group_size, 5 * group_size), CPU)
    for kept, mask, count in zip(draws.kept_images, is_kept(draws, 3 * group_size), num_kept, strict=True):
        assert kept.dtype == torch.int64 and kept.shape == (3, 2, 3 * count)
        assert (mask.unflatten(3, (3, group_size)).sum((2, 4)) == count).all()


def test_every_group_branch_block_step_and_seed_has_its_own_subset():
    first = is_kept(vit_draws(16).at(0, range(64), CPU), 64)
    for mask in first:
        subsets = mask.unflatten(3, (4, 16)).permute(0, 1, 3, 2, 4).flatten(0, 2).flatten(1)
        assert len(subsets.unique(dim=0)) == len(subsets) == 3 * 2 * 4
    for other in (vit_draws(16).at(1, range(64), CPU), vit_draws(16, seed=1).at(0, range(64), CPU)):
        assert not torch.equal(is_kept(other, 64)[0], first[0])


def test_every_crop_of_every_image_is_kept_equally_often():
    steps = [is_kept(vit_draws(drop_path_rate=0.5).at(step, range(4, 12), CPU), 8) for step in range(1500)]
    for group, masks in enumerate(zip(*steps, strict=True)):
        shares = torch.stack(masks).float().mean(0)  # (L, 2, C, B)
        torch.testing.assert_close(shares, torch.full_like(shares, 0.5), rtol=0, atol=5 * 0.5 / 1500**0.5), group


@pytest.mark.invariant
@pytest.mark.parametrize("size", [4, 8])
def test_parts_of_the_global_batch_draw_what_the_whole_draws(size):
    draws = vit_draws()
    whole = is_kept(draws.at(3, range(16), CPU), 16)
    parts = [is_kept(draws.at(3, range(start, start + size), CPU), size) for start in range(0, 16, size)]
    for group, mask in enumerate(whole):
        torch.testing.assert_close(torch.cat([part[group] for part in parts], dim=3), mask, rtol=0, atol=0)


@pytest.mark.invariant
def test_rope_is_augmented_alike_for_all_images_of_a_step():
    draws = vit_draws()
    first, elsewhere, later = draws.at(3, range(4), CPU), draws.at(3, range(8, 16), CPU), draws.at(4, range(4), CPU)
    for ours, theirs, others in zip(first.rope, elsewhere.rope, later.rope, strict=True):
        for name, width, bound in (("shift", 2, 0.2), ("jitter", 2, 0.405466), ("rescale", 1, 0.693148)):
            values = ours._asdict()[name]
            assert values.dtype == torch.float32 and values.shape == (3, width)  # a table for each block
            assert values.abs().max() <= bound
            assert len(values.unique()) == values.numel()
            assert torch.equal(values, theirs._asdict()[name])
            assert not torch.equal(values, others._asdict()[name])
    assert not torch.equal(first.rope[0].shift, first.rope[1].shift)
    assert draws.at(3, range(4), CPU).rope[0].shift.abs().max() > 0.05


def test_rope_bounds_and_number_of_tables():
    once = vit_draws(rope_augmentation_per_block=False)
    values = torch.stack([once.at(step, range(4), CPU).rope[0].rescale for step in range(2000)])  # (steps, 1, 1)
    assert values.shape == (2000, 1, 1)
    assert -0.693148 <= values.min() < -0.68 and 0.68 < values.max() <= 0.693148
    assert values.mean().item() == pytest.approx(0, abs=0.04)


def test_nothing_is_drawn_for_what_is_off():
    quiet = {"pos_embed_shift": None, "pos_embed_jitter": None, "pos_embed_rescale": None}
    assert vit_draws(**quiet, drop_path_rate=0.0).at(0, range(4), CPU) == ForwardDraws(None, None)
    assert vit_draws(**quiet).at(0, range(4), CPU).rope is None
    assert vit_draws(drop_path_rate=0.0).at(0, range(4), CPU).kept_images is None
    assert len(vit_draws(num_crops=(2,)).at(0, range(4), CPU).kept_images) == 1  # no local crops
    assert StudentDraws(convnext_config(), NUM_CROPS, 4, 0).at(0, range(4), CPU) is None


@pytest.mark.invariant
def test_a_convnext_draws_for_each_image_by_itself():
    config = convnext_config(drop_path_rate=0.4)
    assert isinstance(config, DINOv3ConvNextConfig)
    draws = StudentDraws(config, NUM_CROPS, 4, 0)
    whole = [
        group.unflatten(1, (crops, 6)) for group, crops in zip(draws.at(5, range(6), CPU), NUM_CROPS, strict=True)
    ]
    for group, crops in zip(whole, NUM_CROPS, strict=True):
        assert group.dtype == torch.float32 and group.shape == (sum(config.depths), crops, 6)
        assert group.min() >= 0 and group.max() <= 1
        assert len(group.unique()) == group.numel()
    for image in range(6):
        alone = draws.at(5, range(image, image + 1), CPU)
        for group, ours in zip(whole, alone, strict=True):
            assert torch.equal(ours, group[..., image])
    assert not torch.equal(draws.at(6, range(6), CPU)[0], whole[0].flatten(1))


# ---- sizes of groups ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"per_device_train_batch_size": 4, "drop_path_group_size": 8},
            r"drop_path_group_size 8 does not divide the 4 images of one forward pass on one rank "
            r"\(per_device_train_batch_size\); use 4\.",
        ),
        ({"drop_path_group_size": 3}, r"drop_path_group_size 3 does not divide the 16 images .*; use 2 or 4\."),
        ({"drop_path_group_size": 0}, r"drop_path_group_size 0 does not divide .*; use 1\."),
        (
            {
                "drop_path_group_size": 8,
                "crop_sizes": [{"global": 16, "local": 8, "probability": 1, "per_device_train_batch_size": 4}],
            },
            r"drop_path_group_size 8 .* \(crop_sizes\.0\.per_device_train_batch_size\); use 4\.",
        ),
    ],
)
def test_groups_that_do_not_tile_a_forward_pass_are_refused(tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message) as error:
        make_args(tmp_path, **overrides)
    assert "\n" not in str(error.value)
    make_args(tmp_path, **overrides, backbone={**BACKBONE, "drop_path_rate": 0.0})  # nothing is left out


def test_a_recipe_says_how_the_student_draws(tmp_path):
    draws = make_args(tmp_path, seed=5, num_local_crops=3).student_draws()
    assert (draws.num_crops, draws.group_size, draws.seed) == ((2, 3), 4, 5)
    assert draws.backbone.drop_path_rate == BACKBONE["drop_path_rate"]
    assert make_args(tmp_path, num_local_crops=0).student_draws().num_crops == (2,)
