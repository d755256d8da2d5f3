"""What is computed without torch is what the models themselves have and do."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dinov3_hf.models.dinov3_convnext.configuration_dinov3_convnext import DINOv3ConvNextConfig
from dinov3_hf.models.dinov3_convnext.modeling_dinov3_convnext import DINOv3ConvNextModel
from dinov3_hf.models.dinov3_convnext.presets import PRESETS as CONVNEXT_PRESETS
from dinov3_hf.models.dinov3_vit.configuration_dinov3_vit import DINOv3ViTConfig
from dinov3_hf.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTModel
from dinov3_hf.models.dinov3_vit.presets import PRESETS as VIT_PRESETS
from dinov3_hf.plan.model_costs import ModelCost, convnext_cost, preset_costs, vit_cost

TINY_VIT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
TINY_CONVNEXT = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}


def check(cost: ModelCost, model: torch.nn.Module) -> None:
    assert cost.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    for side, flop in cost.flop.items():
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.empty(1, model.config.num_channels, side, side, device="meta"))
        assert flop == counter.get_total_flops()


@pytest.mark.parametrize("preset", [*VIT_PRESETS, *CONVNEXT_PRESETS])
def test_presets(preset):
    with torch.device("meta"):
        if preset in VIT_PRESETS:
            model = DINOv3ViTModel(DINOv3ViTConfig.from_preset(preset, attn_implementation="eager"))
        else:
            model = DINOv3ConvNextModel(DINOv3ConvNextConfig.from_preset(preset))
    check(preset_costs()[preset], model.eval())


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"norm_type": "rmsnorm", "layerscale_value": None, "proj_bias": False, "mlp_bias": False},
        {"use_gated_mlp": True, "key_bias": True, "num_channels": 1, "patch_size": 8, "num_register_tokens": 3},
        {"use_gated_mlp": True, "mlp_bias": False, "untie_cls_and_patch_norms": True},
        {"untie_global_and_local_cls_norm": True, "query_bias": False},
    ],
)
def test_options_of_the_vit(fields):
    with torch.device("meta"):
        model = DINOv3ViTModel(DINOv3ViTConfig(**TINY_VIT, **fields, attn_implementation="eager")).eval()
    check(vit_cost(TINY_VIT | fields), model)


@pytest.mark.parametrize("fields", [{}, {"layer_scale_init_value": None}, {"num_channels": 4}])
def test_options_of_the_convnext(fields):
    with torch.device("meta"):
        model = DINOv3ConvNextModel(DINOv3ConvNextConfig(**TINY_CONVNEXT, **fields)).eval()
    check(convnext_cost(TINY_CONVNEXT | fields), model)


def test_memory_of_the_weights():
    cost = preset_costs()["vit7b16"]
    assert cost.memory("float32") == 4 * cost.num_parameters == 2 * cost.memory("bfloat16")
