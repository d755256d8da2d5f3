"""How evenly prototypes are used, the first place where a collapse shows."""

import math

import torch
from torch import Tensor

from dinov3_hf.distributed.reductions import all_reduce_sum


@torch.no_grad()
def prototype_entropy(logits: Tensor) -> Tensor:
    """
    Normalised entropy of the prototypes that win, over the rows of all ranks.

        H = - sum_k p_k log p_k / log min(R, K),   p_k = share of the R rows whose largest logit is k

    Args:
        logits: (R, K) any float dtype; R may differ between ranks and may be 0.

    Returns:
        () float32 in [0, 1]: 1 when the winners are spread evenly, 0 when every row has the same one (a collapsed
        teacher). 1 also when there are fewer than two rows, where nothing can be said.
    """
    num_rows, num_prototypes = logits.shape
    wins = torch.zeros(num_prototypes, dtype=torch.float32, device=logits.device)
    wins.index_add_(0, logits.argmax(dim=-1), torch.ones(num_rows, device=logits.device))
    wins = all_reduce_sum(wins)  # (K,)
    total = wins.sum()  # ()
    share = wins / total.clamp(min=1)
    entropy = torch.special.entr(share).sum()
    most = total.clamp(min=2, max=num_prototypes).log() if num_prototypes > 1 else torch.tensor(math.inf)
    return torch.where(total < 2, torch.ones_like(entropy), entropy / most)
