"""Parameter groups against the original's multipliers, for native names and for ours."""

import json
import re

import pytest
import torch
from torch import nn
from transformers import DINOv3ConvNextConfig, DINOv3ConvNextModel

from dinov3_hf.models.dinov3_convnext.configuration_dinov3_convnext import DINOv3ConvNextConfig as OurConvNextConfig
from dinov3_hf.models.dinov3_convnext.modeling_dinov3_convnext import DINOv3ConvNextModel as OurConvNextModel
from dinov3_hf.models.dinov3_pretraining.prototype_head import PrototypeHead
from dinov3_hf.models.dinov3_vit.configuration_dinov3_vit import DINOv3ViTConfig
from dinov3_hf.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTModel
from dinov3_hf.training.param_groups import ParameterSettings, count_blocks, parameter_groups, parameter_settings
from tests.testing_utils import FIXTURES

REFERENCE = json.loads((FIXTURES / "g_param_groups" / "param_groups.json").read_text())
CASES = [name for name in REFERENCE if name != "note"]


def settings_of(case: str) -> dict[str, float]:
    settings = REFERENCE[case]["settings"]
    return {
        "layerwise_lr_decay": settings["lr_decay_rate"],
        "patch_embed_lr_mult": settings["patch_embed_lr_mult"],
    }


def expected_settings(case: str, native_name: str) -> ParameterSettings:
    group = REFERENCE[case]["groups"][native_name]
    rate = "last_layer_lr" if group["is_last_layer"] else "lr"
    return ParameterSettings(group["lr_multiplier"], group["wd_multiplier"], rate)


@pytest.mark.parity
@pytest.mark.parametrize("case", CASES)
def test_native_names_equal_the_reference(case):
    names = list(REFERENCE[case]["groups"])
    num_blocks = count_blocks(names)
    for name in names:
        assert parameter_settings(name, num_blocks, **settings_of(case)) == expected_settings(case, name), name


