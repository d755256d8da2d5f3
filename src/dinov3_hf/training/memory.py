"""What is done to the blocks of the backbones, one by one, to save memory and time: activations computed anew in the
backward pass, compiling, and float8 products. None of it changes names or values of parameters.

A block gets a `forward` of its own, which stands inside of whatever is hooked to the call of a block: the hooks of
FSDP2 and of ZeRO stay outside of the recomputation and of the compiled code, on all versions of transformers.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from dinov3_hf.distributed.engine import Engine
from dinov3_hf.models.dinov3_convnext.modeling_dinov3_convnext import DINOv3ConvNextLayer
from dinov3_hf.models.dinov3_pretraining.modeling_dinov3_pretraining import DINOv3ForPreTraining
from dinov3_hf.models.dinov3_pretraining.prototype_head import PrototypeHead
from dinov3_hf.models.dinov3_vit.layers import DINOv3ViTLayer
from dinov3_hf.training.precision import Recomputation
from dinov3_hf.training.recipe_config import RecipeConfig

Forward = Callable[..., Any]

# All blocks share the code that is compiled, and torch stops compiling at 8 variants of it, in silence but for a
# warning. A ViT with a Gram teacher has that many already: three networks, each first with sizes as they are and then
# with sizes left open, the first block by itself. A ConvNeXt has them for each stage.
MAX_VARIANTS = 64

_aten = torch.ops.aten
# What selective recomputation keeps: nearly all arithmetic of a block is in these. Attention written out (`eager`) is
# not among them; its probabilities are what recomputing saves most of.
EXPENSIVE = [
    _aten.mm.default,
    _aten.addmm.default,
    _aten._scaled_mm.default,  # float8
    _aten.convolution.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
]


def prepare_blocks(model: DINOv3ForPreTraining, args: RecipeConfig) -> None:
    """
    Do to a model, in place, what the recipe says of its blocks: `gradient_checkpointing` in the student, `fp8` in
    student and teacher, `torch_compile` in all networks. To be called before parameters are sharded; calling it again
    replaces what an earlier call has set, but for float8 layers, which stay.

    Args:
        model: on any device.
        args: `check_fp8` has been asked whether the machine has float8 products.
    """
    student, teacher = model.student.backbone, model.teacher.backbone
    if args.fp8:
        use_float8(student)
        use_float8(teacher)
    # The recipe's field may also be a boolean, but no more once the configuration is made.
    set_forwards(student, args.gradient_checkpointing, args.torch_compile)  # type: ignore[arg-type]
    for backbone in (teacher, model.gram_teacher):
        if backbone is not None:
            set_forwards(backbone, "none", args.torch_compile)


def shard_networks(engine: Engine, networks: Sequence[nn.Module]) -> None:
    """
    Let an engine cut backbones and prototype heads, block by block.

    Args:
        engine: of the run.
        networks: each is called on its own; blocks have the forwards that they are to have.
    """
    blocks = [block for network in networks for block in blocks_of(network)]
    products = [
        module
        for network in networks
        for module in (network.children() if isinstance(network, PrototypeHead) else products_of(network))
    ]
    engine.shard(networks, blocks, products)


def blocks_of(backbone: nn.Module) -> Iterator[nn.Module]:
    """The residual blocks of a ViT or a ConvNeXt."""
    return (module for module in backbone.modules() if isinstance(module, DINOv3ViTLayer | DINOv3ConvNextLayer))


def products_of(backbone: nn.Module) -> list[nn.Module]:
    """
    The largest modules inside of blocks that have parameters of linear layers only: attention, MLP. There are none of
    blocks with a forward of their own: hooks on what is inside would be recomputed, or compiled, with the rest.
    """
    blocks = (block for block in blocks_of(backbone) if "forward" not in block.__dict__)
    return [module for block in blocks for module in _largest_linear(block)]


def _largest_linear(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        owners = [part for part in child.modules() if part._parameters]
        if owners and all(isinstance(owner, nn.Linear) for owner in owners):
            yield child
        else:
            yield from _largest_linear(child)


def set_forwards(backbone: nn.Module, recomputation: Recomputation, compiled: bool) -> None:
    """
    Give each block of a backbone its forward.

    Args:
        backbone: a DINOv3 ViT or ConvNeXt.
        recomputation: what the backward pass computes anew: `none`, `full` all of a block from its input, `selective`
            what is not in `EXPENSIVE`. Results are the same bits, but for a ConvNeXt under autocast, whose gradients
            `selective` adds up over crop sizes in float32 instead of bfloat16.
        compiled: by `torch.compile`, for the first sizes as they are and for all later ones with sizes left open, so
            that a run with crops of many sizes compiles twice.
    """
    if compiled:
        torch._dynamo.config.recompile_limit = MAX_VARIANTS
    for block in blocks_of(backbone):
        block.__dict__.pop("forward", None)
        if recomputation == "none" and not compiled:
            continue
        forward: Forward = type(block).forward
        if recomputation != "none":
            forward = _recomputed(forward, selective=recomputation == "selective")
        if compiled:
            forward = torch.compile(forward)
        # A method, so that a copy of the block calls the copy.
        block.forward = MethodType(forward, block)


def _recomputed(forward: Forward, selective: bool) -> Forward:
    @wraps(forward)
    def uncached(block: nn.Module, inputs: Tensor, *others: Any) -> Any:
        device = inputs.device.type
        bf16, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        # Autocast casts a weight once for all crop sizes that go through a ConvNeXt one after the other. Recomputing
        # has to cast it for each, and to find in the forward pass what it repeats.
        with torch.autocast(device, dtype, enabled=bf16, cache_enabled=False):
            return forward(block, inputs, *others)

    # Two functions rather than one with an option: the compiler takes the contexts only by name.
    @wraps(forward)
    def recomputed(block: nn.Module, *inputs: Any) -> Any:
        return checkpoint(forward, block, *inputs, use_reentrant=False)

    @wraps(forward)
    def partly_recomputed(block: nn.Module, *inputs: Any) -> Any:
        return checkpoint(uncached, block, *inputs, use_reentrant=False, context_fn=_keep_expensive)

    return partly_recomputed if selective else recomputed


def _keep_expensive() -> Any:
    return create_selective_checkpoint_contexts(EXPENSIVE)


def use_float8(backbone: nn.Module, emulate: bool = False) -> None:
    """
    Let the linear layers of the blocks multiply in float8, forwards and backwards, in place: each tensor is scaled by
    its largest value and rounded to e4m3 (gradients to e5m2) where it enters a product. Weights keep their names and
    dtype. Layers with a size that is no multiple of 16, which the hardware refuses, stay as they are, as do LoRA's
    adapters.

    Args:
        backbone: a DINOv3 ViT or ConvNeXt.
        emulate: round to float8, but multiply without it: the same numbers up to the order of sums, on any machine.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    # The gradient of a weight is a sum over tokens, whose number need not be a multiple of 16: they are padded.
    config = Float8LinearConfig(pad_inner_dim=True, emulate=emulate)
    for block in blocks_of(backbone):
        convert_to_float8_training(block, module_filter_fn=_fits_float8, config=config)


def _fits_float8(module: nn.Module, name: str) -> bool:
    return type(module) is nn.Linear and "lora_" not in name and not any(n % 16 for n in module.weight.shape)
