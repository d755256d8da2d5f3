"""Memory that loading a big model and running it on one image takes on a CPU, with random weights at real size.

    python benchmarks/load_memory.py [vith16plus vit7b16:2 ...] [--ways whole disk ...] [--folder FOLDER]

The files are in bfloat16; `vit7b16:2` is the first two blocks of the 7B. The ways: `whole`, as the file is; `float32`,
converted when loaded; `disk`, at most --resident of it in memory and the rest fetched when its turn comes; `int8` and
`float8`, weights quantised by torchao where it is installed. Each runs in a process of its own, whose memory is
sampled every 20 ms: anonymous memory is what the process holds itself, resident memory also counts pages mapped from
files, which the system can take back. What the same process holds after its imports is given beside it.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from harness import append_results
from torch import Tensor
from transformers import TorchAoConfig

from dinov3_hf import DINOv3ViTConfig, DINOv3ViTModel
from dinov3_hf.convert.lazy_tensor import LazyTensor
from dinov3_hf.convert.safetensors_file import write_shards

SECONDS_BETWEEN_SAMPLES = 0.02
SHARD_BYTES = 2 * 10**9
WAYS = ("whole", "float32", "disk", "int8", "float8")


def write_random_model(size: str, folder: Path) -> int:
    """Write a bfloat16 model folder, one tensor in memory at a time; returns the bytes of its tensors."""
    preset, _, depth = size.partition(":")
    overrides = {"num_hidden_layers": int(depth)} if depth else {}
    # The local CLS norm acts in training only.
    config = DINOv3ViTConfig.from_preset(preset, untie_global_and_local_cls_norm=False, **overrides)
    config.dtype = "bfloat16"
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in DINOv3ViTModel(config).state_dict().items()}

    def random(name: str, shape: tuple[int, ...]) -> LazyTensor:
        def draw() -> Tensor:
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            return torch.empty(shape, dtype=torch.bfloat16).uniform_(-0.05, 0.05, generator=generator)

        return LazyTensor(shape, torch.bfloat16, draw)

    tensors = {name: random(name, shape) for name, shape in shapes.items()}
    config.save_pretrained(folder)
    write_shards(tensors, folder, SHARD_BYTES)
    return sum(tensor.num_bytes for tensor in tensors.values())


def load(folder: Path, way: str, resident: int) -> Any:
    if way == "whole":
        return DINOv3ViTModel.from_pretrained(folder)
    if way == "float32":
        return DINOv3ViTModel.from_pretrained(folder, dtype=torch.float32)
    if way == "disk":
        return DINOv3ViTModel.from_pretrained(
            folder, device_map="auto", max_memory={"cpu": resident}, offload_folder=folder / "offload"
        )
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    quantization = {"int8": Int8WeightOnlyConfig, "float8": Float8WeightOnlyConfig}[way]()
    return DINOv3ViTModel.from_pretrained(folder, device_map="cpu", quantization_config=TorchAoConfig(quantization))


def run_case(folder: Path, way: str, resident: int) -> None:
    """The process that is measured: prints one line of JSON after its imports, after loading and after the forward."""
    print(json.dumps({"imported": memory_of("self")}), flush=True)
    start = time.perf_counter()
    model = load(folder, way, resident)
    loaded = time.perf_counter()
    print(json.dumps({"load": loaded - start, "memory": memory_of("self")}), flush=True)
    pixels = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        output = model(pixels).pooler_output.float()
    torch.save(output, folder / f"{way}.pt")
    print(json.dumps({"forward": time.perf_counter() - loaded, "finite": bool(output.isfinite().all())}), flush=True)


def memory_of(process: int | str) -> dict[str, int]:
    """Bytes of anonymous and of resident memory of a process, now."""
    status = Path(f"/proc/{process}/status").read_text()
    kilobytes = {name: int(value) for name, value in re.findall(r"^(Rss\w+|VmRSS):\s+(\d+) kB", status, re.MULTILINE)}
    if not kilobytes:  # it has ended
        return {"anonymous": 0, "resident": 0}
    return {
        "anonymous": 1024 * (kilobytes["RssAnon"] + kilobytes["RssShmem"]),
        "resident": 1024 * kilobytes["VmRSS"],
    }


def measure(folder: Path, way: str, resident: int) -> dict[str, Any]:
    """Run one case; what it printed, and its peaks."""
    command = [sys.executable, __file__, "--case", way, "--folder", folder, "--resident", str(resident)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peak = {"anonymous": 0, "resident": 0}
    while process.poll() is None:
        now = memory_of(process.pid)
        peak = {kind: max(peak[kind], now[kind]) for kind in peak}
        time.sleep(SECONDS_BETWEEN_SAMPLES)
    if process.returncode != 0 or process.stdout is None:
        raise SystemExit(f"{way} of {folder.name} failed")
    found: dict[str, Any] = {"peak": peak}
    for line in process.stdout:
        found |= json.loads(line)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", default=["vith16plus", "vit7b16:2"])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--resident", type=float, help="bytes of weights that stay in memory; a quarter by default")
    parser.add_argument("--folder", type=Path, help="where to write; the system's temporary folder by default")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        run_case(args.folder, args.case, int(args.resident))
        return

    rows, differences = [], []
    for size in args.sizes:
        folder = Path(tempfile.mkdtemp(prefix="load-", dir=args.folder))
        try:
            num_bytes = write_random_model(size, folder)
            for way in args.ways:
                if way in ("int8", "float8") and find_spec("torchao") is None:
                    continue
                found = measure(folder, way, int(args.resident or num_bytes / 4))
                gigabytes = [found["imported"]["anonymous"], found["memory"]["anonymous"], *found["peak"].values()]
                rows.append(
                    [size, way, f"{num_bytes / 1e9:.2f}", f"{found['load']:.1f}", f"{found['forward']:.1f}"]
                    + [f"{value / 1e9:.2f}" for value in gigabytes]
                )
                print(*rows[-1], flush=True)
            outputs = {path.stem: torch.load(path) for path in folder.glob("*.pt")}
            if "whole" in outputs:
                scale = outputs["whole"].norm()
                differences += [
                    f"{size} {way} {(output - outputs['whole']).norm() / scale:.1e}"
                    for way, output in sorted(outputs.items())
                    if way != "whole"
                ]
        finally:
            shutil.rmtree(folder)
    append_results(
        "Memory of a model loaded from bfloat16, one image of 224 pixels",
        ["model", "way", "weights, GB", "load, s", "forward, s"]
        + [f"{kind}, GB" for kind in ("imports", "loaded", "peak anonymous", "peak resident")],
        rows,
        ["transformers", "accelerate", "safetensors"],
        notes=f"Relative difference of the pooled output from `whole`: {', '.join(differences)}."
        if differences
        else "",
    )


if __name__ == "__main__":
    main()
