"""Batches are crop-major; the masked entries follow from the masks."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dinov3_hf.data.collators import collate_views, split_batch, subset_batch
from tests.testing_utils import FIXTURES

RENAMED = {
    "collated_global_crops": "global_crops",
    "collated_local_crops": "local_crops",
    "collated_gram_teacher_crops": "gram_crops",
    "collated_masks": "mask",
    "mask_indices_list": "mask_indices",
    "masks_weight": "mask_weight",
}


@pytest.mark.parity
@pytest.mark.parametrize("case", ["collate", "collate_shift"])
def test_recorded_batch(case):
    folder = FIXTURES / "h_masking" / case
    config = json.loads((folder / "case.json").read_text())["config"]
    recorded = load_file(folder / "outputs.safetensors")
    entries = {ours: recorded[native] for native, ours in RENAMED.items() if native in recorded}
    rows = {
        name: values.unflatten(0, (-1, config["batch_size"]))  # (crops, B, ...)
        for name, values in entries.items()
        if name == "mask" or name.endswith("crops")
    }
    samples = [
        {"image": image, **{name: values[:, image] for name, values in rows.items()}}
        for image in range(config["batch_size"])
    ]
    batch = collate_views(samples)
    assert batch.keys() == {*entries, "first_image"}
    for name, expected in entries.items():
        torch.testing.assert_close(batch[name], expected)

    if "subset_divide_by" in config:
        subset = subset_batch(batch, config["subset_divide_by"])
        for native, ours in RENAMED.items():
            if f"subset/{native}" in recorded:
                torch.testing.assert_close(subset[ours], recorded[f"subset/{native}"])


def sample(image, num_local=3):
    """Crop c of an image is filled with 10 c + image."""
    number = torch.arange(5)[:, None, None, None] * 10 + image
    return {
        "global_crops": number[:2].expand(2, 3, 4, 4),
        "local_crops": number[2 : 2 + num_local].expand(num_local, 3, 2, 2),
        "local_photometric": {"factor": np.arange(2, 2 + num_local)[:, None] * 10 + image},
        "mask": torch.tensor([[False, True, True], [False, False, image == 0]]),
        "image": 8 + image,
    }


def test_layout():
    batch = collate_views([sample(image) for image in range(4)])
    assert batch["global_crops"][:, 0, 0, 0].tolist() == [0, 1, 2, 3, 10, 11, 12, 13]
    assert batch["local_crops"][:, 0, 0, 0].tolist() == [20, 21, 22, 23, 30, 31, 32, 33, 40, 41, 42, 43]
    assert batch["local_photometric"]["factor"][:, 0].tolist() == batch["local_crops"][:, 0, 0, 0].tolist()
    assert batch["mask_indices"].tolist() == [1, 2, 4, 5, 7, 8, 10, 11, 14]
    assert batch["mask_weight"].tolist() == [0.5] * 8 + [1.0]
    assert batch["first_image"] == 8
    subset = subset_batch(batch, 2)
    assert subset["global_crops"][:, 0, 0, 0].tolist() == [0, 1, 10, 11]
    assert subset["local_photometric"]["factor"][:, 0].tolist() == [20, 21, 30, 31, 40, 41]
    assert subset["mask_indices"].tolist() == [1, 2, 4, 5, 8]


def test_nothing_masked_and_no_local_crops():
    samples = [sample(image, num_local=0) | {"mask": torch.zeros(2, 3, dtype=torch.bool)} for image in range(2)]
    batch = collate_views(samples)
    assert batch["local_crops"].shape == (0, 3, 2, 2)
    assert batch["mask_indices"].shape == batch["mask_weight"].shape == (0,)
    assert subset_batch(batch, 2)["local_crops"].shape == (0, 3, 2, 2)


@pytest.mark.invariant
@pytest.mark.parametrize("size", [1, 2, 4])
def test_parts_of_a_batch_are_the_batches_of_their_images(size):
    samples = [sample(image) for image in range(4)]
    parts = split_batch(collate_views(samples), size)
    assert len(parts) == 4 // size
    for i, part in enumerate(parts):
        expected = collate_views(samples[i * size : (i + 1) * size])
        assert part.keys() == expected.keys()
        assert part["first_image"] == expected["first_image"] == 8 + i * size
        for name in ("global_crops", "local_crops", "mask", "mask_indices", "mask_weight"):
            torch.testing.assert_close(part[name], expected[name], rtol=0, atol=0)
        np.testing.assert_array_equal(part["local_photometric"]["factor"], expected["local_photometric"]["factor"])
    empty = collate_views([sample(image, num_local=0) for image in range(4)])
    assert all(part["local_crops"].shape == (0, 3, 2, 2) for part in split_batch(empty, size))
