"""The random numbers of the student's forward passes: functions of the seed, the step and the global batch.

Which images stochastic depth leaves out depends on their place in the global batch, not on the rank, the micro-batch
or the part of one that they are in. The published runs draw on each GPU for its own images; a group of consecutive
images is what is left of that GPU here. RoPE is augmented alike for all images of a step.

Letters: C crops of an image in a crop group, L blocks, S images of a group of stochastic depth, J such groups, B
images of the forward pass.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig

from dinov3_hf.data.seeding import Stream, random_generator
from dinov3_hf.models.dinov3_vit.configuration_dinov3_vit import DINOv3ViTConfig
from dinov3_hf.models.dinov3_vit.layers import ForwardDraws, num_kept
from dinov3_hf.models.dinov3_vit.rope import RopeDraws, draw_bounds, num_drawn_tables


@dataclass(frozen=True)
class StudentDraws:
    """
    Args:
        backbone: configuration of a ViT or a ConvNeXt.
        num_crops: C of each crop group.
        group_size: S, for a ViT; a ConvNeXt draws for each image by itself.
        seed: of the run.
    """

    backbone: PreTrainedConfig
    num_crops: tuple[int, ...]
    group_size: int
    seed: int

    def at(self, step: int, images: range, device: torch.device) -> ForwardDraws | tuple[Tensor, ...] | None:
        """
        What the backbone's `forward` takes as `draws`.

        Args:
            step: the optimizer step, from 0.
            images: places in the global batch, a ViT's a whole number of groups of stochastic depth.
            device: where the numbers are to be.
        """
        if isinstance(self.backbone, DINOv3ViTConfig):
            return ForwardDraws(self._kept_images(step, images, device), self._rope(self.backbone, step, device))
        if self.backbone.drop_path_rate == 0:
            return None
        drawn = self._uniform(step, images, sum(self.backbone.depths))  # for each crop group (B, L, C, 1)
        by_block = [group.transpose(1, 2, 0, 3).reshape(group.shape[1], -1) for group in drawn]  # (L, C * B)
        return tuple(_on_device(group.astype(np.float32), device) for group in by_block)

    def _kept_images(self, step: int, images: range, device: torch.device) -> tuple[Tensor, ...] | None:
        """The images, crop-major, that go through each branch of each block: for each crop group (L, 2, kept)."""
        rate, size = self.backbone.drop_path_rate, self.group_size
        if rate == 0:
            return None
        num_blocks, groups = self.backbone.num_hidden_layers, range(images.start // size, images.stop // size)
        kept = []
        for drawn in self._uniform(step, groups, 2 * num_blocks, size):  # (J, 2L, C, S)
            order = drawn.reshape(*drawn.shape[:2], -1).argsort(-1)[..., : num_kept(drawn[0, 0].size, rate)]
            crop, image = np.divmod(order, size)  # (J, 2L, kept of a group)
            rows = crop * len(images) + np.arange(len(groups))[:, None, None] * size + image
            kept.append(_on_device(rows.transpose(1, 0, 2).reshape(num_blocks, 2, -1), device))
        return tuple(kept)

    def _uniform(self, step: int, groups: range, count: int, size: int = 1) -> list[np.ndarray]:
        """Numbers in [0, 1) of groups of `size` images: for each crop group (J, count, C, S) float64."""
        generators = [random_generator(self.seed, Stream.DROP_PATH, step, group) for group in groups]
        return [np.stack([rng.random((count, crops, size)) for rng in generators]) for crops in self.num_crops]

    def _rope(self, config: DINOv3ViTConfig, step: int, device: torch.device) -> tuple[RopeDraws, ...] | None:
        """The same for all images of the step, others for each crop group and each table."""
        bounds = draw_bounds(config)
        if not bounds:
            return None
        rng, num_tables = random_generator(self.seed, Stream.ROPE, step), num_drawn_tables(config)
        return tuple(
            RopeDraws(
                **{
                    name: _on_device(rng.uniform(-bound, bound, (num_tables, count)).astype(np.float32), device)
                    for name, (bound, count) in bounds.items()
                }
            )
            for _ in self.num_crops
        )


def _on_device(values: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    if device.type == "cuda":  # the copy then waits for nothing
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
