"""Damaged files, 500 of them: each is converted, or refused in one line; nothing hangs, and no code is run.

Every case is drawn from its own number, so that one that fails can be run alone.
"""

import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dinov3_hf.cli.errors import one_line
from dinov3_hf.convert.checkpoint import read_checkpoint
from dinov3_hf.convert.writing import write_checkpoint
from tests.convert.files import CONVNEXT_CASES, converted, heads, native_weights, prefixed, tiny_native
from tests.convert.test_torch_file import Payload
from tests.models.dinov3_vit.tiny import tiny_model

SECONDS = 60  # for a case, which takes a tenth of a second on an idle machine
CASES = 500
PER_TEST = 20


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Sound files and folders of every kind, and two that carry code."""
    folder = tmp_path_factory.mktemp("sources")
    training = {"teacher": prefixed("backbone.", tiny_native()) | heads(), "iteration": 3}
    torch.save(tiny_native(), folder / "native.pth")
    torch.save(tiny_native(), folder / "before_archives.pth", _use_new_zipfile_serialization=False)
    torch.save(training, folder / "training.pth")
    torch.save(native_weights(CONVNEXT_CASES[0]), folder / "convnext.pth")
    save_file(tiny_native(), folder / "native.safetensors")
    converted(folder / "training.pth", folder / "hub", "hf")
    converted(folder / "training.pth", folder / "sharded", "hf", max_shard_size=20_000)
    converted(folder / "convnext.pth", folder / "convnext", "hf")
    tiny_model(norm_type="rmsnorm").save_pretrained(folder / "variant")
    converted(folder / "native.pth", folder / "timm", "timm")
    for name, new_format in (("code.pth", True), ("code_before_archives.pth", False)):
        content = {**tiny_native(), "payload": Payload(folder / "trace")}
        torch.save(content, folder / name, _use_new_zipfile_serialization=new_format)
    return folder


@pytest.mark.parametrize("first", [
    *range(0, 60, PER_TEST),
    *(pytest.param(first, marks=pytest.mark.slow) for first in range(60, CASES, PER_TEST)),
])  # fmt: skip
def test_damaged_files(first, sources, tmp_path):
    names = sorted(path.name for path in sources.iterdir())
    for number in range(first, first + PER_TEST):
        draw = random.Random(number)
        damaged = tmp_path / f"{number}"
        damaged.mkdir()
        source = copy_damaged(sources / names[number % len(names)], damaged, draw)
        target = damaged / ("new.pth" if draw.random() < 0.5 else "new")
        with time_limit(SECONDS, f"case {number}, {source.name}"):
            try:
                write_checkpoint(read_checkpoint(source), target, "native" if target.suffix else "hf")
            except Exception as error:
                assert isinstance(error, (ValueError, OSError)), f"case {number}, {source.name}: {error!r}"
                line = one_line(error)
                assert line.startswith(str(source)) and "\n" not in line, f"case {number}: {line}"
                assert "--debug" not in line, f"case {number}: {line}"
                assert not target.exists()
        assert not list(damaged.rglob("*.converting")), number
        assert not (sources / "trace").exists(), f"case {number} ran code"


def copy_damaged(source: Path, folder: Path, draw: random.Random) -> Path:
    """A copy with one damaged file."""
    files = [source] if source.is_file() else [path for path in sorted(source.rglob("*")) if path.suffix != ".md"]
    victim = draw.choice(files)
    for file in files:
        target = folder / file.relative_to(source.parent)
        target.parent.mkdir(exist_ok=True)
        content = file.read_bytes()
        target.write_bytes(damage(content, draw) if file == victim else content)
    return folder / source.name


def damage(content: bytes, draw: random.Random) -> bytes:
    changed = bytearray(content)
    kind = draw.choice(["truncate", "flip", "flip at the start", "flip at the end", "zero", "swap", "insert"])
    if kind == "truncate":
        return content[: draw.randrange(len(content))]
    low = max(len(content) - 1000, 0) if kind == "flip at the end" else 0
    high = min(len(content), 1000) if kind == "flip at the start" else len(content)
    if kind.startswith("flip"):
        for _ in range(draw.choice([1, 3, 20])):
            changed[draw.randrange(low, high)] ^= 1 << draw.randrange(8)
        return bytes(changed)
    start = draw.randrange(len(content))
    length = draw.randrange(1, 200)
    if kind == "zero":
        changed[start : start + length] = bytes(len(changed[start : start + length]))
    elif kind == "swap":
        other = draw.randrange(len(content))
        changed[start : start + length] = content[other : other + len(changed[start : start + length])]
    else:
        changed[start:start] = draw.randbytes(length)
    return bytes(changed)


@contextmanager
def time_limit(seconds: int, what: str) -> Iterator[None]:
    def stop(number, frame):
        raise AssertionError(f"{what} takes more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
