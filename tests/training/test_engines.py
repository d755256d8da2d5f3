"""Engines that a recipe may not have, and DeepSpeed configurations that do not go with it."""

import json

import pytest
import torch

from dinov3_hf.distributed.zero import ZeroEngine
from dinov3_hf.errors import ArgumentError
from dinov3_hf.training.engines import choose_engine
from tests.testing_utils import require_package


def written(tmp_path, config: object) -> str:
    path = tmp_path / "deepspeed.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    return str(path)


@require_package("deepspeed")
def test_auto_is_the_stage_of_the_configuration(tmp_path):
    for stage in (2, 3):
        path = written(tmp_path, {"zero_optimization": {"stage": stage}})
        assert choose_engine("auto", path, offload=False) == (f"zero{stage}", path)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ("{", "is no JSON file"),
        ([1], "is no JSON object"),
        ({}, "stage None; use 2 or 3"),
        ({"zero_optimization": None}, "stage None; use 2 or 3"),
        ({"zero_optimization": {"stage": 1}}, "stage 1; use 2 or 3"),
    ],
)
def test_configurations_that_name_no_engine_are_refused(tmp_path, config, says):
    with pytest.raises(ValueError, match=says):
        choose_engine("auto", written(tmp_path, config), offload=False)


@require_package("deepspeed")
def test_engines_and_configurations_that_differ_are_refused(tmp_path):
    path = written(tmp_path, {"zero_optimization": {"stage": 3}})
    with pytest.raises(ArgumentError, match="is for engine zero3, but the recipe says zero2"):
        choose_engine("zero2", path, offload=False)
    with pytest.raises(ArgumentError, match="is not read by engine fsdp2; set engine: zero3, or auto"):
        choose_engine("fsdp2", path, offload=False)


@require_package("deepspeed")
@pytest.mark.parametrize("engine", ["ddp", "zero2"])
def test_offloading_is_refused_where_it_is_not(engine):
    with pytest.raises(ValueError, match=f"offload_optimizer is not in engine {engine}; set engine: fsdp2 or zero3"):
        choose_engine(engine, None, offload=True)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"gradient_clipping": 1.0}, "sets gradient_clipping; leave it out and set max_grad_norm"),
        ({"bf16": {"enabled": True}}, "sets bf16; leave it out and set precision"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "set offload_optimizer of the recipe"),
    ],
)
def test_what_the_recipe_says_deepspeed_may_not(config, says):
    with pytest.raises(ValueError, match=says):
        ZeroEngine(3, config, torch.device("cpu"), 4, bf16=False, offload=False)


def test_what_deepspeed_leaves_to_the_trainer_is_left_out():
    given = {"bf16": {"enabled": "auto"}, "train_batch_size": "auto", "zero_optimization": {"offload_optimizer": None}}
    config = ZeroEngine(3, given, torch.device("cpu"), 4, bf16=False, offload=False).config
    assert config.keys().isdisjoint(["bf16", "train_batch_size"])
    assert "offload_optimizer" not in config["zero_optimization"]
