"""`import dinov3_hf`: its public names, what it costs, and what it registers."""

import ast
from importlib.resources import files
from pathlib import Path

import pytest

import dinov3_hf
from tests.testing_utils import run_python


@pytest.mark.parametrize("name", dinov3_hf.__all__)
def test_public_names_come_from_their_modules(name):
    value = getattr(dinov3_hf, name)
    assert value.__name__ == name
    assert value.__module__ == dinov3_hf._MODULES[name]
    assert name in dir(dinov3_hf)


def test_the_three_lists_of_public_names_agree():
    tree = ast.parse(Path(dinov3_hf.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    for_type_checkers = {alias.name: node.module for node in block.body for alias in node.names}
    assert for_type_checkers == dinov3_hf._MODULES
    assert dinov3_hf.__all__ == sorted(dinov3_hf._MODULES)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'dinov3_hf' has no attribute 'DINOv4'"):
        dinov3_hf.DINOv4  # noqa: B018


def test_types_travel_with_the_package():
    assert (files("dinov3_hf") / "py.typed").is_file()


def test_import_is_cheap():
    """Beyond torch and the stock modeling code it takes under 0.3 s, and none of the extras."""
    program = """
import sys, time
import torch, transformers.models.dinov3_vit.modeling_dinov3_vit

before, start = set(sys.modules), time.process_time()
import dinov3_hf
dinov3_hf.DINOv3ViTModel
seconds = time.process_time() - start
assert seconds < 0.3, seconds
extras = {"sklearn", "datasets", "deepspeed", "peft", "tensorboard", "timm", "typer", "rich"}
imported = {name.partition(".")[0] for name in set(sys.modules) - before}
assert "dinov3_hf" in imported and not imported & extras, imported & extras
"""
    done = run_python("-c", program)
    assert done.returncode == 0, done.stderr


def test_import_registers_ours_and_leaves_stock_classes_alone():
    program = """
from transformers import AutoConfig, AutoModel
import transformers

stock = AutoConfig.for_model("dinov3_vit")
import dinov3_hf
assert type(AutoConfig.for_model("dinov3_vit")) is type(stock)
assert AutoModel._model_mapping[type(stock)] is transformers.DINOv3ViTModel
assert type(AutoConfig.for_model("dinov3_vit_native")).__module__.startswith("dinov3_hf.")
dinov3_hf.register_auto_classes(override_native=True)
assert type(AutoConfig.for_model("dinov3_vit")) is dinov3_hf.DINOv3ViTConfig
"""
    done = run_python("-c", program)
    assert done.returncode == 0, done.stderr
