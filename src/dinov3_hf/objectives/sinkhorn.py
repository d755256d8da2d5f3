"""Sinkhorn-Knopp: teacher logits to balanced soft assignments.

Legend: R rows of this process (CLS tokens of both global crops, or masked patches), N rows of all processes,
K prototypes.
"""

import torch
from torch import Tensor

from dinov3_hf.distributed.reductions import all_reduce_max, all_reduce_sum


@torch.no_grad()
def sinkhorn_knopp(logits: Tensor, temperature: float | Tensor, num_iterations: int = 3) -> Tensor:
    r"""Soft assignments of all rows to prototypes that are used equally often.

    .. math::
        Q^0_{ik} = \exp(z_{ik} / T), \qquad
        P_{ik} = \frac{Q_{ik}}{\sum_{j=1}^{N} Q_{jk}}, \qquad
        Q_{ik} \leftarrow \frac{P_{ik}}{\sum_{l=1}^{K} P_{il}} \qquad \text{(`num_iterations` times)}

    SwAV (arXiv 2006.09882, section 3.1); it centres the DINO and iBOT targets of DINOv2 (arXiv 2304.07193, section 4)
    and DINOv3 (arXiv 2508.10104, section 3.2). The factors 1/K and 1/N of the marginals cancel and are left out. Rows
    are normalised last: every row sums to 1, every prototype only about to N/K. Without iterations it is the plain
    softmax of each row, which nothing keeps from giving every row the same prototype.

    However large the logits, nothing overflows or vanishes. The first iteration is taken on log Q; after it every
    prototype holds at least 1 / (N K) of some row, so that plain division is safe. The sums over rows run over all
    processes.

    Args:
        logits: (R, K), any floating dtype; R may differ between processes and may be 0. DINO passes the rows of both
            global crops together.
        temperature: T > 0, a number or a tensor of no dimensions.
        num_iterations: 0 or more; published: 3.

    Returns:
        (R, K) float32, in [0, 1], a new tensor without gradient.

    Raises:
        ValueError: `logits` has not two dimensions, or `num_iterations` is negative.
    """
    if logits.ndim != 2:
        raise ValueError(
            f"logits has shape {tuple(logits.shape)}; sinkhorn_knopp takes (rows, prototypes): "
            "flatten the other dimensions."
        )
    if num_iterations < 0:
        raise ValueError(f"num_iterations is {num_iterations}; use 3, or 0 for a plain softmax.")
    with torch.autocast(logits.device.type, enabled=False):
        log_q = logits.float() / temperature  # (R, K)
        if num_iterations > 0:
            log_q.sub_(_logsumexp_over_all_rows(log_q))
        q = log_q.softmax(dim=1)  # (R, K): the first iteration
        for _ in range(num_iterations - 1):
            q /= all_reduce_sum(q.sum(dim=0))
            q /= q.sum(dim=1, keepdim=True)
        return q


def _logsumexp_over_all_rows(log_q: Tensor) -> Tensor:
    """log sum_j exp(log_q_jk) over the rows j of all processes: (R, K) -> (K,)."""
    # amax refuses an empty dimension: a process may hold no masked patch.
    local_max = log_q.amax(dim=0) if len(log_q) else log_q.new_full((log_q.shape[1],), -torch.inf)
    maximum = all_reduce_max(local_max)  # (K,)
    return all_reduce_sum((log_q - maximum).exp_().sum(dim=0)).log_().add_(maximum)
