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
    - `unreadable`: name and reason of each image that could not be read and was replaced
    """
    batch: dict[str, Any] = {name: _crop_major([sample[name] for sample in samples]) for name in samples[0]}
    return batch | _mask_entries(batch["mask"])


def subset_batch(batch: dict[str, Any], divide_by: int) -> dict[str, Any]:
    """Return the batch of the first `B // divide_by` images of `batch`."""
    num_images = len(batch["mask"]) // 2
    rest = {name: values for name, values in batch.items() if name not in ("mask_indices", "mask_weight")}
    subset: dict[str, Any] = _first_images(rest, num_images, num_images // divide_by)
    return subset | _mask_entries(subset["mask"])


def _crop_major(values: list[Any]) -> Any:
    """Merge values of one row a crop: tensors, arrays, or dictionaries of them; lists are joined."""
    if isinstance(values[0], dict):
        return {name: _crop_major([value[name] for value in values]) for name in values[0]}
    if isinstance(values[0], list):
        return [entry for value in values for entry in value]
    if isinstance(values[0], Tensor):
        return torch.stack(values, dim=1).flatten(0, 1)
    return np.stack(values, axis=1).reshape(-1, *values[0].shape[1:])


def _first_images(values: Any, num_images: int, num_kept: int) -> Any:
    """Undo the merging of `_crop_major` for the first `num_kept` images."""
    if isinstance(values, dict):
        return {name: _first_images(value, num_images, num_kept) for name, value in values.items()}
    if isinstance(values, list):
        return values
    rest = values.shape[1:]
    return values.reshape(-1, num_images, *rest)[:, :num_kept].reshape(-1, *rest)


def _mask_entries(mask: Tensor) -> dict[str, Tensor]:
    num_masked = mask.sum(1, keepdim=True)  # (2B, 1)
    weight = (1 / num_masked.clamp(min=1)).expand_as(mask)[mask]  # (M,)
    return {"mask_indices": mask.flatten().nonzero().flatten(), "mask_weight": weight}
