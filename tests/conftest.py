"""Settings of every test process: offline, one thread, a fixed seed."""

import os

# Read when transformers is imported, so set before anything of ours is. DINOV3_HF_TEST_HUB=1 lets `hub` tests through.
os.environ.setdefault("HF_HUB_OFFLINE", "0" if os.environ.get("DINOV3_HF_TEST_HUB") else "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the programs that tests start

import pytest
import torch

from tests.forks import Forks

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def forks(tmp_path_factory):
    """Starts programs without a wait for their imports."""
    forks = Forks(tmp_path_factory.mktemp("forks"))
    yield forks
    forks.close()
