"""The costs in the guide to the recipes follow from its formulas."""

import re

import pytest
import torch

from dinov3_hf.models.dinov3_pretraining.modeling_dinov3_pretraining import DINOv3ForPreTraining
from dinov3_hf.training.arguments import parse_arguments
from dinov3_hf.training.ssl_config import SSLConfig
from tests.testing_utils import REPOSITORY

GUIDE = (REPOSITORY / "docs" / "recipes.md").read_text()
PROSE = " ".join(GUIDE.split())
ROWS = re.findall(r"^\| `(\w+)` \| (\d+) \| (\S+) \| (\S+) GB \| (\S+) MB \|$", GUIDE, re.MULTILINE)


def flop_of_an_image(config: SSLConfig) -> float:
    backbone = config.backbone_config()
    D, L = backbone.hidden_size, backbone.num_hidden_layers
    ffn_matrices = 3 if backbone.use_gated_mlp else 2
    W = L * (4 * D * D + ffn_matrices * D * backbone.intermediate_size)
    n_g, n_l = (1 + backbone.num_register_tokens + num_patches(config, size) for size in ("global", "local"))
    t_g, t_l = 2 * n_g, config.num_local_crops * n_l
    kept = 3 * (1 - backbone.drop_path_rate)
    m = 0.3 * num_patches(config, "global")
    H_dino, H_ibot = (
        D * head["hidden_dim"]
        + head["hidden_dim"] ** 2
        + head["bottleneck_dim"] * (head["hidden_dim"] + head["num_prototypes"])
        for head in (config.dino_head, config.ibot_head)
    )
    return (
        2 * W * (kept * (t_g + t_l) + t_g)
        + 4 * D * L * ((kept + 1) * t_g * n_g + kept * t_l * n_l)
        + 2 * H_dino * (3 * 10 + 2)
        + 2 * H_ibot * (3 + 1) * m
    )


def num_patches(config: SSLConfig, size: str) -> int:
    return (config.__dict__[f"{size}_crop_size"] // config.backbone_config().patch_size) ** 2


def test_the_table_is_found():
    assert len(ROWS) == 5


@pytest.mark.parametrize(("name", "gflop", "flop", "state", "targets"), ROWS)
def test_the_table(name, gflop, flop, state, targets):
    config = parse_arguments(SSLConfig, [name])
    counted = flop_of_an_image(config)
    assert gflop == f"{counted / 1e9:.0f}"
    assert float(flop) == pytest.approx(counted * config.global_batch_size * config.max_steps, rel=0.005)

    with torch.device("meta"):
        student = DINOv3ForPreTraining(config.pretraining_config()).student
    assert state == f"{20 * sum(p.numel() for p in student.parameters()) / 1e9:.1f}"

    rows = {"dino_head": 2, "ibot_head": 0.3 * num_patches(config, "global")}
    numbers = sum(count * config.__dict__[head]["num_prototypes"] for head, count in rows.items())
    assert targets == f"{4 * numbers / 1e6:.1f}"


def test_the_estimated_hours():
    total = {name: float(flop) for name, _, flop, _, _ in ROWS}
    rate = total["vitl16_im1k"] / (14 * 3600 * 32)  # the published run
    [said] = re.findall(r"sustain (\d+) TFLOP/s each", PROSE)
    assert int(said) == pytest.approx(rate / 1e12, rel=0.01)
    hours = re.search(
        r"`vitb16_im1k` would take (\d+) GPU hours, `vits16_im1k` (\d+) and `single_gpu_vits16` (\d+)", PROSE
    )
    for name, said in zip(("vitb16_im1k", "vits16_im1k", "single_gpu_vits16"), hours.groups(), strict=True):
        assert int(said) == pytest.approx(total[name] / rate / 3600, rel=0.05)
    [said] = re.findall(r"sustains 40 TFLOP/s, `single_gpu_vits16` would take (\d+) hours", PROSE)
    assert int(said) == pytest.approx(total["single_gpu_vits16"] / 40e12 / 3600, rel=0.05)
