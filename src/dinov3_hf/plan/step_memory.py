"""Bytes on a GPU in the course of a training step."""

from dataclasses import dataclass

from dinov3_hf.plan.engines import Engine, State
from dinov3_hf.plan.workload import NUM_GLOBAL_CROPS, Head, Resolution, Workload


@dataclass(frozen=True)
class StepMemory:
    """
    Bytes on one rank. The parts are not all there at the same time: gradients grow while activations go.

    Args:
        state: parameters, gradients, optimizer, teachers, buffers of communication.
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


def step_memory(workload: Workload, resolution: Resolution, engine: Engine, num_images: int, share: int) -> StepMemory:
    """
    Args:
        num_images: of one forward pass on a rank.
        share: images that a rank has of the global batch; the teacher's targets for all of them are made first.
    """
    b = 2 if workload.bf16 else 4
    backbone, width = workload.backbone, workload.backbone.width
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
    K = workload.dino_head.num_prototypes
    K_masked = 0 if workload.ibot_head is None else workload.ibot_head.num_prototypes
    # Logarithms of all predictions, and the sums of the targets that they are multiplied with.
    losses = _kept_by_head(workload.dino_head, width, b, rows) + 4 * K * (rows + 2 * num_images)
    if workload.ibot_head is not None:
        losses += _kept_by_head(workload.ibot_head, width, b, masked) + 4 * K_masked * masked
    if workload.gram_teacher is not None:
        patches = backbone.patches(resolution.global_side)
        losses += 4 * global_rows * patches * (3 * width + patches)  # both sides' features, and their difference
    targets_of_share = 4 * (NUM_GLOBAL_CROPS * share * K + workload.masked_patches(resolution, share) * K_masked)
    # While a term is computed: logits, the same divided by the temperature.
    predicting = (b + 4) * max(masked * K_masked, (rows - global_rows) * K)
    if workload.gram_teacher == "separate":
        predicting = max(
            predicting, backbone.passing_bytes(global_rows, resolution.gram_side or resolution.global_side, b)
        )
    tokens = sum(group.number * backbone.tokens(group.side) for group in crops)
    predicting += 4 * tokens * width  # the normalised tokens

    pixels = _pixels(workload, resolution)
    images = 4 * num_images * pixels + (share * pixels if accumulates else 0)  # bytes until they are finished

    fixed = state.parameters + state.optimizer + state.teacher + state.gram_teacher + state.buffers + images
    before = state.gradients if accumulates else 0.0  # of earlier forward passes
    # Logits of all images, as they come and put together, their logarithms, and what these are compared with.
    parts = 2 if accumulates else 1
    balancing = targets_of_share / 4 * (parts * b + 8)
    peaks = [
        fixed + backbone.passing_bytes(global_rows, resolution.global_side, b) + balancing,
        fixed + before + targets_of_share + activations + losses + predicting,
        fixed + before + targets_of_share + kept.outside + kept.blocks + kept.recomputed_block,
        fixed + state.gradients + targets_of_share + kept.recomputed_block,
    ]
    return StepMemory(state, activations, losses + targets_of_share, images, max(peaks))


def _kept_by_head(head: Head, width: int, b: int, rows: float) -> float:
    """Inputs of its layers and of the activations between, the bottleneck before and after normalisation."""
    hidden = head.widths(width)[1:-1]
    return b * rows * (width + 2 * sum(hidden) + 2 * head.bottleneck_dim)


def _pixels(workload: Workload, resolution: Resolution) -> int:
    """Numbers in the crops of an image."""
    sides = [resolution.global_side] * NUM_GLOBAL_CROPS + [resolution.local_side] * workload.num_local_crops
    if workload.gram_teacher == "separate" and resolution.gram_side is not None:
        sides += [resolution.gram_side] * NUM_GLOBAL_CROPS
    return workload.backbone.num_channels * sum(side**2 for side in sides)
