"""What stands around a backbone in a file: branches, wrappers, heads, and all the rest."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from dinov3_hf.convert.checkpoint import read_checkpoint
from dinov3_hf.convert.lazy_tensor import read_all
from tests.convert.files import assert_same_bits, converted, heads, prefixed, read_native, tiny_native
from tests.reference.io import Case
from tests.testing_utils import FIXTURES

LAYOUTS = {
    "plain": ("", None),
    "model": ("model.", None),
    "state_dict": ("state_dict.", None),
    "data parallel": ("module.", None),
    "compiled": ("_orig_mod.", None),
    "backbone": ("backbone.", None),
    "teacher": ("teacher.", "teacher"),
    "teacher backbone": ("teacher.backbone.", "teacher"),
    "a whole run": ("model.teacher.backbone.", "teacher"),
    "all at once": ("model._orig_mod.module.teacher.module.backbone._orig_mod.", "teacher"),
    "one of many students": ("student1.backbone.", "student1"),
}


@pytest.mark.parametrize(("prefix", "branch"), LAYOUTS.values(), ids=LAYOUTS)
def test_prefixes_are_taken_off(prefix, branch, tmp_path):
    native = tiny_native()
    torch.save(prefixed(prefix, native), tmp_path / "a.pth")
    checkpoint, _ = converted(tmp_path / "a.pth", tmp_path / "back.pth", "native")
    assert checkpoint.branch == branch
    assert_same_bits(read_native(tmp_path / "back.pth"), native)


def test_wrappers_inside_of_names(tmp_path):
    native = tiny_native()
    wrapped = {
        name.replace("blocks.1.", "blocks.1._checkpoint_wrapped_module._orig_mod."): tensor
        for name, tensor in native.items()
    }
    save_file(wrapped, tmp_path / "a.safetensors")
    converted(tmp_path / "a.safetensors", tmp_path / "back.pth", "native")
    assert_same_bits(read_native(tmp_path / "back.pth"), native)


@pytest.mark.parametrize(
    ("branches", "taken"),
    [
        (("student", "teacher"), "teacher"),
        (("student", "teacher", "model_ema"), "model_ema"),
        (("student", "gram_teacher"), "student"),
        (("model", "model_ema"), "model_ema"),
        (("student0", "student1"), "student0"),
    ],
)
def test_the_network_that_the_run_was_for_is_taken(branches, taken, tmp_path):
    networks = {
        name: {key: tensor + at for key, tensor in tiny_native().items() if "cls_token" in key}
        for at, name in enumerate(branches)
    }
    content = {name: {**tiny_native(), **network} for name, network in networks.items()}
    torch.save(content | {"optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}, "iteration": 7}, tmp_path / "a.pth")
    checkpoint = read_checkpoint(tmp_path / "a.pth")
    assert checkpoint.branch == taken
    assert torch.equal(checkpoint.tensors["embeddings.cls_token"].read(), networks[taken]["cls_token"])
    assert checkpoint.dropped["optimizer.state.0.exp_avg"] == "state of the optimizer"
    assert checkpoint.dropped["iteration"] == "no tensor"
    for other in set(branches) - {taken}:
        assert checkpoint.dropped[f"{other}.norm.bias"] == f"branch {other}; the branch {taken} was taken"
        chosen = read_checkpoint(tmp_path / "a.pth", branch=other)
        assert torch.equal(chosen.tensors["embeddings.cls_token"].read(), networks[other]["cls_token"])


def test_a_recorded_training_run(tmp_path):
    """A whole state dict of the original's training module: student, teacher, heads, centres of losses."""
    weights = Case(FIXTURES / "e_ssl_step" / "gram_off").weights
    torch.save(weights, tmp_path / "run.pth")
    teacher = {
        name.removeprefix("teacher."): tensor for name, tensor in weights.items() if name.startswith("teacher.")
    }
    checkpoint, _ = converted(tmp_path / "run.pth", tmp_path / "hub", "hf")
    assert checkpoint.num_source_tensors == len(weights)
    assert (
        checkpoint.dropped["dino_loss.center"] == checkpoint.dropped["ibot_patch_loss.center"] == "of a loss, unused"
    )
    assert_same_bits(
        load_file(tmp_path / "hub" / "heads.safetensors"),
        {name: tensor for name, tensor in teacher.items() if not name.startswith("backbone.")},
    )
    converted(tmp_path / "hub", tmp_path / "back.pth", "native")
    assert_same_bits(read_native(tmp_path / "back.pth")["teacher"], teacher)
    student = read_checkpoint(tmp_path / "run.pth", branch="student")
    expected = {
        name.removeprefix("student."): tensor for name, tensor in weights.items() if name.startswith("student.")
    }
    assert_same_bits(read_all(student.heads), {name: expected[name] for name in student.heads})
    # Every name is accounted for: that of another branch under its full name, that of a buffer under its own.
    others = {name for name in weights if not name.startswith("teacher.")}
    buffers = {f"blocks.{block}.attn.qkv.bias_mask" for block in range(checkpoint.config.num_hidden_layers)}
    periods = {"rope_embed.periods"} if "native.rope_embed.periods" not in checkpoint.extras else set()
    assert checkpoint.dropped.keys() == others | buffers | periods


def test_heads_keep_what_they_count(tmp_path):
    head = heads() | {"dino_head.mlp.1.num_batches_tracked": torch.tensor(4)}
    torch.save({"teacher": prefixed("backbone.", tiny_native()) | head}, tmp_path / "a.pth")
    converted(tmp_path / "a.pth", tmp_path / "hub", "hf")
    assert_same_bits(load_file(tmp_path / "hub" / "heads.safetensors"), head)
    converted(tmp_path / "hub", tmp_path / "back.pth", "native")
    assert_same_bits({name: read_native(tmp_path / "back.pth")["teacher"][name] for name in head}, head)
