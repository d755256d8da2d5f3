"""KoLeo: features of a batch spread out over the sphere.

Legend: B rows of this process, W processes, N = W B rows of the global batch, D features, k neighbours of a row.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from dinov3_hf.distributed.reductions import gather_rows, rank, world_size

EPS = 1e-8


def koleo_loss(features: Tensor, group_size: int | None = None, topk: int = 1) -> Tensor:
    r"""Kozachenko-Leonenko estimate of the negative entropy of normalised features, by nearest neighbours in groups.

    .. math::
        L_\mathrm{KoLeo} = -\frac{1}{B k} \sum_{i=1}^{B} \sum_{j \in \mathrm{NN}_k(i)}
            \log\big(\lVert \bar x_i - \bar x_j + \epsilon \rVert_2 + \epsilon\big),
        \qquad \bar x = x / \max(\lVert x \rVert_2, \epsilon), \qquad \epsilon = 10^{-8}

    NN_k(i) are the k other rows of i's group with the largest dot product (epsilon is added to every component of the
    difference). Gradients reach both ends of every pair, also the rows of other processes.

    Sablayrolles et al. (arXiv 1806.03198, section 3.1); L_DKoleo, the third term of L_Pre in DINOv3 (arXiv 2508.10104,
    equation 1).

    Groups are contiguous blocks of the global batch, of which process r holds the r-th part: the mean of the loss over
    the processes depends on the global batch and `group_size`, not on the number of processes. Groups that do not
    cross processes need no communication.

    Args:
        features: (B, D), any floating dtype, the same B in every process. One crop at a time: the two crops of an
            image are not to be pushed apart.
        group_size: rows of a group, a divisor of N; None means all N.
        topk: k, neighbours of a row, at least 1 and below the group size.

    Returns:
        () float32, the mean over the rows of this process.

    Raises:
        ValueError: `group_size` does not divide N, or a group has too few rows for `topk`.
    """
    num_rows = features.shape[0]
    global_rows = world_size() * num_rows
    group_size = global_rows if group_size is None else group_size
    if group_size < 1 or global_rows % group_size != 0:
        raise ValueError(
            f"KoLeo group_size {group_size} does not divide the global batch of {global_rows} rows; "
            "choose a divisor, or None for the whole batch."
        )
    if not 1 <= topk < group_size:
        raise ValueError(
            f"KoLeo topk {topk} must be at least 1 and below the rows of a group ({group_size}); "
            "enlarge group_size, or the batch."
        )

    with torch.autocast(features.device.type, enabled=False):
        rows = normalize(features.float(), dim=-1, eps=EPS)  # (B, D)
        if num_rows % group_size == 0:
            candidates, offset = rows, 0
        else:
            candidates, offset = gather_rows(rows), rank() * num_rows  # (N, D)
        neighbours = candidates[_nearest_in_group(rows, candidates, offset, group_size, topk)]  # (B, k, D)
        distance = torch.linalg.vector_norm(rows[:, None] - neighbours + EPS, dim=-1)  # (B, k)
        return -torch.log(distance + EPS).mean()


@torch.no_grad()
def _nearest_in_group(rows: Tensor, candidates: Tensor, offset: int, group_size: int, topk: int) -> Tensor:
    """Indices of the most similar other candidates of the same group: (B, D), (C, D) -> (B, k) int64."""
    candidate = torch.arange(len(candidates), device=rows.device)  # (C,)
    row = candidate[offset : offset + len(rows), None]  # (B, 1)
    allowed = (row // group_size == candidate // group_size) & (row != candidate)  # (B, C)
    similarity = (rows @ candidates.T).masked_fill_(~allowed, -torch.inf)  # (B, C)
    return similarity.topk(topk, dim=-1).indices
