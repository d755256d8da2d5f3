"""timm's folders and files through the whole converter."""

import json

import pytest
import torch
from safetensors.torch import load_file

from dinov3_hf.convert.checkpoint import read_checkpoint
from dinov3_hf.convert.random_weights import random_checkpoint
from dinov3_hf.convert.writing import write_checkpoint
from tests.convert.files import converted, tiny_native

timm = pytest.importorskip("timm")

from tests.convert.timm_folders import assert_same_tensors, build_timm, lazy, save_timm  # noqa: E402

FOLDERS = {
    "vit": ("vit_small_plus_patch16_dinov3_qkvb", {"embed_dim": 48, "depth": 2, "num_heads": 3, "patch_size": 8}),
    "convnext": ("convnext_tiny.dinov3_lvd1689m", {"dims": [8, 16, 24, 32], "depths": [1, 2, 1, 1]}),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_comes_back_with_the_same_bits(tmp_path, name):
    architecture, arguments = FOLDERS[name]
    fields, tensors = save_timm(build_timm(architecture, num_classes=3, **arguments), tmp_path / "timm")
    checkpoint, _ = converted(tmp_path / "timm", tmp_path / "hf", "hf", max_shard_size=20_000)
    assert checkpoint.format == "timm"
    # timm reads no shards, so there are none.
    _, written = converted(tmp_path / "hf", tmp_path / "back", "timm", max_shard_size=20_000)
    assert sorted(path.name for path in (tmp_path / "back").iterdir()) == ["config.json", "model.safetensors"]
    assert_same_tensors(lazy(load_file(tmp_path / "back" / "model.safetensors")), tensors)
    again = json.loads((tmp_path / "back" / "config.json").read_text())
    assert again["architecture"] == fields["architecture"]
    for kind in ("mean", "std", "input_size", "num_classes"):
        assert again["pretrained_cfg"][kind] == fields["pretrained_cfg"][kind]
    assert not written.differences


def test_native_to_timm_and_back_loses_the_mask_token_only(tmp_path):
    write_checkpoint(random_checkpoint("vits16", zero_qkv_bias=True), tmp_path / "native.pth", "native")
    _, there = converted(tmp_path / "native.pth", tmp_path / "timm", "timm")
    assert there.architecture == "vit_small_patch16_dinov3"
    assert "values are lost" in there.dropped["embeddings.mask_token"]
    converted(tmp_path / "timm", tmp_path / "back.pth", "native")
    original, back = (torch.load(tmp_path / name, weights_only=True) for name in ("native.pth", "back.pth"))
    assert not back["mask_token"].any()
    assert_same_tensors(lazy({**back, "mask_token": original["mask_token"]}), lazy(original))


def test_rounded_periods_serve_the_way_back_to_native_only(tmp_path):
    native = tiny_native()
    native["rope_embed.periods"] = native["rope_embed.periods"].bfloat16().float()
    torch.save(native, tmp_path / "native.pth")
    checkpoint = read_checkpoint(tmp_path / "native.pth")
    assert "native.rope_embed.periods" in checkpoint.extras and checkpoint.differences
    written = write_checkpoint(checkpoint, tmp_path / "timm", "timm")
    assert written.dropped["native.rope_embed.periods"] == "serves the way back to native only"


def test_a_bare_file_of_a_released_size_needs_no_folder(tmp_path):
    write_checkpoint(random_checkpoint("vits16"), tmp_path / "timm", "timm")
    whole, bare = read_checkpoint(tmp_path / "timm"), read_checkpoint(tmp_path / "timm" / "model.safetensors")
    assert whole.config.to_dict() == bare.config.to_dict()
    assert_same_tensors(bare.tensors, whole.tensors)
