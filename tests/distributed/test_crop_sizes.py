"""Two real processes cut the same sizes in every step, and together the global batch of one process."""

import pytest
import torch

from dinov3_hf.distributed.reductions import rank, world_size
from tests.data.test_crop_sizes import BATCH, SMALL, STEPS, load
from tests.reference.processes import run_in_processes

NAMES = ("global_crops", "local_crops", "gram_crops", "mask")


def batches_of_this_rank() -> dict[str, torch.Tensor]:
    batches = load(size=BATCH // world_size(), num_ranks=world_size(), rank=rank())
    return {f"{step}/{name}": batch[name] for step, batch in enumerate(batches) for name in NAMES}


@pytest.mark.invariant
def test_ranks_see_the_same_sizes():
    first, second = run_in_processes(batches_of_this_rank, 2)
    whole = load()
    assert len({SMALL.index_at(step) for step in range(STEPS)}) == len(SMALL.sizes)
    for step, batch in enumerate(whole):
        for name in NAMES:
            parts = [half[f"{step}/{name}"].unflatten(0, (-1, BATCH // 2)) for half in (first, second)]
            torch.testing.assert_close(torch.cat(parts, dim=1).flatten(0, 1), batch[name], rtol=0, atol=0)
