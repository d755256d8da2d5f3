"""Runs that mix crop sizes: what is refused, and that parts of a micro-batch give what the whole gives."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dinov3_hf.data.crop_sizes import CropSizes
from dinov3_hf.training.ssl_config import SSLConfig
from dinov3_hf.training.ssl_trainer import SSLTrainer
from tests.training.test_ssl_trainer import BACKBONE, losses, make_args, make_trainer

SIZES = [
    {"global": 16, "local": 8, "gram": 24, "probability": 0.4},
    {"global": 24, "local": 8, "gram": 32, "probability": 0.3},
    {"global": 24, "local": 12, "gram": 32, "probability": 0.3},
]
GRAM = {"gram_teacher": "copy", "gram_weight_schedule": 1.5}
LARGE_LAYER_SCALE = {**BACKBONE, "layerscale_value": 1.0}  # with a small one KoLeo would be all rounding
CONVNEXT = {
    "model_type": "dinov3_convnext",
    "hidden_sizes": [8, 12, 16, 24],
    "depths": [1, 1, 1, 1],
    "drop_path_rate": 0.5,
    "layer_scale_init_value": 1.0,
}


def with_parts(size: int, entries=SIZES):
    """The entries at more than the first resolution in parts of `size` images."""
    return [entries[0], *(entry | {"per_device_train_batch_size": size} for entry in entries[1:])]


def sizes_of_steps(trainer: SSLTrainer) -> list[CropSizes]:
    return [trainer.crop_sizes.at(step) for step in range(trainer.args.max_steps)]


def assert_same_run(ours: SSLTrainer, theirs: SSLTrainer) -> None:
    torch.testing.assert_close(losses(ours), losses(theirs), rtol=2e-4, atol=1e-5)
    for name, tensor in ours.model.named_parameters():
        torch.testing.assert_close(tensor, theirs.model.get_parameter(name), rtol=1e-2, atol=2e-4, msg=name)
    for ours_entry, entry in zip(ours.state.log_history, theirs.state.log_history, strict=True):
        for name in ("loss/gram", "loss/ibot", "loss/koleo", "prototypes/dino_entropy"):
            if name in entry:
                assert ours_entry[name] == pytest.approx(entry[name], rel=1e-3, abs=1e-4), name


def train(folder: Path, **overrides) -> SSLTrainer:
    trainer = make_trainer(folder, precision="fp32", seed=3, **overrides)
    trainer.train()
    return trainer


@pytest.mark.invariant
@pytest.mark.parametrize(("gram_teacher", "per_device"), [("copy", None), ("ema", 8)])
def test_parts_of_a_micro_batch_change_nothing_but_rounding(tmp_path, gram_teacher, per_device):
    entries = SIZES if gram_teacher == "copy" else [entry | {"gram": None} for entry in SIZES]
    common = {"backbone": LARGE_LAYER_SCALE, "gram_teacher": gram_teacher, "gram_weight_schedule": 1.5}
    whole = train(tmp_path / "whole", crop_sizes=entries, **common)
    assert len(set(sizes_of_steps(whole))) == 3
    parts = train(
        tmp_path / "parts", crop_sizes=with_parts(4, entries), per_device_train_batch_size=per_device, **common
    )
    assert_same_run(parts, whole)


@pytest.mark.invariant
def test_parts_of_a_convnext_without_masks(tmp_path):
    entries = [
        {"global": 64, "local": 32, "gram": 96, "probability": 0.5},
        {"global": 96, "local": 48, "gram": 128, "probability": 0.5},
    ]
    common = {"backbone": CONVNEXT, "ibot_weight": 0.0, "max_steps": 3, "global_batch_size": 8, **GRAM}
    common |= {"global_crop_size": 64, "local_crop_size": 32}
    whole = train(tmp_path / "whole", crop_sizes=entries, **common)
    assert len(set(sizes_of_steps(whole))) == 2
    assert_same_run(train(tmp_path / "parts", crop_sizes=with_parts(4, entries), **common), whole)


def test_the_images_of_a_forward_pass_are_bounded_at_each_resolution(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, seed=3, crop_sizes=with_parts(4), **GRAM)
    seen: list[tuple[int, ...]] = []
    forward: Callable = trainer.model.forward

    def watched(**inputs):
        crops = inputs["global_crops"], inputs["local_crops"], inputs["gram_crops"]
        seen.append((len(crops[0]) // 2, *(crop.shape[-1] for crop in crops)))
        return forward(**inputs)

    monkeypatch.setattr(trainer.model, "forward", watched)
    trainer.train()
    expected = []
    for sizes in sizes_of_steps(trainer):
        images = sizes.per_device_train_batch_size or 16
        expected += [(images, sizes.global_crop_size, sizes.local_crop_size, sizes.gram_crop_size)] * (16 // images)
    assert seen == expected


def test_one_entry_is_the_run_without_the_field(tmp_path):
    plain = train(tmp_path / "plain", max_steps=2)
    entry = {"global": 16, "local": 8, "probability": 1}
    assert losses(train(tmp_path / "mixed", max_steps=2, crop_sizes=[entry])) == losses(plain)


def test_what_a_resumed_run_compares(tmp_path):
    plain, parts = (make_args(tmp_path, crop_sizes=sizes, **GRAM) for sizes in (SIZES, with_parts(4)))
    compared = SSLConfig.result_fields(plain.recipe())
    assert compared == SSLConfig.result_fields(parts.recipe())
    other = make_args(tmp_path, crop_sizes=[SIZES[0] | {"probability": 0.7}, SIZES[1]], **GRAM)
    assert compared["crop_sizes"] != SSLConfig.result_fields(other.recipe())["crop_sizes"]
    assert SSLConfig.result_fields({})["crop_sizes"] is None


def entry(**changes):
    return [{"global": 16, "local": 8, "probability": 1, **changes}]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"crop_sizes": entry(globl=3)}, r"crop_sizes\.0 has no entry 'globl'; did you mean global"),
        ({"crop_sizes": entry(probability=0.5)}, "the probabilities of crop_sizes sum to 0.5; they must sum to 1"),
        (
            {"crop_sizes": entry(**{"global": 18})},
            r"crop_sizes\.0\.global 18 is not a multiple of patch_size 4; use 16 or 20",
        ),
        ({"crop_sizes": entry(local=9)}, r"crop_sizes\.0\.local 9 is not a multiple of patch_size 4; use 8 or 12"),
        (
            {"crop_sizes": entry(gram=26), **GRAM},
            r"crop_sizes\.0\.gram 26 is not a multiple of patch_size 4; use 24 or 28",
        ),
        (
            {"crop_sizes": entry(gram=24)},
            r"crop_sizes\.0\.gram 24 needs a Gram teacher of its own, but gram_teacher is null; set",
        ),
        ({"crop_sizes": entry(gram=24), "gram_teacher": "ema"}, r"crop_sizes\.0\.gram 24 .* but gram_teacher is ema;"),
        ({"crop_sizes": entry(), "gram_crop_size": 24, **GRAM}, r"crop_sizes\.0 has no gram, but the Gram teacher"),
        (
            {"crop_sizes": [SIZES[0] | {"gram": None}, *SIZES[1:]], **GRAM},
            r"crop_sizes\.0 has no gram, .* give gram in every entry, or nowhere",
        ),
        (
            {"crop_sizes": entry(per_device_train_batch_size=5)},
            r"crop_sizes\.0\.per_device_train_batch_size 5 does not divide the 16 images of a rank's micro-batch .* "
            "use 4 or 8",
        ),
        (
            {"crop_sizes": entry(per_device_train_batch_size=8), "per_device_train_batch_size": 4},
            r"crop_sizes\.0\.per_device_train_batch_size 8 does not divide the 4 images .* use 4",
        ),
        (
            {"crop_sizes": entry(per_device_train_batch_size=2)},
            r"crop_sizes\.0\.per_device_train_batch_size 2 tears what KoLeo looks at together, groups of 4 images; "
            "set koleo_group_size to 2",
        ),
        (
            {"crop_sizes": entry(per_device_train_batch_size=8), "koleo_group_size": None},
            r"per_device_train_batch_size 8 tears .* the whole global batch; set koleo_group_size to 8",
        ),
        (
            {
                "crop_sizes": entry(per_device_train_batch_size=4),
                "gram_per_image": False,
                "gram_group_size": 8,
                **GRAM,
            },
            "gram_group_size 8 does not divide the 4 images of one forward pass on one rank; use 4",
        ),
    ],
)
def test_sizes_that_do_not_fit_the_run_are_refused(tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        make_args(tmp_path, **overrides)


def test_no_local_crops_and_sizes_that_nobody_cuts(tmp_path):
    args = make_args(tmp_path, num_local_crops=0, crop_sizes=entry(local=9))
    assert args.views(*args.crop_size_mix().sizes).num_local_crops == 0
