"""Ranks in groups, each of which trains one student on the whole global batch, while the teacher runs on all ranks.

A rank asks the teacher about its share of the images. Then each image, its masks and what the teacher said of it go to
one rank of every group (`Exchange`), so that no rank holds more than the images that it has and those that it trains
on. Crops travel as bytes, and the teacher's answer as the bottleneck of its heads.

Letters: B images of a part, J images that a rank trains on in a step.
"""

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dinov3_hf.data.collators import mask_entries
from dinov3_hf.distributed.exchange import Exchange, Layout
from dinov3_hf.models.dinov3_pretraining.distillation_targets import TeacherAnswer
from dinov3_hf.training.distillation_config import DistillationConfig

Batch = dict[str, Any]
_CROPS = ("global", "local")


class RankGroups:
    """
    Args:
        args: of the run, with a `split` of the ranks.

    Attributes:
        name: of the student that this rank trains.
        group: of the ranks that train it.
    """

    def __init__(self, args: DistillationConfig) -> None:
        self._device = args.device
        timeout = timedelta(seconds=args.ddp_timeout)
        me, batch_size, first = args.process_index, args.global_batch_size, 0
        layouts = []
        for name, count in (args.split or {}).items():
            ranks = tuple(range(first, first + count))
            first += count
            layout = Layout(ranks, args.student_args[name].train_batch_size, batch_size)
            group: Any = dist.new_group(list(ranks), timeout=timeout)  # every rank makes every group
            if me in ranks:
                self.name, self.group, self._layout = name, group, layout
            layouts.append(layout)
        source = Layout(tuple(range(args.world_size)), args.train_batch_size, batch_size)
        self._exchange = Exchange(source, layouts)
        self._first_images = self._layout.positions(me)[:: self._layout.size].tolist()  # of each part

    def share_out(self, parts: list[Batch], answers: list[TeacherAnswer]) -> tuple[list[Batch], list[TeacherAnswer]]:
        """
        What this rank trains on in a step. All ranks call it.

        Args:
            parts: what it has, in the order of the batch; see `collate_views`.
            answers: what the teacher says of each part.

        Returns:
            The same for the images that it trains on, on its device.
        """
        rows = [_image_rows(part, answer) for part, answer in zip(parts, answers, strict=True)]
        received = {name: self._send(torch.cat([part[name] for part in rows])) for name in rows[0]}
        size, shared, said = self._layout.size, [], []
        masked = [answer.masked for answer in answers if answer.masked is not None]
        if masked:
            counts = torch.cat([part["mask"] for part in rows]).flatten(1).sum(1).cpu()  # masked patches of each image
            travelled, counts = self._exchange.send_ragged(torch.cat(masked), counts)
            ends = [0, *counts.view(-1, size).sum(1).cumsum(0).tolist()]
        for k, first_image in enumerate(self._first_images):
            own = {name: values[k * size : (k + 1) * size] for name, values in received.items()}
            shared.append(_batch(own, first_image))
            of_part = travelled[ends[k] : ends[k + 1]] if masked else None
            said.append(TeacherAnswer(own["cls"], of_part, own.get("patches")))
        return shared, said

    def _send(self, rows: Tensor) -> Tensor:
        return self._exchange.send(rows.to(self._device).contiguous())


def _image_rows(part: Batch, answer: TeacherAnswer) -> dict[str, Tensor]:
    """What belongs to each image of a part, (B, ...): `mask`, `global_crops`, `global_photometric/blur`, `cls`, ..."""
    size = len(part["mask"]) // 2
    rows = {"mask": part["mask"]}
    for crops in _CROPS:
        rows[f"{crops}_crops"] = part[f"{crops}_crops"]
        for name, values in part[f"{crops}_photometric"].items():
            rows[f"{crops}_photometric/{name}"] = torch.from_numpy(np.ascontiguousarray(values))
    by_image = {
        name: crop_major.unflatten(0, (len(crop_major) // size, size)).transpose(0, 1)
        for name, crop_major in rows.items()
    }
    patches = {} if answer.patches is None else {"patches": answer.patches}
    return by_image | {"cls": answer.cls, **patches}


def _batch(rows: Mapping[str, Tensor], first_image: int) -> Batch:
    """The part of a batch, crop-major, that `_image_rows` was made of."""
    of_teacher = ("cls", "patches")
    crop_major = {
        name: values.transpose(0, 1).flatten(0, 1) for name, values in rows.items() if name not in of_teacher
    }
    batch: Batch = {name: crop_major[name] for name in ("mask", *(f"{crops}_crops" for crops in _CROPS))}
    for crops in _CROPS:
        prefix = f"{crops}_photometric/"
        batch[prefix[:-1]] = {
            name.removeprefix(prefix): values.cpu().numpy()
            for name, values in crop_major.items()
            if name.startswith(prefix)
        }
    return batch | {"first_image": first_image} | mask_entries(batch["mask"])
