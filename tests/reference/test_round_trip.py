"""`--round_trip`: the recorded backbones are checked again after their weights went through files."""

import pytest
import torch

from tests.testing_utils import FIXTURES

from . import io
from .__main__ import main
from .round_trip import through_files


@pytest.mark.parametrize("case", ["a_vit/mlp_kbias_storage4", "a_vit/rope_bf16", "b_convnext/no_layer_scale"])
def test_backbones_pass_after_a_round_trip(case, capsys):
    assert main(["--round_trip", str(FIXTURES / case)]) == 0
    assert "1 cases, 0 misses" in capsys.readouterr().out


def test_the_weights_that_are_checked_are_those_that_came_back(monkeypatch, capsys):
    came_back = []

    def spoil(weights):
        tensors = through_files(weights)
        came_back.append(
            {name: torch.zeros_like(tensor) if name == "cls_token" else tensor for name, tensor in tensors.items()}
        )
        return came_back[-1]

    monkeypatch.setattr(io, "through_files", spoil)
    case = str(FIXTURES / "a_vit/mlp_kbias_storage4")
    assert main([case]) == 0
    assert not came_back
    assert main(["--round_trip", case]) == 1
    assert len(came_back) == 1
