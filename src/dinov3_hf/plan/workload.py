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

    @property
    def num_outputs(self) -> int:
        return self.num_prototypes

    def widths(self, width: int) -> list[int]:
        """From the feature to the bottleneck."""
        return [width, *[self.hidden_dim] * (self.num_layers - 1), self.bottleneck_dim]

    def weights(self, width: int) -> int:
        """Of its matrices."""
        return sum(a * b for a, b in pairwise(self.widths(width))) + self.bottleneck_dim * self.num_prototypes

    def num_parameters(self, width: int) -> int:
        return self.weights(width) + self.mlp_bias * sum(self.widths(width)[1:])

    @property
    def last_weights(self) -> int:
        """Of the last layer, whose result are the logits."""
        return self.bottleneck_dim * self.num_prototypes

    def kept_numbers(self, width: int) -> int:
        """For the backward pass of a row: inputs of the layers and of the activations between, and the bottleneck
        before and after normalisation."""
        return width + 2 * sum(self.widths(width)[1:-1]) + 2 * self.bottleneck_dim


@dataclass(frozen=True)
class Projection:
    """A linear layer to the width of a teacher's tokens, in the place of a head."""

    num_outputs: int

    def weights(self, width: int) -> int:
        return width * self.num_outputs

    def num_parameters(self, width: int) -> int:
        return self.weights(width) + self.num_outputs

    def kept_numbers(self, width: int) -> int:
        return width


@dataclass(frozen=True)
class Resolution:
    """Sides of the crops of a step in pixels, and the share of the steps that have them."""

    global_side: int
    local_side: int
    gram_side: int | None
    share: float


@dataclass(frozen=True)
class FixedTeacher:
    """
    The teacher of a distillation, which runs once for all students.

    Args:
        num_parameters: of its backbone.
        width: of its tokens.
        crop_flop: operations of its forward pass of a global crop.
        crop_bytes: what a crop has at most in that pass, beside weights.
        dino_head, ibot_head: that the students' objective asks; None for features.
        masked_patches: of an image that the iBOT head is asked for, on average.
        asked_patches: of an image whose tokens are asked for, by features or by L_Gram.
        scale: how many times larger its crops are than the students'.
    """

    num_parameters: int
    width: int
    crop_flop: float
    crop_bytes: float
    dino_head: Head | None = None
    ibot_head: Head | None = None
    masked_patches: float = 0.0
    asked_patches: int = 0
    scale: float = 1.0

    @property
    def head_parameters(self) -> int:
        return sum(head.num_parameters(self.width) for head in (self.dino_head, self.ibot_head) if head is not None)

    @property
    def answer_flop(self) -> float:
        """Operations of an image: of the backbone, and of the heads to their bottlenecks."""
        return NUM_GLOBAL_CROPS * self.crop_flop + sum(
            2 * rows * (head.weights(self.width) - head.last_weights) for head, rows in self._rows_of_heads
        )

    @property
    def target_flop(self) -> float:
        """Operations of an image: from the bottlenecks to the logits."""
        return sum(2 * rows * head.last_weights for head, rows in self._rows_of_heads)

    @property
    def answer_numbers(self) -> float:
        """What is known of an image when the teacher has answered: bottlenecks, or tokens."""
        cls = self.width if self.dino_head is None else self.dino_head.bottleneck_dim
        masked = 0.0 if self.ibot_head is None else self.masked_patches * self.ibot_head.bottleneck_dim
        return NUM_GLOBAL_CROPS * cls + masked + self.asked_patches * self.width

    @property
    def target_numbers(self) -> float:
        """Assignments of an image."""
        return sum(rows * head.num_prototypes for head, rows in self._rows_of_heads)

    @property
    def _rows_of_heads(self) -> list[tuple[Head, float]]:
        rows = [(self.dino_head, float(NUM_GLOBAL_CROPS)), (self.ibot_head, self.masked_patches)]
        return [(head, number) for head, number in rows if head is not None]


@dataclass(frozen=True)
class Workload:
    """
    Args:
        backbone: of student and teacher.
        dino_head: on CLS tokens; a projection where the targets are features.
        ibot_head: on masked patches, or a projection of all patches; None without such a term.
        resolutions: what the steps have; the shares sum to 1.
        num_local_crops: of an image.
        masked_share: of the patches of global crops that `ibot_head` sees, on average.
        gram_teacher: `separate` has parameters of its own; `ema` is the teacher; `fixed` that of a distillation.
        global_batch_size: images of an optimizer step. The recipe fixes it, so a run cannot use more ranks.
        max_steps: optimizer steps of the run.
        image_group: images that have to be in the same forward pass of a rank.
        koleo_group: images that have to be in the same forward pass of all ranks.
        drop_path_group: images of which an exact subset goes through a branch.
        bf16: whether matrix products are under bfloat16 autocast.
        recomputation: what the backward pass computes anew.
        micro_batch: images of a forward pass of a rank that the user asks for; None is the most that fit.
        fixed_teacher: of a distillation, in which this is one student; None in pre-training, where the teacher is the
            moving average.
        patch_size: pixels between two patches that are compared; None for those of the backbone.
    """

    backbone: Backbone
    dino_head: Head | Projection
    ibot_head: Head | Projection | None
    resolutions: tuple[Resolution, ...]
    num_local_crops: int
    masked_share: float
    gram_teacher: Literal["separate", "ema", "fixed"] | None
    global_batch_size: int
    max_steps: int
    image_group: int = 1
    koleo_group: int = 1
    drop_path_group: int = 1
    bf16: bool = True
    recomputation: Recomputation = "none"
    micro_batch: int | None = None
    fixed_teacher: FixedTeacher | None = None
    patch_size: int | None = None

    @property
    def heads(self) -> list[Head | Projection]:
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
        return num_images * NUM_GLOBAL_CROPS * self.masked_share * self.patches(resolution)

    def patches(self, resolution: Resolution) -> int:
        """Of a global crop, that are compared with the teacher's."""
        if self.patch_size is None:
            return self.backbone.patches(resolution.global_side)
        return (resolution.global_side // self.patch_size) ** 2
