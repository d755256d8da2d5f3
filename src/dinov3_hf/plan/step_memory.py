"""Bytes on a GPU in the course of a training step."""

from dataclasses import dataclass

from dinov3_hf.plan.engines import Engine, State
from dinov3_hf.plan.workload import NUM_GLOBAL_CROPS, Projection, Resolution, Workload


@dataclass(frozen=True)
class StepMemory:
    """
    Bytes on one rank. The parts are not all there at the same time: gradients grow while activations go.

    Args:
        state: parameters, gradients, optimizer, teachers, buffers of communication; of one student.
        activations: of the student's backbone, waiting for the backward pass, with the rounded copies of weights.
        heads: their activations, logits and targets.
        crops: the images, of all forward passes of a step.
        peak: the most that is there at once.
    """

    state: State
    activations: float
    heads: float
    crops: float
    peak: float


def step_memory(
    workload: Workload, resolution: Resolution, engine: Engine, num_images: int, share: int, beside: float = 0.0
) -> StepMemory:
    """
    Args:
        num_images: of one forward pass on a rank.
        share: images that a rank has of the global batch; the teacher's targets for all of them are made first.
        beside: bytes that are always there beside this student: a fixed teacher, other students.
    """
    b = 2 if workload.bf16 else 4
    backbone, width, fixed = workload.backbone, workload.backbone.width, workload.fixed_teacher
    accumulates = share > num_images
    state = engine.state(workload)
    crops = workload.student_crops(resolution, num_images)
    separate_qkv = engine.name == "zero3" and engine.num_ranks > 1
    kept = backbone.kept_bytes(crops, b, workload.recomputation, separate_qkv)
    rounded = engine.rounded_weights(workload)
    activations = kept.outside + kept.blocks + rounded

    rows = sum(group.number for group in crops)
    global_rows = NUM_GLOBAL_CROPS * num_images
    masked = workload.masked_patches(resolution, num_images)
    K = workload.dino_head.num_outputs
    K_masked = 0 if workload.ibot_head is None else workload.ibot_head.num_outputs
    losses: float = b * rows * workload.dino_head.kept_numbers(width)
    if workload.ibot_head is not None:
        losses += b * masked * workload.ibot_head.kept_numbers(width)
    if isinstance(workload.dino_head, Projection):
        # Predictions in float32, and both sides normalised; every local crop meets both global crops.
        pairs = global_rows + NUM_GLOBAL_CROPS * (rows - global_rows)
        losses += 12 * (K * pairs + K_masked * masked)
    else:
        # Logarithms of all predictions, and the sums of the targets that they are multiplied with.
        losses += 4 * (K * (rows + 2 * num_images) + K_masked * masked)
    if workload.gram_teacher is not None:
        patches = workload.patches(resolution)
        widths = 2 * width + (fixed.width if fixed else width)
        losses += 4 * global_rows * patches * (widths + patches)  # both sides' features, and their difference
    if fixed:
        assignments = share * fixed.target_numbers
        targets_of_share = b * share * fixed.answer_numbers + 4 * assignments
        teacher_pass = global_rows * fixed.crop_bytes
    else:
        assignments = NUM_GLOBAL_CROPS * share * K + workload.masked_patches(resolution, share) * K_masked
        targets_of_share = 4 * assignments
        teacher_pass = backbone.passing_bytes(global_rows, resolution.global_side, b)
    # While a term is computed: logits, the same divided by the temperature.
    predicting = (b + 4) * max(masked * K_masked, (rows - global_rows) * K)
    if workload.gram_teacher == "separate":
        predicting = max(
            predicting, backbone.passing_bytes(global_rows, resolution.gram_side or resolution.global_side, b)
        )
    tokens = sum(group.number * backbone.tokens(group.side) for group in crops)
    predicting += 4 * tokens * width  # the normalised tokens

    cut = cut_pixels(workload, resolution)
    # Bytes until they are finished.
    images = 4 * num_images * _finished_pixels(workload, resolution) + (share * cut if accumulates else 0)

    always = beside + state.parameters + state.optimizer + state.teacher + state.gram_teacher + state.buffers + images
    before = state.gradients if accumulates else 0.0  # of earlier forward passes
    # Logits of all images, as they come and put together, their logarithms, and what these are compared with.
    parts = 2 if accumulates else 1
    balancing = assignments * (parts * b + 8)
    peaks = [
        always + teacher_pass + balancing,
        always + before + targets_of_share + activations + losses + predicting,
        always + before + targets_of_share + kept.outside + kept.blocks + kept.recomputed_block,
        always + state.gradients + targets_of_share + kept.recomputed_block,
    ]
    return StepMemory(state, activations, losses + targets_of_share, images, max(peaks))


def cut_pixels(workload: Workload, resolution: Resolution) -> float:
    """Numbers in the crops of an image as they are cut."""
    scale = 1.0 if workload.fixed_teacher is None else workload.fixed_teacher.scale
    return scale**2 * _pixels(workload, resolution)


def _finished_pixels(workload: Workload, resolution: Resolution) -> float:
    """Numbers in the crops of an image as networks get them: in two sizes, where the teacher's is another."""
    pixels, cut = _pixels(workload, resolution), cut_pixels(workload, resolution)
    return pixels if cut == pixels else pixels + cut


def _pixels(workload: Workload, resolution: Resolution) -> int:
    sides = [resolution.global_side] * NUM_GLOBAL_CROPS + [resolution.local_side] * workload.num_local_crops
    if workload.gram_teacher == "separate" and resolution.gram_side is not None:
        sides += [resolution.gram_side] * NUM_GLOBAL_CROPS
    return workload.backbone.num_channels * sum(side**2 for side in sides)
