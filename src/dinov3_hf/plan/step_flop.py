"""Floating-point operations of a training step."""

from typing import NamedTuple

from dinov3_hf.plan.workload import NUM_GLOBAL_CROPS, Head, Projection, Resolution, Workload


class StepFlop(NamedTuple):
    """Floating-point operations of one image, forward and backward; an element-wise operation is none."""

    student: float  # its backbone
    teacher: float  # its backbone, forward only
    heads: float  # of both
    gram: float  # the Gram teacher's forward, and the similarities of patches
    recomputed: float  # what the backward pass computes a second time

    @property
    def model(self) -> float:
        """What the method asks for."""
        return self.student + self.teacher + self.heads + self.gram

    @property
    def total(self) -> float:
        """What the machine does."""
        return self.model + self.recomputed


def step_flop(workload: Workload, resolution: Resolution) -> StepFlop:
    """
    Of one image of an optimizer step with crops of `resolution`.

        student  = sum over crops of 2 E + k (3 W + 3.5 A)
        teacher  = sum over global crops of E + W + A
        heads    = 2 H_DINO (3 (G + n) + G) + 2 H_iBOT (3 + 1) M
        gram     = sum over Gram crops of E + W + A, and 2 G P^2 D (3 + 1)
        recomputed = sum over crops of k (W + A) where whole blocks are recomputed

    with E, W and A operations of the first layer, of the blocks' matrix products and of attention in the forward of a
    crop, k the share of crops that stochastic depth keeps, H the weights of a head, M masked patches, P patches and
    G = 2 global and n local crops of an image. The backward pass of a matrix product is two of them, that of an
    attention two and a half. In a distillation the teacher is none of this: see `FixedTeacher`.
    """
    backbone, fixed = workload.backbone, workload.fixed_teacher
    crops = workload.student_crops(resolution, 1)
    student = sum(group.number * backbone.flop(group.side).training(group.kept) for group in crops)
    teacher = 0.0 if fixed else NUM_GLOBAL_CROPS * backbone.flop(resolution.global_side).forward

    width = backbone.width
    rows, teacher_rows = sum(group.number for group in crops), 0 if fixed else NUM_GLOBAL_CROPS
    heads = _head(workload.dino_head, width, rows, teacher_rows)
    if workload.ibot_head is not None:
        masked = workload.masked_patches(resolution, 1)
        heads += _head(workload.ibot_head, width, masked, 0.0 if fixed else masked)

    gram = 0.0
    if workload.gram_teacher is not None:
        teacher_width = fixed.width if fixed else width
        gram = NUM_GLOBAL_CROPS * 2 * workload.patches(resolution) ** 2 * (3 * width + teacher_width)
    if workload.gram_teacher == "separate":
        gram += NUM_GLOBAL_CROPS * backbone.flop(resolution.gram_side or resolution.global_side).forward

    recomputed = 0.0
    if workload.recomputation == "full":
        recomputed = sum(group.number * group.kept * backbone.flop(group.side).blocks for group in crops)
    return StepFlop(student, teacher, heads, gram, recomputed)


def _head(head: Head | Projection, width: int, rows: float, teacher_rows: float) -> float:
    return 2 * head.weights(width) * (3 * rows + teacher_rows)
