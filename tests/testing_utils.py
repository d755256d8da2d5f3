"""What tests share: marks for what a machine may lack, and running our programs as a user does."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parent.parent
FIXTURES = Path(__file__).parent / "fixtures"
# A folder with real images, for the tests that want some.
TEST_DATA = Path(os.environ["DINOV3_HF_TEST_DATA"]) if "DINOV3_HF_TEST_DATA" in os.environ else None

require_test_data = pytest.mark.skipif(TEST_DATA is None, reason="DINOV3_HF_TEST_DATA names no folder of real images")


def require_gpu(test):
    missing = not torch.cuda.is_available()
    return pytest.mark.gpu(pytest.mark.skipif(missing, reason="needs a CUDA device")(test))


def require_multi_gpu(test):
    missing = torch.cuda.device_count() < 2
    return pytest.mark.multi_gpu(pytest.mark.skipif(missing, reason="needs two CUDA devices")(test))


def require_hub(test):
    offline = "DINOV3_HF_TEST_HUB" not in os.environ
    return pytest.mark.hub(pytest.mark.skipif(offline, reason="needs the Hub; set DINOV3_HF_TEST_HUB=1")(test))


def require_package(name: str):
    """Skip where the package that is imported as `name` is not installed."""
    return pytest.mark.skipif(find_spec(name) is None, reason=f"needs {name}")


def run_python(*arguments: str | Path, timeout: float = 120, **env: str) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS` in a process of its own, with `env` added to the environment."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=os.environ | {"COLUMNS": "160"} | env,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def run_cli(*arguments: str | Path, timeout: float = 120, **env: str) -> subprocess.CompletedProcess[str]:
    """Run `dinov3-hf ARGUMENTS` in a process of its own."""
    return run_python("-m", "dinov3_hf", *arguments, timeout=timeout, **env)
