"""`dinov3-hf info`: what is installed and what this machine can do.

Answers without torch, whose import alone takes longer: versions come from the installed packages' metadata, devices
from the operating system and the NVIDIA driver.
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from dinov3_hf.plan.model_costs import BYTES_OF_A_PARAMETER, IMAGE_SIZES, ModelCost, preset_costs
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
    "matplotlib": "viz",
    "tifffile": "tiff",
    "timm": "dev",
}

# What `dinov3_hf.auto` registers, which cannot be asked without torch: Auto class -> model type -> our class.
# A test compares the two.
REGISTERED = {
    "AutoConfig": {
        "dinov3_vit_native": "DINOv3ViTNativeConfig",
        "dinov3_convnext_native": "DINOv3ConvNextNativeConfig",
        "dinov3_pretraining": "DINOv3PreTrainingConfig",
        "dinov3_distillation": "DINOv3DistillationConfig",
        "dinotxt": "DinoTxtConfig",
        "dinotxt_text": "DinoTxtTextConfig",
        "dinotxt_vision": "DinoTxtVisionConfig",
    },
    "AutoModel": {
        "dinov3_vit_native": "DINOv3ViTNativeModel",
        "dinov3_convnext_native": "DINOv3ConvNextNativeModel",
        "dinotxt": "DinoTxtModel",
        "dinotxt_text": "DinoTxtTextModel",
        "dinotxt_vision": "DinoTxtVisionModel",
    },
    "AutoBackbone": {
        "dinov3_vit_native": "DINOv3ViTNativeBackbone",
        "dinov3_convnext_native": "DINOv3ConvNextNativeBackbone",
    },
    "AutoModelForPreTraining": {
        "dinov3_pretraining": "DINOv3ForPreTraining",
        "dinov3_distillation": "DINOv3ForDistillation",
    },
    "AutoModelForZeroShotImageClassification": {"dinotxt": "DinoTxtModel"},
}


def register(app: typer.Typer) -> None:
    app.command("info")(info)


def info(
    only_models: Annotated[bool, typer.Option("--models", help="Only the sizes of model that have a name.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")] = False,
) -> None:
    """Versions, devices and their precisions, registered classes, models and recipes."""
    facts = {"models": models()} if only_models else all_facts()
    if as_json:
        print(json.dumps(facts, indent=2))
    else:
        show(facts)


def all_facts() -> dict[str, Any]:
    return {
        "versions": versions(),
        "devices": [cpu(), *nvidia_gpus(), *apple_gpus()],
        "registered": REGISTERED,
        "models": models(),
        "recipes": recipe_summaries(),
    }


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


def models() -> dict[str, dict[str, Any]]:
    """Preset -> its size."""
    return {name: size_of(cost) for name, cost in preset_costs().items()}


def size_of(cost: ModelCost) -> dict[str, Any]:
    return {
        "model_type": cost.family,
        "num_parameters": cost.num_parameters,
        "flop": dict(cost.flop),
        "weights_bytes": {dtype: cost.memory(dtype) for dtype in BYTES_OF_A_PARAMETER},
    }


def show(facts: dict[str, Any]) -> None:
    console = Console()
    for name, values in facts.items():
        console.print(TABLES[name](values))


def versions_table(versions: dict[str, str | None]) -> Table:
    table = _table("Versions")
    for package, found in versions.items():
        missing = f"[dim]not installed; pip install 'dinov3-hf\\[{PACKAGES.get(package)}]'[/dim]"
        table.add_row(package, found or missing)
    return table


def devices_table(devices: list[dict[str, Any]]) -> Table:
    table = _table("Devices", "", "", "precisions")
    for device in devices:
        details = [device["name"]]
        details += [f"{device['cores']} cores"] if "cores" in device else []
        details += [f"{device['memory_gib']} GiB"] if "memory_gib" in device else []
        details += device.get("instructions", [])
        details += [] if device.get("usable_by_torch", True) else ["[red]the installed torch has no CUDA[/red]"]
        table.add_row(device["device"], ", ".join(details), ", ".join(device["precisions"]))
    return table


def registered_table(registered: dict[str, dict[str, str]]) -> Table:
    table = _table("Registered classes")
    for auto_class, entries in registered.items():
        for model_type, name in entries.items():
            table.add_row(auto_class, f"{name} [dim]({model_type})[/dim]")
    return table


def models_table(models: dict[str, dict[str, Any]]) -> Table:
    gflop = [f"GFLOP at {side}" for side in IMAGE_SIZES]
    memory = [f"GB in {dtype}" for dtype in BYTES_OF_A_PARAMETER]
    table = _table("Models", "", "parameters", *gflop, *memory, right=(1, 2, 3, 4, 5))
    for name, size in models.items():
        table.add_row(
            name,
            f"{size['num_parameters'] / 1e6:,.1f} M",
            *(f"{count / 1e9:,.1f}" for count in size["flop"].values()),
            *(f"{count / 1e9:.2f}" for count in size["weights_bytes"].values()),
        )
    return table


def recipes_table(recipes: dict[str, str]) -> Table:
    table = _table("Recipes")
    for name, summary in recipes.items():
        table.add_row(name, summary)
    return table


def _table(title: str, *columns: str, right: tuple[int, ...] = ()) -> Table:
    """A borderless table under a title; without column names it has two columns."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=bool(columns))
    for position, column in enumerate(columns or ("", "")):
        table.add_column(column, justify="right" if position in right else "left", no_wrap=position == 0)
    return table


TABLES: dict[str, Callable[[Any], Table]] = {
    "versions": versions_table,
    "devices": devices_table,
    "registered": registered_table,
    "models": models_table,
    "recipes": recipes_table,
}
