"""Kind convnext."""

import re

import torch
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndNoAttention

from dinov3_hf.convert.dinov3_convnext import config_from_native, to_hf
from dinov3_hf.convert.lazy_tensor import LazyTensor, read_all
from dinov3_hf.models.dinov3_convnext.modeling_dinov3_convnext import DINOv3ConvNextBackbone, DINOv3ConvNextModel

from .compare import Comparison
from .io import Case


@torch.no_grad()
def check_convnext(case: Case, compare: Comparison) -> None:
    """Forwards in eval mode on every image, alone and in a list of crops; intermediate layers and feature maps."""
    config = config_from_native(case.constructor)
    tensors = read_all(to_hf({name: LazyTensor.of(each) for name, each in case.weights.items()}, config).tensors)
    model = DINOv3ConvNextModel(config).eval()
    model.load_state_dict(tensors)
    config.out_features = config.stage_names[1:]
    backbone = DINOv3ConvNextBackbone(config).eval()
    backbone.load_state_dict({name: each for name, each in tensors.items() if not name.startswith("layer_norm.")})

    images = [case.inputs[f"image_{tag}"] for tag in case.config["image_tags"]]
    for index, output in enumerate(model(images, output_hidden_states=True)):
        _check_features(compare, f"forward_features_list/{index}", output)
    for tag, image in zip(case.config["image_tags"], images, strict=True):
        output = model(image, output_hidden_states=True)
        _check_features(compare, f"forward_features/{tag}", output)
        compare.check(f"call/{tag}", output.pooler_output)
        _check_intermediate_layers(compare, tag, model, image)
        for index, feature_map in enumerate(backbone(image).feature_maps):
            compare.check(f"intermediate/{tag}/n4/norm_False/reshape_True/{index}/patches", feature_map)


def _check_features(compare: Comparison, prefix: str, output: BaseModelOutputWithPoolingAndNoAttention) -> None:
    """The native feature dictionary; a ConvNeXt has no storage tokens."""
    compare.check(f"{prefix}/x_norm_clstoken", output.pooler_output)
    compare.check(f"{prefix}/x_storage_tokens", output.last_hidden_state[:, 1:1])
    compare.check(f"{prefix}/x_norm_patchtokens", output.last_hidden_state[:, 1:])
    compare.check(f"{prefix}/x_prenorm", output.hidden_states[-1].flatten(2).transpose(1, 2))


def _check_intermediate_layers(compare: Comparison, tag: str, model: DINOv3ConvNextModel, image: torch.Tensor) -> None:
    """Every recorded selection; its options are in the names of the outputs."""
    pattern = re.compile(
        rf"intermediate/{re.escape(tag)}/n(?P<stages>\d+(_\d+)*)(?P<is_list>_list)?"
        r"/norm_(?P<norm>True|False)/reshape_(?P<reshape>True|False)/(?P<index>\d+)/(?P<what>patches|class)"
    )
    for name in compare.expected:
        match = pattern.fullmatch(name)
        if match is None:
            continue
        stages = [int(stage) for stage in match["stages"].split("_")]
        layers = model.get_intermediate_layers(
            image,
            stages if match["is_list"] else stages[0],
            reshape=match["reshape"] == "True",
            return_class_token=True,
            norm=match["norm"] == "True",
        )
        compare.check(name, layers[int(match["index"])][match["what"] == "class"])
