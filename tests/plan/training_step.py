"""A whole training step as the trainer takes it, with every tensor counted that there is at any moment.

Tensors are fake: they have sizes, but no numbers, so that a network of 7 billion parameters fits into a test. One test
compares with real ones.
"""

import weakref
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import initialization as init

from dinov3_hf.models.dinov3_pretraining.modeling_dinov3_pretraining import DINOv3ForPreTraining
from dinov3_hf.models.dinov3_vit import layers, rope
from dinov3_hf.plan.workload import Workload
from dinov3_hf.training.arguments import parse_arguments
from dinov3_hf.training.memory import prepare_blocks
from dinov3_hf.training.ssl_config import SSLConfig


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operations have made and nobody has let go."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.storages = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key in self.storages:
            return

        def forget(_):
            self.now -= size
            del self.storages[key]

        self.storages[key] = weakref.ref(storage, forget)
        self.now += size
        self.peak = max(self.peak, self.now)


@dataclass
class Measured:
    num_parameters: int  # of the student
    flop: int  # of an image
    peak: int  # bytes


def convolution_backward_flop(
    grad_shape, x_shape, w_shape, _bias, _stride, _padding, _dilation, transposed, _output_padding, _groups, mask, **_
):
    """torch counts the gradient of the weights of a grouped convolution as if all channels met."""
    assert not transposed
    batch, _, *grid = grad_shape
    return 2 * batch * torch.Size(grid).numel() * torch.Size(w_shape).numel() * sum(mask[:2])


def take_steps(monkeypatch, words: list[str], workload: Workload, num_images: int, fake: bool = True) -> Measured:
    """Two optimizer steps; what the second has at most."""
    args = parse_arguments(SSLConfig, [*words, "--use_cpu", "true"])
    config, sizes = args.pretraining_config(), args.crop_size_mix().sizes[0]
    draws = args.student_draws().at(0, range(num_images), torch.device("cpu"))
    # Fake parameters are no plain ones; the products are joined for those that are.
    monkeypatch.setattr(layers, "is_plain_linear", lambda projection: True)
    patches = workload.backbone.patches(sizes.global_crop_size)
    num_masked = round(workload.masked_patches(workload.resolutions[0], num_images))
    flop = FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten.convolution_backward: convolution_backward_flop}
    )
    live = LiveBytes()
    rope._cached_rotation_tables.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=True) if fake else nullcontext(), live:
        with init.no_init_weights() if fake else nullcontext():
            model = DINOv3ForPreTraining(config).train()
        prepare_blocks(model, args)
        if model.gram_teacher is not None:
            in_bfloat16(model.gram_teacher)
        optimizer = torch.optim.AdamW(model.student.parameters(), fused=True)

        def step():
            def crops(number, side):
                return torch.zeros(number * num_images, workload.backbone.num_channels, side, side)

            has_gram = args.gram_teacher is not None
            mask = torch.zeros(2 * num_images, patches, dtype=torch.bool)
            with torch.autocast("cpu", torch.bfloat16, enabled=workload.bf16):
                output = model(
                    global_crops=crops(2, sizes.global_crop_size),
                    local_crops=crops(args.num_local_crops, sizes.local_crop_size),
                    mask=mask if num_masked else None,
                    mask_indices=torch.arange(num_masked) if num_masked else None,
                    mask_weight=torch.ones(num_masked) if num_masked else None,
                    teacher_temperature=0.07,
                    gram_crops=crops(2, sizes.gram_crop_size) if has_gram else None,
                    gram_weight=1.0 if has_gram else 0.0,
                    draws=draws,
                )
            output.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            torch._foreach_lerp_(list(model.teacher.parameters()), list(model.student.parameters()), 0.01)

        with flop:
            step()
        live.peak = 0
        step()
        num_parameters = sum(parameter.numel() for parameter in model.student.parameters())
        measured = Measured(num_parameters, flop.get_total_flops() // num_images, live.peak)
    rope._cached_rotation_tables.cache_clear()  # of fake tables
    return measured


def in_bfloat16(network):
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            module.register_parameter(
                name, torch.nn.Parameter(torch.empty_like(parameter, dtype=torch.bfloat16), requires_grad=False)
            )
