"""Sharding by PyTorch's FSDP2 (`torch.distributed.fsdp.fully_shard`), on GPUs and on CPUs alike."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from dinov3_hf.distributed.engine import Engine, Shard, ShardedModel, clip_shards
from dinov3_hf.distributed.reductions import current_group, rank, world_size


class FSDP2Engine(Engine):
    """
    Every network is a root of its own, so that they can be called in any order, a head without its backbone too.

    Shards are float32, and so is the reduction of gradients. In bf16, weights of matrix products are gathered in
    bfloat16, all others in float32, so that autocast finds what it would have made.

    The ranks are those of the process group (`reductions.process_group`) in which `shard` is called; every other
    method is to be called in the same one.

    Args:
        device: of this rank.
        bf16: whether forwards run under bf16 autocast.
        offload: keep shards, gradients and moments in the memory of the host.
        autocast: gives the context of each forward.
    """

    name = "fsdp2"
    holds_everything = False

    def __init__(
        self, device: torch.device, bf16: bool, offload: bool, autocast: Callable[[], AbstractContextManager[Any]]
    ) -> None:
        self.device = device
        self.bf16 = bf16
        self.offload = offload
        self.autocast = autocast
        self.networks: list[FSDPModule] = []
        # Tokens are parts of one packed matrix; nobody changes them in place.
        warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")

    def shard(
        self, networks: Sequence[nn.Module], blocks: Sequence[nn.Module], products: Sequence[nn.Module] = ()
    ) -> None:
        if self.networks:
            return  # by an earlier call
        group = current_group()
        if group is None:
            mesh = init_device_mesh(self.device.type, (world_size(),))
        else:
            mesh = DeviceMesh.from_group(group, self.device.type)
        offload = CPUOffloadPolicy(pin_memory=self.device.type == "cuda") if self.offload else OffloadPolicy()
        # Inputs keep their dtype: the residual stream is float32 under autocast.
        half = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        full = MixedPrecisionPolicy(cast_forward_inputs=False)
        if self.bf16:
            for module in products:
                fully_shard(module, mesh=mesh, mp_policy=half, offload_policy=offload)
        for block in blocks:
            fully_shard(block, mesh=mesh, mp_policy=full, offload_policy=offload)
        for network in networks:
            # A root that stayed gathered would not see what is written to its shards after the step.
            self.networks.append(
                fully_shard(network, mesh=mesh, mp_policy=full, offload_policy=offload, reshard_after_forward=True)
            )

    def wrap(self, model: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
        # Micro-batches are reduced one by one: gradients that wait for the last one would be whole.
        return ShardedModel(model, self.autocast), optimizer

    def clip_gradients(self, submodules: Mapping[str, nn.Module], max_norm: float) -> dict[str, Tensor]:
        gradients = {
            name: [_local(parameter.grad) for parameter in module.parameters() if parameter.grad is not None]
            for name, module in submodules.items()
        }
        return clip_shards(gradients, max_norm, self.device)

    def _part_of(self, tensor: Tensor) -> Shard:
        # Rows are dealt to the ranks in blocks of ceil(rows / ranks).
        rows = tensor.shape[0]
        first = min(rank() * -(-rows // world_size()), rows)
        return Shard(first * (tensor.numel() // rows), _local(tensor).view(-1))

    def whole_tensors(self, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in module.named_parameters():
            shard = parameter.detach().to(self.device)  # NCCL does not gather from the memory of the host
            assert isinstance(shard, DTensor)
            yield name, shard.full_tensor()


def _local(tensor: Tensor) -> Tensor:
    assert isinstance(tensor, DTensor)
    return tensor.to_local()
