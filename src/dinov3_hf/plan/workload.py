"""What a recipe asks of a machine: the part of it that memory and time depend on."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from dinov3_hf.plan.backbones import Backbone, Crops, Recomputation

NUM_GLOBAL_CROPS = 2


@dataclass(frozen=True)
class Head:
    """A prototype head; fields as in a recipe."""

    num_prototypes: int
    bottleneck_dim: int
    hidden_dim: int
    num_layers: int
    mlp_bias: bool

    def widths(self, width: int) -> list[int]:
        """From the feature to the bottleneck."""
        return [width, *[self.hidden_dim] * (self.num_layers - 1), self.bottleneck_dim]

    def weights(self, width: int) -> int:
        """Of its matrices."""
        return sum(a * b for a, b in pairwise(self.widths(width))) + self.bottleneck_dim * self.num_prototypes

    def num_parameters(self, width: int) -> int:
        return self.weights(width) + self.mlp_bias * sum(self.widths(width)[1:])


@dataclass(frozen=True)
class Resolution:
    """Sides of the crops of a step in pixels, and the share of the steps that have them."""

    global_side: int
    local_side: int
    gram_side: int | None
    share: float


@dataclass(frozen=True)
class Workload:
    """
    Args:
        backbone: of student and teacher.
        dino_head: on CLS tokens.
        ibot_head: on masked patches; None without L_iBOT.
        resolutions: what the steps have; the shares sum to 1.
        num_local_crops: of an image.
        masked_share: of the patches of global crops, on average.
        gram_teacher: `separate` has parameters of its own; `ema` is the teacher.
        global_batch_size: images of an optimizer step. The recipe fixes it, so a run cannot use more ranks.
        max_steps: optimizer steps of the run.
        image_group: images that have to be in the same forward pass of a rank.
        koleo_group: images that have to be in the same forward pass of all ranks.
        drop_path_group: images of which an exact subset goes through a branch.
        bf16: whether matrix products are under bfloat16 autocast.
        recomputation: what the backward pass computes anew.
        micro_batch: images of a forward pass of a rank that the user asks for; None is the most that fit.
    """

    backbone: Backbone
    dino_head: Head
    ibot_head: Head | None
    resolutions: tuple[Resolution, ...]
    num_local_crops: int
    masked_share: float
    gram_teacher: Literal["separate", "ema"] | None
    global_batch_size: int
    max_steps: int
    image_group: int = 1
    koleo_group: int = 1
    drop_path_group: int = 1
    bf16: bool = True
    recomputation: Recomputation = "none"
    micro_batch: int | None = None

    @property
    def heads(self) -> list[Head]:
        return [self.dino_head] if self.ibot_head is None else [self.dino_head, self.ibot_head]

    @property
    def head_parameters(self) -> int:
        return sum(head.num_parameters(self.backbone.width) for head in self.heads)

    @property
    def num_parameters(self) -> int:
        """Of the student, and of the teacher."""
        return self.backbone.num_parameters + self.head_parameters

    def student_crops(self, resolution: Resolution, num_images: float) -> list[Crops]:
        """What the student sees of `num_images` images in one forward pass."""
        groups = [(NUM_GLOBAL_CROPS, resolution.global_side), (self.num_local_crops, resolution.local_side)]
        return [
            Crops(int(num_images * number), side, self.backbone.kept_share(number * self.drop_path_group))
            for number, side in groups
            if number > 0
        ]

    def masked_patches(self, resolution: Resolution, num_images: float) -> float:
        """Of `num_images` images, on average; 0 without L_iBOT."""
        if self.ibot_head is None:
            return 0.0
        patches = self.backbone.patches(resolution.global_side)
        return num_images * NUM_GLOBAL_CROPS * self.masked_share * patches
