"""A teacher of a distillation that lies on the Hub."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.hub.server import Repository
from tests.testing_utils import save_tiny_vit

READ = """
from dinov3_hf.training.distillation_teacher import load_teacher, read_teacher
try:
    teacher = load_teacher(read_teacher("me/tiny"), bf16=False)
    print(teacher.description.source, sorted(teacher.description.heads), sum(p.numel() for p in teacher.parameters()))
except (OSError, ValueError) as error:
    print(type(error).__name__, error, sep=": ")
"""
HEAD = {"num_prototypes": 8, "bottleneck_dim": 4, "hidden_dim": 4, "num_layers": 1}


def publish(hub, folder: Path) -> None:
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    hub.repositories["me/tiny"] = Repository(private=False, branches={"main": [files]})


@pytest.mark.parametrize("with_heads", [False, True])
def test_heads_come_along(with_heads, hub, client, tmp_path):
    size = sum(p.numel() for p in save_tiny_vit(tmp_path / "m").parameters())
    if with_heads:
        tensors = {"mlp.weight": (4, 24), "mlp.bias": (4,), "last_layer.weight": (8, 4)}
        save_file(
            {f"dino_head.{name}": torch.randn(shape) for name, shape in tensors.items()},
            tmp_path / "m" / "heads.safetensors",
            metadata={"dino_head": json.dumps(HEAD)},
        )
        size += 4 * 24 + 4 + 8 * 4
    publish(hub, tmp_path / "m")
    heads = "['dino_head']" if with_heads else "[]"
    assert client.python(READ) == f"me/tiny {heads} {size}\n"


def test_a_hub_that_is_gone(hub, client, tmp_path):
    """Config and weights are in the cache; not to know of heads would change what is learned."""
    save_tiny_vit(tmp_path / "m")
    publish(hub, tmp_path / "m")
    assert client.python(READ).startswith("me/tiny []")
    hub.fail("file", 501, times=1000)
    printed = client.python(READ)
    assert printed.startswith(
        "FileNotFoundError: whether the teacher me/tiny has prototype heads is not known, the Hub"
    )


def test_a_pickle_is_not_read(hub, client, tmp_path):
    save_tiny_vit(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    (tmp_path / "m" / "pytorch_model.bin").write_bytes(b"never opened")
    publish(hub, tmp_path / "m")
    printed = client.python(READ)
    assert printed.startswith("FileNotFoundError: weights of the model me/tiny cannot be had as safetensors: ")
    assert printed.count("\n") == 1
    assert not list(client.forks.folder.rglob("pytorch_model.bin"))
