"""Several gloo processes on this machine, for what is computed over ranks."""

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# The loopback device: without it gloo looks up the host name, which may not resolve.
LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
# A server that has the package already forks the processes, so that only the first call waits for imports.
multiprocessing.set_forkserver_preload(["dinov3_hf.distributed.reductions"])


def run_in_processes(
    function: Callable[..., dict[str, Tensor]], world_size: int, *args: Any
) -> list[dict[str, Tensor]]:
    """Calls `function(*args)` in `world_size` processes that form a process group.

    Args:
        function: importable by name (defined at the top of a module); it asks `torch.distributed` for its rank.
        world_size: number of processes.
        args: arguments, the same in every process.

    Returns:
        What each process returned, in the order of the ranks.

    Raises:
        RuntimeError: a process failed; the message is the last line of its traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            torch.multiprocessing.start_processes(
                _process, (world_size, folder, function, args), nprocs=world_size, start_method="forkserver"
            )
        except torch.multiprocessing.ProcessRaisedException as error:
            reason = str(error).strip().splitlines()[-1]
            raise RuntimeError(f"rank {error.error_index}: {reason}") from error
        return [torch.load(Path(folder) / f"rank{rank}.pt", weights_only=True) for rank in range(world_size)]


def _process(rank: int, world_size: int, folder: str, function: Callable[..., dict[str, Tensor]], args: Any) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    try:
        torch.save(function(*args), Path(folder) / f"rank{rank}.pt")
    finally:
        dist.destroy_process_group()
