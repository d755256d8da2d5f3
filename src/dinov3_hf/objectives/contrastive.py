"""Contrastive alignment: an image's embedding finds the embedding of its caption among all of the batch, and back.

Legend: W processes, B pairs of this process, N = W B pairs of the global batch, E features, R <= B rows of a chunk.
"""

from typing import Any

import torch
from torch import Tensor

from dinov3_hf.distributed.reductions import current_group, process_group, rows_of_each_process

CHUNK_SIZE = 4096


def contrastive_loss(
    image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor, chunk_size: int = CHUNK_SIZE
) -> Tensor:
    r"""Symmetric cross entropy of the similarities of images and texts, with the negatives of all processes.

    .. math::
        L = -\frac{1}{2B} \sum_{i=1}^{B} \Big(
            \log \frac{e^{s\, x_i \cdot y_i}}{\sum_{j=1}^{N} e^{s\, x_i \cdot y_j}} +
            \log \frac{e^{s\, x_i \cdot y_i}}{\sum_{j=1}^{N} e^{s\, x_j \cdot y_i}} \Big)

    with images x, texts y, and i over the pairs of this process.

    CLIP (arXiv 2103.00020, section 2.3); the loss of locked-image tuning (arXiv 2111.07991) and of dino.txt (arXiv
    2412.16334).

    The gradient of an embedding is that of the sum of all processes' losses. With gradients averaged over the
    processes afterwards, as data parallel training does, this is the gradient of the mean of their losses: that of
    the loss of the global batch in one process. The gradient of `logit_scale` is the share of the images of this
    process; the shares add up to the whole.

    Only blocks of similarities exist at a time, and the embeddings of one other process: the memory grows with B and
    not with N. What the backward pass needs of them is computed, and sent, again.

    Args:
        image_embeds: (B, E), any floating dtype, normalised by the caller; the same B in every process.
        text_embeds: (B, E), row i belongs to row i of `image_embeds`.
        logit_scale: (1,) or (), s, the inverse temperature; the same in every process.
        chunk_size: rows of a block of similarities; a matter of memory, not of the result.

    Returns:
        () float32, the mean over the pairs of this process. The gradient that arrives here in the backward pass has
        to be the same in every process.

    Raises:
        ValueError: images and texts are not pairs of rows of one width, or `chunk_size` is below 1.
    """
    if image_embeds.ndim != 2 or image_embeds.shape != text_embeds.shape or len(image_embeds) == 0:
        raise ValueError(
            f"image_embeds {tuple(image_embeds.shape)} and text_embeds {tuple(text_embeds.shape)} are not (pairs, "
            "features) of the same pairs; give one text for each image."
        )
    if chunk_size < 1:
        raise ValueError(f"chunk_size {chunk_size} is no number of rows; give 1 or more.")
    with torch.autocast(image_embeds.device.type, enabled=False):
        loss: Tensor = _ContrastiveLoss.apply(
            image_embeds.float(), text_embeds.float(), logit_scale.float(), chunk_size
        )
    return loss


class _ContrastiveLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, texts: Tensor, scale: Tensor, chunk_size: int) -> Tensor:
        image_sums = images.new_full((len(images),), -torch.inf)  # (B,) log of the denominators, so far
        text_sums = image_sums.clone()
        for others in rows_of_each_process(torch.cat((images, texts), dim=1)):  # (B, 2E)
            other_images, other_texts = others.chunk(2, dim=1)  # (B, E)
            for rows in _chunks(len(images), chunk_size):
                to_texts, to_images = images[rows] @ other_texts.T * scale, texts[rows] @ other_images.T * scale
                image_sums[rows] = torch.logaddexp(image_sums[rows], to_texts.logsumexp(dim=1))
                text_sums[rows] = torch.logaddexp(text_sums[rows], to_images.logsumexp(dim=1))
        ctx.save_for_backward(images, texts, scale, image_sums, text_sums)
        ctx.chunk_size = chunk_size
        ctx.group = current_group()  # gradients of GPUs are computed in a thread of their own
        positives = (images * texts).sum(dim=1) * scale  # (B,)
        return (0.5 * (image_sums + text_sums) - positives).mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        images, texts, scale, image_sums, text_sums = ctx.saved_tensors
        num_pairs, width = images.shape
        # d loss / d logit is (p(text | image) + p(image | text) - 2 [they are a pair]) / 2B, for each block anew.
        image_grads, text_grads = -2 * texts, -2 * images  # (B, E), what the pairs give
        scale_grad = -2 * (images * texts).sum()
        packed = torch.cat((images, texts, image_sums[:, None], text_sums[:, None]), dim=1)  # (B, 2E + 2)
        with process_group(ctx.group):
            for others in rows_of_each_process(packed):
                other_images, other_texts = others[:, :width], others[:, width : 2 * width]
                other_image_sums, other_text_sums = others[:, 2 * width], others[:, 2 * width + 1]
                for rows in _chunks(num_pairs, ctx.chunk_size):
                    similarities = images[rows] @ other_texts.T  # (R, B)
                    probabilities = _probabilities(similarities * scale, image_sums[rows], other_text_sums)
                    image_grads[rows] += probabilities @ other_texts
                    scale_grad += (probabilities * similarities).sum()
                    logits = texts[rows] @ other_images.T * scale
                    text_grads[rows] += _probabilities(logits, text_sums[rows], other_image_sums) @ other_images
        factor = grad / (2 * num_pairs)
        return image_grads * scale * factor, text_grads * scale * factor, (scale_grad * factor).view_as(scale), None


def _probabilities(logits: Tensor, row_sums: Tensor, column_sums: Tensor) -> Tensor:
    """Softmax over the row plus softmax over the column, of a block (R, B) of all similarities."""
    return (logits - row_sums[:, None]).exp_() + (logits - column_sums).exp_()


def _chunks(num_rows: int, chunk_size: int) -> list[slice]:
    return [slice(start, start + chunk_size) for start in range(0, num_rows, chunk_size)]
