"""The conversion scripts, run as files by the command in their docstring."""

import re
import shlex

import pytest
import torch

from tests.convert.files import assert_same_bits, read_native, tiny_native
from tests.testing_utils import REPOSITORY, run_python

TO_HF = REPOSITORY / "conversion" / "convert_native_to_hf.py"
TO_NATIVE = REPOSITORY / "conversion" / "convert_hf_to_native.py"


def command_of(script):
    """The arguments of `python SCRIPT ...` in the docstring; the script by its full path."""
    program, name, *arguments = shlex.split(re.search(r"^    (python .+)$", script.read_text(), re.MULTILINE)[1])
    assert program == "python" and REPOSITORY / name == script
    return [str(script), *arguments]


def test_the_documented_commands_go_there_and_back(forks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    there, back = command_of(TO_HF), command_of(TO_NATIVE)
    assert there[2] == back[1]  # the second takes what the first makes
    native = tiny_native()
    torch.save(native, there[1])
    done = run_python(*there)
    assert done.returncode == 0, done.stderr
    assert "dropped 3 x blocks.*.attn.qkv.bias_mask" in done.stdout
    done = forks.run(*back, "--json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert '"format": "hf"' in done.stdout
    assert_same_bits(read_native(tmp_path / back[2]), native)


@pytest.mark.parametrize("script", [TO_HF, TO_NATIVE], ids=lambda script: script.stem)
def test_errors_are_one_line(forks, script, tmp_path):
    done = forks.run(script, "absent.pth", "new.pth", folder=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1].startswith("error: absent.pth does not exist; give a file or a folder")
    assert "Traceback" not in done.stderr
