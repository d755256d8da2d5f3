"""Operations and memory of a training step are those that torch counts: the whole step, with teacher, heads, local
crops, stochastic depth, optimizer and moving average."""

import pytest

from dinov3_hf.cli.plan_recipe import read_words, workload_of
from dinov3_hf.plan.engines import Engine
from dinov3_hf.plan.step_flop import step_flop
from dinov3_hf.plan.step_memory import step_memory
from tests.plan.training_step import take_steps

CONVNEXT = [
    "--backbone", "{preset: convnext_tiny, depths: [1, 1, 2, 1], drop_path_rate: 0.1}", "--ibot_weight", "0",
]  # fmt: skip
CASES = {
    "shallow": ("vits16_im1k", 8, []),
    "shallow, float32": ("vits16_im1k", 8, ["--precision", "fp32"]),
    "shallow, no stochastic depth": ("vits16_im1k", 8, ["--backbone.drop_path_rate", "0"]),
    "shallow, no LayerScale": ("vits16_im1k", 8, ["--backbone.layerscale_value", "null"]),
    "shallow, no local crops": ("vits16_im1k", 8, ["--num_local_crops", "0"]),
    "shallow, full": ("vits16_im1k", 8, ["--gradient_checkpointing", "full"]),
    "shallow, selective": ("vits16_im1k", 8, ["--gradient_checkpointing", "selective"]),
    "ConvNeXt": ("vits16_im1k", 8, CONVNEXT),
    "ConvNeXt, float32": ("vits16_im1k", 8, [*CONVNEXT, "--precision", "fp32"]),
}
LARGE_CASES = {
    "small": ("vits16_im1k", 64, []),
    "base": ("vitb16_im1k", 32, []),
    "large, as published": ("vitl16_im1k", 64, []),
    "large, Gram": ("vitl16_gram_anchor", 8, []),
    "7B, as published": ("vit7b16_pretrain", 16, []),
    "7B, none": ("vit7b16_pretrain", 16, ["--gradient_checkpointing", "none"]),
    "7B, selective": ("vit7b16_pretrain", 16, ["--gradient_checkpointing", "selective"]),
    "7B, Gram at 768": ("vit7b16_high_res", 8, []),
}


def compare(monkeypatch, tmp_path, recipe, num_images, changes, fake=True):
    words = [recipe, *changes, "--global_batch_size", str(num_images), "--koleo_group_size", str(min(num_images, 8))]
    workload = workload_of(read_words(words).args)
    resolution = workload.resolutions[0]
    measured = take_steps(monkeypatch, [*words, "--output_dir", str(tmp_path)], workload, num_images, fake)
    assert workload.num_parameters == measured.num_parameters
    assert step_flop(workload, resolution).total == pytest.approx(measured.flop, rel=0.005)  # 2 % are promised
    memory = step_memory(workload, resolution, Engine("ddp", 1), num_images, num_images)
    assert memory.peak == pytest.approx(measured.peak, rel=0.05)  # 10 % are promised


@pytest.mark.parametrize("case", CASES)
def test_small_networks(monkeypatch, tmp_path, case):
    recipe, num_images, changes = CASES[case]
    depth = [] if changes[:2] == CONVNEXT[:2] else ["--backbone.num_hidden_layers", "3"]
    compare(monkeypatch, tmp_path, recipe, num_images, [*depth, *changes])


@pytest.mark.slow
@pytest.mark.parametrize("case", LARGE_CASES)
def test_large_networks(monkeypatch, tmp_path, case):
    compare(monkeypatch, tmp_path, *LARGE_CASES[case])


@pytest.mark.parametrize("changes", [[], ["--backbone.drop_path_rate", "0.3"]])
def test_real_tensors(monkeypatch, tmp_path, changes):
    small = ["--backbone.num_hidden_layers", "4", "--dino_head.num_prototypes", "4096"]
    small += ["--ibot_head.num_prototypes", "4096", "--global_crop_size", "96", "--local_crop_size", "32"]
    compare(monkeypatch, tmp_path, "vits16_im1k", 8, [*small, *changes], fake=False)
