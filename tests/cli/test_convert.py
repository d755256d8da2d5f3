"""`dinov3-hf convert`: the account that it prints, how it ends, and that it leaves nothing half done."""

import json
import os
import signal
import time

import pytest
import torch

from dinov3_hf.cli.convert import grouped, parse_size
from dinov3_hf.errors import ArgumentError
from dinov3_hf.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTModel
from tests.convert.files import assert_same_bits, heads, native_weights, prefixed, read_native, tiny_native
from tests.models.dinov3_vit.tiny import tiny_model
from tests.testing_utils import FIXTURES, run_in_process


def test_there_and_back_as_a_user_does_it(forks, tmp_path):
    native = native_weights(FIXTURES / "a_vit" / "mlp_kbias_storage4")
    torch.save(native, tmp_path / "native.pth")
    convert = ("-m", "dinov3_hf", "convert")
    done = forks.run(*convert, tmp_path / "native.pth", tmp_path / "hub", "--to", "hf", "--max_shard_size", "100KB")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == (
        f"{tmp_path}/native.pth: native, no released architecture, 0.2 M parameters in float32, 53 tensors"
    )
    assert "  dropped 3 x blocks.*.attn.qkv.bias_mask: a masked key bias is a network without key bias" in lines
    assert any(line.startswith("  note: no released architecture: what a native file does not say") for line in lines)
    assert lines[-1].startswith(f"{tmp_path}/hub: hf, 61 tensors, 0.8 MB, ")
    assert len(list((tmp_path / "hub").glob("model-*.safetensors"))) > 4
    DINOv3ViTModel.from_pretrained(tmp_path / "hub")

    done = forks.run(*convert, tmp_path / "hub", tmp_path / "back.pth", "--to", "native", "--json")
    assert done.returncode == 0, done.stderr
    account = json.loads(done.stdout)
    assert account["derived"].keys() == {"rope_embed.periods", *(f"blocks.{i}.attn.qkv.bias_mask" for i in range(3))}
    assert (account["source_tensors"], account["written_tensors"], account["dropped"]) == (61, 53, {})
    assert_same_bits(read_native(tmp_path / "back.pth"), native)
    assert {path.name for path in tmp_path.iterdir()} == {"native.pth", "hub", "back.pth"}


