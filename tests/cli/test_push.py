"""What `dinov3-hf push` refuses before it speaks to any Hub."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.testing_utils import run_in_process, save_tiny_vit


@pytest.fixture(autouse=True)
def _logged_in(monkeypatch):
    """Whatever gets past the checks finds that tests are offline."""
    monkeypatch.setenv("HF_TOKEN", "hf_good")


def refusal(capsys, *arguments) -> str:
    status, printed, error = run_in_process(capsys, "push", *arguments)
    [line] = [line for line in error.splitlines() if line.startswith("error: ")]
    assert (status, printed) == (1, "") and "Traceback" not in error
    assert error.endswith(line + "\n")
    return line


def test_what_is_no_model_folder(tmp_path, capsys):
    assert "absent is no folder; name one that has a config.json" in refusal(capsys, tmp_path / "absent", "me/m")
    assert "has no config.json; name a folder written by save_pretrained" in refusal(capsys, tmp_path, "me/m")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert "holds a 'bert' model, not a DINOv3 backbone" in refusal(capsys, tmp_path, "me/m")
    (tmp_path / "config.json").write_text("[")
    assert "config.json is no JSON" in refusal(capsys, tmp_path, "me/m")


def test_a_checkpoint(tmp_path, capsys, monkeypatch):
    checkpoint = tmp_path / "checkpoint-20"
    save_tiny_vit(checkpoint / "teacher")
    said = refusal(capsys, checkpoint, "me/m")
    assert (
        f"{checkpoint} is a checkpoint with the state of a training run; push its model, {checkpoint}/teacher" in said
    )
    monkeypatch.chdir(checkpoint)
    assert ". is a checkpoint with the state of a training run; push its model, teacher." in refusal(capsys, ".", "m")
    save_tiny_vit(tmp_path / "stock")
    (tmp_path / "stock" / "optimizer.pt").write_text("x")
    assert "stock holds optimizer.pt, the state of a training run; save the model alone" in refusal(
        capsys, tmp_path / "stock", "me/m"
    )


def test_weights_that_do_not_open(tmp_path, capsys):
    save_tiny_vit(tmp_path)
    weights, config = tmp_path / "model.safetensors", json.loads((tmp_path / "config.json").read_text())

    def refused_with(**fields):
        (tmp_path / "config.json").write_text(json.dumps(config | fields))
        return refusal(capsys, tmp_path, "me/m")

    assert "layer.2.attention.k_proj.weight and 16 more; save the model again" in refused_with(num_hidden_layers=3)
    assert "have another shape than config.json says in " in refused_with(intermediate_size=50)

    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = load_file(weights)
    save_file({**tensors, "head.weight": torch.zeros(3)}, weights, metadata={"format": "pt"})
    assert "have besides what config.json describes head.weight; save" in refusal(capsys, tmp_path, "me/m")
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "model.safetensors is no whole safetensors file" in refusal(capsys, tmp_path, "me/m")
    weights.unlink()
    assert "has no weights in model.safetensors; save the model with save_pretrained" in refusal(
        capsys, tmp_path, "me/m"
    )
    save_file(tensors, weights, metadata={"format": "pt"})
    (tmp_path / "extras.safetensors").write_bytes(b"x")
    assert "extras.safetensors is no whole safetensors file" in refusal(capsys, tmp_path, "me/m")


@pytest.mark.parametrize("name", ["me/a/b", "me/", "-m", "me/ü", "me/a--b", "a b"])
def test_names_that_are_none(tmp_path, capsys, name):
    save_tiny_vit(tmp_path)
    said = refusal(capsys, tmp_path, "--", name)
    assert f"{name!r} is no name of a repository; write OWNER/NAME" in said


def test_cards_and_licences(tmp_path, capsys):
    save_tiny_vit(tmp_path)
    assert "did you mean apache-2.0?" in refusal(capsys, tmp_path, "me/m", "--license", "apache2")
    assert "did you mean mit?" in refusal(capsys, tmp_path, "me/m", "--license", "MIT")
    (tmp_path / "README.md").write_text("---\nlicense: other\n---\n")
    assert "license: other in README.md needs a license_name" in refusal(capsys, tmp_path, "me/m")
    assert "README.md has been edited; write `license: mit` into its front matter" in refusal(
        capsys, tmp_path, "me/m", "--license", "mit"
    )
    (tmp_path / "README.md").write_text("---\ntags: 3\n---\n")
    assert "tags 3 of README.md is not a list of texts" in refusal(capsys, tmp_path, "me/m")
    (tmp_path / "README.md").write_bytes("Modèle".encode("latin-1"))
    assert "README.md is no text in UTF-8" in refusal(capsys, tmp_path, "me/m")


def test_no_network(tmp_path, capsys):
    save_tiny_vit(tmp_path)
    said = refusal(capsys, tmp_path, "me/m")
    assert "me/m could not be pushed to https://huggingface.co (" in said and "offline mode is enabled" in said