def multipliers_by_name(module: nn.Module, **settings: float) -> dict[str, ParameterSettings]:
    """What each named parameter got, through the groups that an optimizer sees."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return {
        names[id(parameter)]: ParameterSettings(*(group[key] for key in ParameterSettings._fields))
        for group in parameter_groups({"module": module}, **settings)
        for parameter in group["params"]
    }


def tiny_vit() -> DINOv3ViTModel:
    config = DINOv3ViTConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_register_tokens=2,
        key_bias=True,
        untie_cls_and_patch_norms=True,
        untie_global_and_local_cls_norm=True,
    )
    return DINOv3ViTModel(config)


VIT_NATIVE_NAMES = [
    (r"embeddings\.(cls_token|mask_token)", r"\1"),
    (r"embeddings\.register_tokens", r"storage_tokens"),
    (r"embeddings\.patch_embeddings\.", r"patch_embed.proj."),
    (r"layer\.(\d+)\.attention\.[qkv]_proj\.", r"blocks.\1.attn.qkv."),
    (r"layer\.(\d+)\.attention\.o_proj\.", r"blocks.\1.attn.proj."),
    (r"layer\.(\d+)\.mlp\.up_proj\.", r"blocks.\1.mlp.fc1."),
    (r"layer\.(\d+)\.mlp\.down_proj\.", r"blocks.\1.mlp.fc2."),
    (r"layer\.(\d+)\.layer_scale(\d)\.lambda1", r"blocks.\1.ls\2.gamma"),
    (r"layer\.(\d+)\.(norm\d)\.", r"blocks.\1.\2."),
]


@pytest.mark.parity
def test_our_vit_gets_the_multipliers_of_its_native_names():
    case = "vit_depth3_default"
    ours = multipliers_by_name(tiny_vit(), **settings_of(case))
    seen = set()
    for name, settings in ours.items():
        native = name
        for pattern, replacement in VIT_NATIVE_NAMES:
            native = re.sub(f"^{pattern}", replacement, native)
        assert settings == expected_settings(case, native), f"{name} -> {native}"
        seen.add(native)
    assert seen == set(REFERENCE[case]["groups"])


@pytest.mark.parity
def test_our_head_gets_the_multipliers_of_its_native_names():
    case = "dino_head_default"
    head = PrototypeHead(16, num_prototypes=8, bottleneck_dim=4, hidden_dim=8, num_layers=3, mlp_bias=True)
    ours = multipliers_by_name(head, **settings_of(case))
    assert ours == {name: expected_settings(case, name) for name in REFERENCE[case]["groups"]}


@pytest.mark.parity
def test_convnext_has_no_layer_decay_and_decays_the_norms_between_its_stages():
    config = DINOv3ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1])
    ours = multipliers_by_name(DINOv3ConvNextModel(config), **settings_of("convnext_default"))
    assert {settings.lr_multiplier for settings in ours.values()} == {1.0}
    decayed = {name for name, settings in ours.items() if settings.weight_decay_multiplier == 1}
    # What is decayed in the original, said for the names of transformers: every weight but the norms inside blocks and
    # the final one.
    names = [name.removeprefix("model.") for name in ours]
    expected = {
        name for name in names if name.endswith("weight") and "layer_norm" not in name and not name.endswith("gamma")
    }
    assert {name.removeprefix("model.") for name in decayed} == expected
    assert any(re.search(r"downsample_layers\.0\.weight$", name) for name in decayed)


def test_same_settings_share_one_group_and_frozen_parameters_are_left_out():
    vit = tiny_vit()
    vit.embeddings.patch_embeddings.requires_grad_(False)
    head = nn.ModuleDict({"mlp": nn.Linear(4, 4), "last_layer": nn.Linear(4, 2, bias=False)})
    groups = parameter_groups(
        {"backbone": vit, "dino_head": head, "ibot_head": head}, layerwise_lr_decay=0.9, patch_embed_lr_mult=0.2
    )
    keys = [tuple(group[key] for key in ParameterSettings._fields) for group in groups]
    assert len(set(keys)) == len(keys)
    # 3 blocks x {decayed, not}, the tokens, {final norms, head biases}, head weights, last layers.
    assert len(groups) == 10
    parameters = [id(parameter) for group in groups for parameter in group["params"]]
    frozen = {id(parameter) for parameter in vit.embeddings.patch_embeddings.parameters()}
    assert not frozen & set(parameters)
    torch.optim.AdamW(parameter_groups({"backbone": vit, "dino_head": head}), lr=0.0)  # accepts the groups


def test_names_of_compiled_and_wrapped_blocks_keep_their_layer():
    settings = parameter_settings("layer.1._orig_mod.mlp.up_proj.weight", 3, layerwise_lr_decay=0.5)
    assert settings.lr_multiplier == 0.25


def rates_by_name(module: nn.Module) -> dict[str, str]:
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    groups = parameter_groups({"backbone": module}, rates={"backbone": "backbone_lr"})
    return {names[id(parameter)]: group["rate"] for group in groups for parameter in group["params"]}


def test_a_backbone_that_waits_for_its_heads_keeps_the_rate_of_what_reads_pixels():
    vit = rates_by_name(tiny_vit())
    assert {name for name, rate in vit.items() if rate == "lr"} == {
        "embeddings.patch_embeddings.weight",
        "embeddings.patch_embeddings.bias",
    }
    convnext = rates_by_name(OurConvNextModel(OurConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1])))
    assert {name for name, rate in convnext.items() if rate == "lr"} == {
        f"stages.0.downsample_layers.{i}.{kind}" for i in (0, 1) for kind in ("weight", "bias")
    }
    assert set(vit.values()) == set(convnext.values()) == {"lr", "backbone_lr"}


def test_rates_by_sub_module_leave_heads_alone():
    head = nn.ModuleDict({"mlp": nn.Linear(4, 4), "last_layer": nn.Linear(4, 2, bias=False)})
    groups = parameter_groups({"backbone": tiny_vit(), "dino_head": head}, rates={"backbone": "backbone_lr"})
    rate_of = {id(parameter): group["rate"] for group in groups for parameter in group["params"]}
    assert [rate_of[id(p)] for p in head.parameters()] == ["lr", "lr", "last_layer_lr"]
