"""One clip per sub-module."""

import pytest
import torch
from torch import nn

from dinov3_hf.distributed.engine import Engine


def modules_with_gradients() -> dict[str, nn.Module]:
    modules = {"backbone": nn.Linear(3, 3), "dino_head": nn.Linear(3, 3), "ibot_head": nn.Linear(3, 3)}
    for scale, module in zip((10.0, 1.0, 0.01), modules.values(), strict=True):
        for parameter in module.parameters():
            parameter.grad = scale * torch.randn_like(parameter)
    return modules


def norm_of(module: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in module.parameters()]).norm()


def test_each_submodule_is_clipped_on_its_own():
    modules = modules_with_gradients()
    before = {name: norm_of(module) for name, module in modules.items()}
    norms = Engine().clip_gradients(modules, max_norm=3.0)
    assert list(norms) == ["backbone", "dino_head", "ibot_head"]
    for name, module in modules.items():
        assert norms[name].shape == ()
        torch.testing.assert_close(norms[name], before[name])
        torch.testing.assert_close(norm_of(module), before[name].clamp(max=3.0))


def test_zero_measures_only():
    modules = modules_with_gradients()
    before = {name: norm_of(module) for name, module in modules.items()}
    norms = Engine().clip_gradients(modules, max_norm=0)
    for name, module in modules.items():
        torch.testing.assert_close(norms[name], before[name])
        assert torch.equal(norm_of(module), before[name])


def test_a_submodule_without_gradients_has_norm_zero():
    assert Engine().clip_gradients({"backbone": nn.Linear(2, 2)}, max_norm=3.0)["backbone"] == pytest.approx(0.0)
