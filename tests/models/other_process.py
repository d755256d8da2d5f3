"""Running a script where this package looks as if it were not installed, on the newest or the oldest transformers."""

from pathlib import Path
from subprocess import CompletedProcess

import pytest

from tests.testing_utils import REPOSITORY, run_python

WITHOUT_US = """
import runpy, sys
from importlib.abc import MetaPathFinder

class Blocker(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "dinov3_hf":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
FLOOR = REPOSITORY / "build" / "floor"
require_floor = pytest.mark.skipif(
    not (FLOOR / "installed").exists(), reason="needs the oldest transformers; make build/floor/installed"
)
# Parameters of a fixture or test that runs another process; `make test-floor` has the oldest in both processes.
VERSIONS = ["installed", pytest.param("oldest", marks=[require_floor, pytest.mark.slow])]


def run_without_us(version: str, script: Path, *arguments: str | Path, **env: str) -> CompletedProcess[str]:
    """Run `script ARGUMENTS` with `version` of transformers, "installed" or "oldest", and without this package."""
    environment = {"PYTHONPATH": str(FLOOR)} if version == "oldest" else {}
    done = run_python("-c", WITHOUT_US, script, *arguments, **environment, **env)
    assert done.returncode == 0, done.stderr[-5000:]
    return done
