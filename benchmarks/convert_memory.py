"""Memory that a conversion takes: native -> Hub folder -> native, at the real size of a model with random weights.

    python benchmarks/convert_memory.py [vit7b16] [--dtype bfloat16] [--folder FOLDER]

Prints, for each way, the largest anonymous memory of the process, sampled every 50 ms (pages mapped from files are the
system's to take back, and do not count), and checks that the last file has the bits of the first. Needs twice the
model's size on disk, which it frees at the end.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from harness import append_results

from dinov3_hf.convert.checkpoint import Checkpoint, read_checkpoint
from dinov3_hf.convert.formats import format_of
from dinov3_hf.convert.lazy_tensor import LazyTensor, same_bits
from dinov3_hf.convert.random_weights import random_checkpoint
from dinov3_hf.convert.torch_file import read_torch_file
from dinov3_hf.convert.writing import write_checkpoint

SECONDS_BETWEEN_SAMPLES = 0.05
ANONYMOUS = re.compile(r"^Rss(?:Anon|Shmem):\s+(\d+) kB", re.MULTILINE)


def in_dtype(checkpoint: Checkpoint, dtype: torch.dtype) -> Checkpoint:
    """The same checkpoint, rounded to `dtype`."""
    tensors = {
        name: LazyTensor(tensor.shape, dtype, lambda tensor=tensor: tensor.read().to(dtype))
        for name, tensor in checkpoint.tensors.items()
    }
    return replace(checkpoint, tensors=tensors)


def convert(source: Path, target: Path, to: str) -> tuple[float, int]:
    """Seconds and the largest anonymous memory, in bytes, of `dinov3-hf convert`."""
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen([sys.executable, "-m", "dinov3_hf", "convert", source, target, "--to", to])
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        peak = max(peak, 1024 * sum(int(kilobytes) for kilobytes in ANONYMOUS.findall(status.read_text())))
        time.sleep(SECONDS_BETWEEN_SAMPLES)
    if process.returncode != 0:
        raise SystemExit(f"the conversion to {to} failed")
    return time.perf_counter() - start, peak


def check_equal(checkpoint: Checkpoint, native: Path) -> int:
    """Number of tensors of a native file, all of which have the bits of the checkpoint that it was written from."""
    file_format = format_of("native", checkpoint.config)
    expected = file_format.from_hf(checkpoint.tensors | checkpoint.extras, checkpoint.config).tensors
    found = read_torch_file(native)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        if tensor is None or not same_bits(tensor.read(), expected[name].read()):
            raise SystemExit(f"{name} has come back with other bits")
    return len(expected)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", nargs="?", default="vit7b16")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--folder", type=Path, help="where to write; the system's temporary folder by default")
    args = parser.parse_args()

    work = Path(tempfile.mkdtemp(prefix="convert-", dir=args.folder))
    try:
        native, hub, back = work / "native.pth", work / "hub", work / "back.pth"
        checkpoint = in_dtype(random_checkpoint(args.preset), torch.__dict__[args.dtype])
        write_checkpoint(checkpoint, native, "native")
        size = native.stat().st_size
        rows = []
        for source, target, to in ((native, hub, "hf"), (hub, back, "native")):
            seconds, peak = convert(source, target, to)
            way = f"{read_checkpoint(source).format} -> {to}"
            rows.append([args.preset, args.dtype, way, f"{size / 1e9:.1f}", f"{seconds:.0f}", f"{peak / 1e9:.2f}"])
            native.unlink(missing_ok=True)
        num_equal = check_equal(checkpoint, back)
    finally:
        shutil.rmtree(work)
    append_results(
        "Memory of a conversion",
        ["model", "dtype", "way", "file, GB", "seconds", "peak of anonymous memory, GB"],
        rows,
        ["transformers", "safetensors"],
        notes=f"All {num_equal} tensors of the native file came back with the same bits.",
    )


if __name__ == "__main__":
    main()
