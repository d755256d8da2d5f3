"""Samples to a batch.

Letters: B images in the batch of one rank; n local crops; P patches in a global crop; M masked patches in the batch.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def collate_views(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the batch of `samples` (see `SSLDataset`), crop-major: crop 1 of all samples, then crop 2, and so on.

    - `global_crops` uint8 (2B, C, H, W), `local_crops` uint8 (nB, C, h, w), `gram_crops` uint8 (2B, C, g, g) if any
    - `global_photometric`, `local_photometric`: numpy arrays with one row a crop
    - `mask` bool (2B, P)
    - `mask_indices` int64 (M,): masked entries of the flattened mask, ascending
    - `mask_weight` float32 (M,): 1 / number of masked patches in the same crop
    - `first_image`: place of the first image in the global batch; the others follow it
    - `unreadable`: name and reason of each image that could not be read and was replaced
    """
    merged = [name for name in samples[0] if name != "image"]
    batch: dict[str, Any] = {name: _crop_major([sample[name] for sample in samples]) for name in merged}
    return batch | {"first_image": samples[0]["image"]} | mask_entries(batch["mask"])


def subset_batch(batch: dict[str, Any], divide_by: int) -> dict[str, Any]:
    """Return the batch of the first `B // divide_by` images of `batch`."""
    return _part(batch, 0, _num_images(batch) // divide_by)


def split_batch(batch: dict[str, Any], size: int) -> list[dict[str, Any]]:
    """Return the batches of `size` images each, a divisor of B, that make up `batch`, in their order."""
    num_images = _num_images(batch)
    return [batch] if size == num_images else [_part(batch, i, i + size) for i in range(0, num_images, size)]


def _num_images(batch: dict[str, Any]) -> int:
    return len(batch["mask"]) // 2


def _part(batch: dict[str, Any], start: int, stop: int) -> dict[str, Any]:
    others = ("first_image", "mask_indices", "mask_weight")
    rows = {name: values for name, values in batch.items() if name not in others}
    part: dict[str, Any] = _images(rows, _num_images(batch), start, stop)
    return part | {"first_image": batch["first_image"] + start} | mask_entries(part["mask"])


def _crop_major(values: list[Any]) -> Any:
    """Merge values of one row a crop: tensors, arrays, or dictionaries of them; lists are joined."""
    if isinstance(values[0], dict):
        return {name: _crop_major([value[name] for value in values]) for name in values[0]}
    if isinstance(values[0], list):
        return [entry for value in values for entry in value]
    if isinstance(values[0], Tensor):
        return torch.stack(values, dim=1).flatten(0, 1)
    return np.stack(values, axis=1).reshape(-1, *values[0].shape[1:])


def _images(values: Any, num_images: int, start: int, stop: int) -> Any:
    """The rows of images `start` to `stop` of what `_crop_major` merged; lists stay whole."""
    if isinstance(values, dict):
        return {name: _images(value, num_images, start, stop) for name, value in values.items()}
    if isinstance(values, list):
        return values
    rest = values.shape[1:]
    num_crops = len(values) // num_images
    return values.reshape(num_crops, num_images, *rest)[:, start:stop].reshape(num_crops * (stop - start), *rest)


def mask_entries(mask: Tensor) -> dict[str, Tensor]:
    """`mask_indices` and `mask_weight` of a mask (2B, P), as `collate_views` returns them."""
    num_masked = mask.sum(1, keepdim=True)  # (2B, 1)
    weight = (1 / num_masked.clamp(min=1)).expand_as(mask)[mask]  # (M,)
    return {"mask_indices": mask.flatten().nonzero().flatten(), "mask_weight": weight}