def test_a_branch_is_chosen(tmp_path, capsys):
    teacher, student = (
        tiny_native(),
        {name: tensor + 1 for name, tensor in tiny_native().items() if "mask" not in name},
    )
    student |= {name: tensor for name, tensor in teacher.items() if name not in student or "rope" in name}
    content = {
        "model": prefixed("teacher.backbone.", teacher) | prefixed("student.backbone.", student) | heads(),
        "iteration": 7,
    }
    torch.save(content, tmp_path / "run.pth")
    for options, branch, expected in (((), "teacher", teacher), (("--branch", "student"), "student", student)):
        target = tmp_path / f"{branch}.pth"
        status, printed, error = run_in_process(
            capsys, "convert", tmp_path / "run.pth", target, "--to", "native", *options
        )
        assert status == 0, error
        assert f"native, branch {branch}, " in printed
        assert "dropped iteration: no tensor" in printed
        assert_same_bits(read_native(target), expected)


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["absent.pth", "new", "--to", "hf"], 1, "absent.pth does not exist; give a file or a folder (`hf download"),
        (["native.pth", "new.pth", "--to", "onnx"], 2, "Invalid value for '--to'"),
        (["native.pth", "new", "--to", "native"], 2, "new is to be a file of torch; give it the suffix .pth or .pt."),
        (["native.pth", "new"], 2, "Missing option '--to'"),
        (["native.pth", "taken", "--to", "hf"], 1, "taken exists already; remove it or choose another name."),
        (["native.pth", "native.pth", "--to", "native"], 1, "native.pth exists already"),
        (["native.pth", "new", "--to", "hf", "--arch", "vits"], 2, "'vits' is not known; did you mean vits16"),
        (["native.pth", "new", "--to", "hf", "--arch", "vits16"], 1, "check the architecture"),
        (["native.pth", "new", "--to", "hf", "--arch", "convnext_tiny"], 1, "native.pth is no convnext_tiny"),
        (["hub", "new", "--to", "hf", "--arch", "convnext_tiny"], 1, "hub is no convnext_tiny: it holds a"),
        (["native.pth", "new", "--to", "hf", "--branch", "student"], 1, "no backbone in a branch 'student'; it has"),
        (["hub", "new", "--to", "hf", "--branch", "student"], 1, "is one network without branches; leave out"),
        (["native.pth", "new", "--to", "hf", "--max_shard_size", "much"], 2, "much is not a size; give"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_one_line(arguments, status, says, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(tiny_native(), "native.pth")
    tiny_model().save_pretrained("hub")
    (tmp_path / "taken").mkdir()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    found, printed, error = run_in_process(capsys, "convert", *arguments)
    assert (found, printed) == (status, "")
    assert error.splitlines()[-1].startswith("error: ") and says in error
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_an_architecture_that_is_named_is_taken(tmp_path, capsys):
    tiny_model().save_pretrained(tmp_path / "hub")
    status, _, error = run_in_process(
        capsys, "convert", tmp_path / "hub", tmp_path / "new.pth", "--to", "native", "--arch", "vitb16"
    )
    assert status == 1
    assert "where the architecture has" in error or "has no parameter" in error


@pytest.fixture(scope="module")
def large_file(tmp_path_factory):
    """200 MB, so that writing takes long enough to be interrupted."""
    path = tmp_path_factory.mktemp("large") / "native.pth"
    torch.save(tiny_native(hidden_size=1024, intermediate_size=4096, num_hidden_layers=4), path)
    return path


@pytest.mark.parametrize(
    ("number", "status", "to", "name"),
    [(signal.SIGINT, 130, "hf", "hub"), (signal.SIGTERM, 143, "native", "back.pth")],
)
def test_interrupted_it_leaves_nothing(forks, number, status, to, name, large_file, tmp_path, tmp_path_factory):
    said = tmp_path_factory.mktemp("said") / "log"
    command = ("-m", "dinov3_hf", "convert", large_file, tmp_path / "made" / name, "--to", to)
    pid = forks.start(*command, out=said, err=said)
    deadline = time.monotonic() + 60
    while not any(path.is_file() for path in tmp_path.rglob("*")):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    os.kill(pid, number)
    assert forks.wait(pid) == status, said.read_text()
    assert said.read_text() == ("interrupted\n" if number == signal.SIGINT else "terminated\n")
    assert list(tmp_path.iterdir()) == []


def test_what_only_the_middle_of_the_way_has_is_not_in_the_account(tmp_path, capsys):
    """Without registers a folder of the Hub has an empty parameter, and neither the original nor timm has one."""
    native, hub, timm = tmp_path / "native.pth", tmp_path / "hub", tmp_path / "timm"
    torch.save(tiny_native(num_register_tokens=0), native)
    accounts = []
    for source, target, to in ((native, hub, "hf"), (hub, tmp_path / "back.pth", "native"), (native, timm, "timm")):
        status, printed, error = run_in_process(capsys, "convert", source, target, "--to", to, "--json")
        assert status == 0, error
        facts = json.loads(printed)
        accounts.append(["embeddings.register_tokens" in facts[what] for what in ("derived", "dropped")])
    assert accounts == [[True, False], [False, True], [False, False]]


def test_names_that_differ_in_numbers_only_are_one_line():
    reasons = {"blocks.0.a": "x", "blocks.11.a": "x", "blocks.2.b": "x", "c": "y"}
    assert grouped(reasons) == {("blocks.*.a", "x"): 2, ("blocks.*.b", "x"): 1, ("c", "y"): 1}


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("1.5 mb", 1_500_000), ("20KB", 20_000), ("7", 7)])
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "0", "-1GB", "5GiB", "5 5", "9" * 400])
def test_what_is_no_size(text):
    with pytest.raises(ArgumentError, match="is not a size; give for example 5GB"):
        parse_size(text)
