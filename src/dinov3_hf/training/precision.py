"""Which arithmetic a training step uses, and what of it is done twice."""

from importlib.util import find_spec
from typing import Literal

import torch

from dinov3_hf.errors import ArgumentError

Precision = Literal["auto", "bf16", "fp32"]
Recomputation = Literal["none", "selective", "full"]
MIN_FP8_CAPABILITY = (8, 9)  # Ada, Hopper and later multiply float8 matrices

# Narrowest backbone whose training step is faster under bf16 autocast on a CPU with AVX512-bf16. Measured on 2 cores
# of an AMD EPYC (4 blocks; forward, backward, AdamW), float32 time / bf16 time for 64 images of 64 px, and for 8 of
# 224 px + 32 of 96 px. Width 64: 0.82, 1.11; 128: 1.00, 1.28; 192: 1.19, 1.12; 256: 1.30, 1.28; 768: -, 1.83.
MIN_CPU_BF16_WIDTH = 192


def resolve_precision(precision: Precision, hidden_size: int, *, use_cpu: bool) -> Literal["bf16", "fp32"]:
    """The arithmetic that `auto` stands for on this machine; other values are returned as they are.

    bf16 on CUDA devices that have it, and on CPUs with AMX or AVX512-bf16 for backbones wide enough to gain from it;
    else float32.

    Args:
        precision: what the recipe says.
        hidden_size: width of the backbone.
        use_cpu: do not look for an accelerator.

    Raises:
        ValueError: bf16 is asked for on a CUDA device without it.
    """
    accelerator = None if use_cpu else torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None and accelerator.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        if precision == "bf16" and not has_bf16:
            raise ValueError(f"precision bf16 is not in {torch.cuda.get_device_name()}; use auto or fp32.")
    elif accelerator is None:
        has_bf16 = hidden_size >= MIN_CPU_BF16_WIDTH and cpu_has_bf16()
    else:
        has_bf16 = False
    if precision == "auto":
        return "bf16" if has_bf16 else "fp32"
    return precision


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware (AMX or AVX512-bf16)."""
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def check_fp8(bf16: bool, *, use_cpu: bool) -> None:
    """Refuse float8 products where they cannot be had.

    Args:
        bf16: whether the step is under bfloat16 autocast, which the layers around the products need.
        use_cpu: do not look for an accelerator.

    Raises:
        ValueError: there is no GPU with float8 products, or the precision is fp32.
        ArgumentError: torchao is not installed.
    """
    least = ".".join(map(str, MIN_FP8_CAPABILITY))
    if use_cpu or not torch.cuda.is_available():
        raise ValueError(
            f"fp8 needs a GPU of compute capability {least} or more, and this run has none; set fp8: false."
        )
    if torch.cuda.get_device_capability() < MIN_FP8_CAPABILITY:
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        raise ValueError(
            f"fp8 needs a GPU of compute capability {least} or more, and {torch.cuda.get_device_name()} has "
            f"{capability}; set fp8: false."
        )
    if not bf16:
        raise ValueError("fp8 goes with bfloat16 around it, and precision is fp32; set precision: bf16.")
    if find_spec("torchao") is None:
        raise ArgumentError("fp8 needs torchao, which is not installed; pip install 'dinov3-hf[fp8]'.")
