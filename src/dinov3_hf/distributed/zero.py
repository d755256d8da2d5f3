"""Sharding by DeepSpeed's ZeRO, stages 2 and 3, on GPUs and on CPUs alike.

| | parameters | gradients, master weights, moments |
|---|---|---|
| stage 2 | whole on every rank | sharded |
| stage 3 | sharded | sharded |

Parameters are float32; bf16 is DeepSpeed's `torch_autocast`, in which gathered weights are bfloat16.
"""

import copy
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dinov3_hf.distributed.engine import MOMENTS, Engine, Shard, ShardedModel, clip_shards, new_state
from dinov3_hf.distributed.reductions import rank


class ZeroEngine(Engine):
    """
    One DeepSpeed engine around the whole model; the optimizer knows the parameters that are trained.

    DeepSpeed clips by one norm over all parameters; here each sub-module has its own, as published, so its
    `gradient_clipping` is not used.

    Args:
        stage: 2 or 3.
        config: DeepSpeed's configuration, of which `zero_optimization` counts; the rest is the recipe's.
        device: of this rank.
        batch_size: images of a forward of one rank.
        bf16: whether forwards run under bf16 autocast.
        offload: keep master weights and moments in the memory of the host.
    """

    mixes_dtypes = False

    def __init__(
        self,
        stage: int,
        config: Mapping[str, Any],
        device: torch.device,
        batch_size: int,
        bf16: bool,
        offload: bool,
    ) -> None:
        self.name = f"zero{stage}"
        self.stage = stage
        self.device = device
        self.holds_everything = stage == 2
        if device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when deepspeed is imported
        self.config = _config(stage, config, batch_size, bf16, offload)
        self._engine: Any = None

    def wrap(self, model: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, "_ZeroStep"]:
        import deepspeed

        # DeepSpeed reads it until the end, and not every launcher sets it.
        os.environ.setdefault("LOCAL_RANK", str(self.device.index or 0))
        self._engine, self._zero, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=copy.deepcopy(self.config)
        )
        self._masters = dict(self._find_masters())
        return ShardedModel(self._engine, no_sync=self._gradients_stay_local), _ZeroStep(self._engine, optimizer)

    @contextmanager
    def _gradients_stay_local(self) -> Iterator[None]:
        self._engine.set_gradient_accumulation_boundary(False)
        yield
        self._engine.set_gradient_accumulation_boundary(True)

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss, scale_wrt_gas=False)

    def clip_gradients(self, submodules: Mapping[str, nn.Module], max_norm: float) -> dict[str, Tensor]:
        owner = {id(p): name for name, module in submodules.items() for p in module.parameters()}
        gradients: dict[str, list[Tensor]] = {name: [] for name in submodules}
        with self._gradients() as found:
            for parameter, gradient in found:
                gradients[owner[id(parameter)]].append(gradient)
            return clip_shards(gradients, max_norm, self.device)

    def discard_gradients(self, model: nn.Module) -> None:
        # DeepSpeed leaves out a step whose gradients are not finite, and cleans up behind it.
        with self._gradients() as found:
            for _, gradient in found:
                gradient.fill_(float("nan"))

    @contextmanager
    def _gradients(self) -> Iterator[list[tuple[nn.Parameter, Tensor]]]:
        """Trained parameters and this rank's parts of their gradients, which may be changed in place."""
        zero = self._zero
        if self.stage == 2:
            # A list of gradients may end with a padding.
            yield [
                pair
                for group, parameters in enumerate(zero.params_in_partition)
                for pair in zip(parameters, zero.averaged_gradients[group], strict=False)
            ]
            return
        from deepspeed.utils import safe_get_local_grad, safe_set_local_grad

        # Copies where the optimizer is in the memory of the host.
        partitions = [(p, safe_get_local_grad(p)) for group in zero.fp16_groups for p in group]
        yield [(p, _without_padding(p, partition).values) for p, partition in partitions]
        for parameter, partition in partitions:
            safe_set_local_grad(parameter, partition)

    def shape(self, parameter: Any) -> torch.Size:
        shape: torch.Size = parameter.ds_shape if self.stage == 3 else parameter.shape
        return shape

    def parameter_shard(self, parameter: Any) -> Shard:
        if self.stage == 2:
            return super().parameter_shard(parameter)
        return _without_padding(parameter, parameter.ds_tensor)

    def moment_shards(self, parameter: nn.Parameter, optimizer: Optimizer) -> dict[str, Shard]:
        master = self._masters.get(parameter)
        if master is None or not optimizer.state[master.weights]:
            return {}
        return {name: Shard(master.start, master.part_of(optimizer.state[master.weights][name])) for name in MOMENTS}

    def prepare_moments(self, optimizer: Optimizer) -> None:
        for master in self._masters.values():
            if not optimizer.state[master.weights]:
                optimizer.state[master.weights] = new_state(master.weights)

    def shards_changed(self, module: nn.Module) -> None:
        parameters: Iterator[Any] = module.parameters()
        for parameter in parameters:
            shard = self.parameter_shard(parameter)
            if master := self._masters.get(parameter):
                start = master.start - shard.start
                master.part_of(master.weights.detach()).copy_(shard.values[start : start + master.size])
            if self.stage == 3 and parameter.ds_status.name == "AVAILABLE":
                parameter.partition()  # small ones stay gathered, with the values that were
        if self.stage == 3 and self.device.type == "cuda":
            # DeepSpeed gathers on a stream of its own, which does not wait for this one.
            torch.cuda.current_stream(self.device).synchronize()

    def _find_masters(self) -> "Iterator[tuple[nn.Parameter, _Master]]":
        zero = self._zero
        if self.stage == 2:
            for group, weights in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
                for parameter in group:
                    if part := parameter._hp_mapping:  # None where all of it is on other ranks
                        start, size = part.lp_fragment_address.start, part.lp_fragment_address.numel
                        yield parameter, _Master(weights, part.hp_fragment_address.start, size, start)
            return
        for group, weights in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True):
            offset = 0
            for parameter in group:
                shard = self.parameter_shard(parameter)
                yield parameter, _Master(weights, offset, len(shard.values), shard.start)
                offset += parameter.partition_numel()

    def whole_tensors(self, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
        if self.stage == 2:
            yield from super().whole_tensors(module)
            return
        import deepspeed

        for name, parameter in module.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter]):
                yield name, parameter.detach().clone()


