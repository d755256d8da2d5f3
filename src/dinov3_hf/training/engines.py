"""Which engine spreads a run over its ranks: what the recipe says, or what the launcher was told."""

import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist

from dinov3_hf.distributed.engine import Engine
from dinov3_hf.errors import ArgumentError

EngineName = Literal["auto", "ddp", "fsdp2", "zero2", "zero3"]


class Launched(NamedTuple):
    """What `accelerate launch` was told."""

    engine: EngineName
    deepspeed: str | None = None  # path of DeepSpeed's configuration


@cache
def launched() -> Launched:
    """
    The engine of the launcher's configuration file.

    It is taken out of the environment: accelerate would shard, or refuse to on a CPU, what is sharded here.
    """
    told = {
        name: os.environ.pop(name)
        for name in list(os.environ)
        if name.startswith(("ACCELERATE_USE_FSDP", "FSDP_", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_"))
    }
    if told.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1"):
        return Launched("fsdp2")
    if told.get("ACCELERATE_USE_DEEPSPEED", "false").lower() in ("true", "1"):
        path = told.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
        if path not in (None, "none"):
            return Launched(_stage_of(read_deepspeed(path), path), path)
        return Launched("zero3" if told.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2") == "3" else "zero2")
    return Launched("ddp")


def choose_engine(wanted: EngineName, deepspeed: str | None, offload: bool) -> Launched:
    """
    What `auto` stands for, and where DeepSpeed's configuration is.

    Args:
        wanted: what the recipe says.
        deepspeed: path of DeepSpeed's configuration in the recipe, if any.
        offload: whether the optimizer's state is to be in the memory of the host.

    Raises:
        ArgumentError: DeepSpeed is not installed, or the configuration is another engine's.
        ValueError: the engine cannot offload.
    """
    told = launched()
    if wanted == "auto":
        wanted = told.engine if deepspeed is None else _stage_of(read_deepspeed(deepspeed), deepspeed)
    chosen = Launched(wanted, deepspeed or (told.deepspeed if wanted == told.engine else None))
    is_zero = wanted in ("zero2", "zero3")
    if is_zero and find_spec("deepspeed") is None:
        raise ArgumentError(
            f"engine {wanted} needs DeepSpeed, which is not installed; pip install 'dinov3-hf[deepspeed]', or set "
            "engine: fsdp2."
        )
    if chosen.deepspeed is not None:
        if not is_zero:
            raise ArgumentError(f"deepspeed {deepspeed} is not read by engine {wanted}; set engine: zero3, or auto.")
        stage = _stage_of(read_deepspeed(chosen.deepspeed), chosen.deepspeed)
        if stage != wanted:
            raise ArgumentError(f"{chosen.deepspeed} is for engine {stage}, but the recipe says {wanted}; change one.")
    if offload and wanted not in ("fsdp2", "zero3"):
        raise ValueError(f"offload_optimizer is not in engine {wanted}; set engine: fsdp2 or zero3.")
    return chosen


def read_deepspeed(path: str) -> dict[str, Any]:
    """
    DeepSpeed's configuration.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no JSON object.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"deepspeed {path}: there is no such file; name a JSON file.")
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"deepspeed {path} is no JSON file ({error}); repair it.") from error
    if not isinstance(config, dict):
        raise ValueError(f"deepspeed {path} is no JSON object; see training_scripts/deepspeed/zero3.json.")
    return config


def _stage_of(config: dict[str, Any], path: str) -> EngineName:
    zero = config.get("zero_optimization")
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if stage == 2:
        return "zero2"
    if stage == 3:
        return "zero3"
    raise ValueError(f"deepspeed {path} has zero_optimization.stage {stage}; use 2 or 3, or no DeepSpeed.")


def make_engine(
    chosen: Launched,
    device: torch.device,
    batch_size: int,
    bf16: bool,
    offload: bool,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> Engine:
    """
    The engine of a run.

    Args:
        chosen: by `choose_engine`.
        device: of this rank.
        batch_size: images of a forward of one rank.
        bf16: whether forwards run under bf16 autocast.
        offload: keep the optimizer's state in the memory of the host.
        autocast: gives the context of each forward.
    """
    if chosen.engine == "ddp":
        return Engine()
    if not dist.is_initialized():  # one process that no launcher has started
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if chosen.engine == "fsdp2":
        from dinov3_hf.distributed.fsdp2 import FSDP2Engine

        return FSDP2Engine(device, bf16, offload, autocast)
    from dinov3_hf.distributed.zero import ZeroEngine

    stage = 3 if chosen.engine == "zero3" else 2
    config = {} if chosen.deepspeed is None else read_deepspeed(chosen.deepspeed)
    return ZeroEngine(stage, config, device, batch_size, bf16, offload)
