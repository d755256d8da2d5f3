"""`dinov3-hf info`: what is installed and what this machine can do.

Answers without torch, whose import alone takes longer: versions come from the installed packages' metadata, devices
from the operating system and the NVIDIA driver.
"""

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from dinov3_hf.models.dinov3_vit.presets import PRESETS
from dinov3_hf.recipes.pages import recipe_summaries

# Package -> the extra that brings it ("" = every installation has it).
PACKAGES = {
    "dinov3-hf": "",
    "torch": "",
    "torchvision": "",
    "transformers": "",
    "safetensors": "",
    "accelerate": "train",
    "datasets": "train",
    "scikit-learn": "train",
    "tensorboard": "train",
    "deepspeed": "deepspeed",
    "peft": "peft",
    "timm": "dev",
}

# What `dinov3_hf.auto` registers, which cannot be asked without torch: Auto class -> model type -> our class.
# A test compares the two.
REGISTERED = {
    "AutoConfig": {
        "dinov3_vit_native": "DINOv3ViTNativeConfig",
        "dinov3_pretraining": "DINOv3PreTrainingConfig",
    },
    "AutoModel": {"dinov3_vit_native": "DINOv3ViTNativeModel"},
    "AutoBackbone": {"dinov3_vit_native": "DINOv3ViTNativeBackbone"},
    "AutoModelForPreTraining": {"dinov3_pretraining": "DINOv3ForPreTraining"},
}


def register(app: typer.Typer) -> None:
    app.command("info")(info)


def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")] = False,
) -> None:
    """Versions, devices and their precisions, registered classes, presets and recipes."""
    facts = {
        "versions": versions(),
        "devices": [cpu(), *nvidia_gpus(), *apple_gpus()],
        "registered": REGISTERED,
        "presets": presets(),
        "recipes": recipe_summaries(),
    }
    if as_json:
        print(json.dumps(facts, indent=2))
    else:
        show(facts)


def versions() -> dict[str, str | None]:
    """Version of Python and of each package; None where one is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def cpu() -> dict[str, Any]:
    """The processor with the cores this process may use, the machine's memory, and the precisions that pay on it."""
    name, flags = platform.processor() or platform.machine(), set()
    if sys.platform == "linux":
        cores = len(os.sched_getaffinity(0))
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() == "flags":
                flags = set(value.split())
                break
    else:
        cores = os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    instructions = sorted(flags & {"avx2", "avx512f", "avx512_bf16", "amx_bf16"})
    # Without these instructions bfloat16 is emulated and slower than float32.
    precisions = ["float32", "bfloat16"] if {"avx512_bf16", "amx_bf16"} & flags else ["float32"]
    return {
        "device": "cpu",
        "name": name,
        "cores": cores,
        "memory_gib": round(memory / 2**30, 1),
        "instructions": instructions,
        "precisions": precisions,
    }


def nvidia_gpus() -> list[dict[str, Any]]:
    """The GPUs that the NVIDIA driver reports, and whether the installed torch can use them."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,compute_cap,driver_version", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=5, check=True).stdout
    except (OSError, subprocess.SubprocessError):  # no driver, or one that does not answer
        return []
    usable = torch_has_cuda()
    gpus = []
    for number, line in enumerate(answer.strip().splitlines()):
        name, memory_mib, capability, driver = (value.strip() for value in line.split(","))
        gpus.append(
            {
                "device": f"cuda:{number}",
                "name": name,
                "memory_gib": round(float(memory_mib) / 1024, 1),
                "compute_capability": capability,
                "driver": driver,
                "usable_by_torch": usable,
                # Tensor cores for bfloat16 came with compute capability 8.0.
                "precisions": ["float32", "bfloat16", "float16"] if float(capability) >= 8 else ["float32", "float16"],
            }
        )
    return gpus


def torch_has_cuda() -> bool:
    """Whether the installed torch was built with CUDA, seen from its libraries, without importing it."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    return (Path(spec.origin).parent / "lib" / "libtorch_cuda.so").exists()


def apple_gpus() -> list[dict[str, Any]]:
    """The GPU of an Apple silicon Mac."""
    if (sys.platform, platform.machine()) != ("darwin", "arm64"):
        return []
    return [{"device": "mps", "name": "Apple GPU", "precisions": ["float32", "bfloat16", "float16"]}]


def presets() -> dict[str, dict[str, Any]]:
    """Fields of each preset, with the number of parameters they make."""
    return {name: {"num_parameters": num_parameters(fields), **fields} for name, fields in PRESETS.items()}


def num_parameters(fields: dict[str, Any]) -> int:
    """Parameters of a ViT with 16-pixel patches of RGB images, by arithmetic; defaults where `fields` are silent."""
    D, F = fields["hidden_size"], fields["intermediate_size"]
    attention = 4 * D * D + D * (1 + fields.get("query_bias", True) + fields.get("value_bias", True))  # keys: no bias
    ffn = 3 * D * F + 2 * F + D if fields.get("use_gated_mlp", False) else 2 * D * F + F + D
    block = attention + ffn + 2 * 2 * D + 2 * D  # two norms, two LayerScales
    patch_embedding = 3 * 16 * 16 * D + D
    tokens = (1 + 1 + fields["num_register_tokens"]) * D  # CLS, mask, registers
    local_norm = 2 * D if fields.get("untie_global_and_local_cls_norm", False) else 0
    return patch_embedding + tokens + fields["num_hidden_layers"] * block + 2 * D + local_norm


def show(facts: dict[str, Any]) -> None:
    console = Console()

    table = _table("Versions")
    for package, found in facts["versions"].items():
        missing = f"[dim]not installed; pip install 'dinov3-hf\\[{PACKAGES.get(package)}]'[/dim]"
        table.add_row(package, found or missing)
    console.print(table)

    table = _table("Devices", "", "", "precisions")
    for device in facts["devices"]:
        details = [device["name"]]
        details += [f"{device['cores']} cores"] if "cores" in device else []
        details += [f"{device['memory_gib']} GiB"] if "memory_gib" in device else []
        details += device.get("instructions", [])
        details += [] if device.get("usable_by_torch", True) else ["[red]the installed torch has no CUDA[/red]"]
        table.add_row(device["device"], ", ".join(details), ", ".join(device["precisions"]))
    console.print(table)

    table = _table("Registered classes")
    for auto_class, entries in facts["registered"].items():
        for model_type, name in entries.items():
            table.add_row(auto_class, f"{name} [dim]({model_type})[/dim]")
    console.print(table)

    table = _table("Presets", "", "parameters", "width", "blocks", "heads", "FFN", right=(1, 2, 3, 4))
    for name, fields in facts["presets"].items():
        ffn = f"{fields['intermediate_size']}{' gated' if fields.get('use_gated_mlp') else ''}"
        counts = (str(fields[field]) for field in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
        table.add_row(name, f"{fields['num_parameters'] / 1e6:,.1f} M", *counts, ffn)
    console.print(table)

    table = _table("Recipes")
    for name, summary in facts["recipes"].items():
        table.add_row(name, summary)
    console.print(table)


def _table(title: str, *columns: str, right: tuple[int, ...] = ()) -> Table:
    """A borderless table under a title; without column names it has two columns."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=bool(columns))
    for position, column in enumerate(columns or ("", "")):
        table.add_column(column, justify="right" if position in right else "left", no_wrap=position == 0)
    return table