class _Master(NamedTuple):
    """Where this rank's part of a trained parameter lies in the master weights, and in the moments, of a group."""

    weights: Tensor  # float32, flat, of all parameters of the group one after the other
    offset: int  # in them
    size: int
    start: int  # in the flattened parameter

    def part_of(self, flat: Tensor) -> Tensor:
        return flat.narrow(0, self.offset, self.size)


class _ZeroStep:
    """What a trainer calls in the place of the optimizer."""

    def __init__(self, engine: Any, optimizer: Optimizer) -> None:
        self._engine = engine
        self.param_groups = optimizer.param_groups

    def step(self) -> None:
        self._engine.step()


def _without_padding(parameter: Any, partition: Tensor) -> Shard:
    """All ranks have partitions of the same size, of which the last ones may reach beyond the parameter."""
    start = rank() * len(partition)
    size = min(max(parameter.ds_numel - start, 0), len(partition))
    return Shard(min(start, parameter.ds_numel), partition.narrow(0, 0, size))


# What the recipe says, so that DeepSpeed must not.
_OF_THE_RECIPE = {
    "train_batch_size": "global_batch_size",
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "gradient_accumulation_steps": "per_device_train_batch_size",
    "gradient_clipping": "max_grad_norm",
    "optimizer": "lr_schedule and the fields of AdamW",
    "scheduler": "lr_schedule",
    "bf16": "precision",
    "fp16": "precision",
    "torch_autocast": "precision",
}


def _config(stage: int, given: Mapping[str, Any], batch_size: int, bf16: bool, offload: bool) -> dict[str, Any]:
    config = _without_auto(given)
    for name, field in _OF_THE_RECIPE.items():
        if name in config and config[name] != {"enabled": False}:
            raise ValueError(f"the DeepSpeed configuration sets {name}; leave it out and set {field} of the recipe.")
        config.pop(name, None)
    defaults = {
        # Small parameters that stay gathered would be gathered anew behind every moving average.
        "stage3_param_persistence_threshold": 0,
        "reduce_bucket_size": 50_000_000,  # gradients that are reduced together; DeepSpeed's buffer takes 2 GB
    }
    zero = {**defaults, **config.pop("zero_optimization", {}), "stage": stage}
    if zero.pop("offload_optimizer", None) not in (None, {"device": "none"}):
        raise ValueError(
            "the DeepSpeed configuration sets zero_optimization.offload_optimizer; leave it out and set "
            "offload_optimizer of the recipe."
        )
    if offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        config["zero_force_ds_cpu_optimizer"] = False
    if bf16:
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
        config["communication_data_type"] = "fp32"
    return config | {
        "train_micro_batch_size_per_gpu": batch_size,
        "gradient_accumulation_steps": 1,  # the trainer adds up
        "gradient_clipping": 0.0,  # the default is 1, over all parameters
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
    }


def _without_auto(values: Mapping[str, Any]) -> dict[str, Any]:
    """Configurations for the Trainer of transformers leave values to it as "auto"."""
    plain = {name: _without_auto(value) if isinstance(value, dict) else value for name, value in values.items()}
    return {name: value for name, value in plain.items() if value not in ("auto", {})}
