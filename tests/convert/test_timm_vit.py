"""DINOv3 ViT: timm <-> Hub, against timm itself."""

import pytest
import torch

from dinov3_hf.convert.dinov3_vit import NATIVE_VIT, state_dict_to_native
from dinov3_hf.convert.lazy_tensor import LazyTensor, read_all
from dinov3_hf.convert.timm_vit import TIMM_VIT
from dinov3_hf.models.dinov3_vit.configuration_dinov3_vit import DINOv3ViTConfig
from dinov3_hf.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTModel
from dinov3_hf.models.dinov3_vit.rope import RopeParameters, rope_periods

timm = pytest.importorskip("timm")

from tests.convert.timm_folders import (  # noqa: E402
    assert_same_tensors,
    build_timm,
    lazy,
    open_timm,
    relative_difference,
    save_timm,
    shapes,
)

TINY = {"embed_dim": 48, "depth": 2, "num_heads": 3, "patch_size": 8}
NETWORKS = {
    "plain": ("vit_small_patch16_dinov3", {}),
    "biased": ("vit_small_patch16_dinov3_qkvb", {"num_reg_tokens": 2, "rope_temperature": 50.0}),
    "swiglu": ("vit_small_plus_patch16_dinov3", {"mlp_ratio": 2.5, "in_chans": 2}),
    "swiglu_biased": ("vit_huge_plus_patch16_dinov3_qkvb", {"num_reg_tokens": 0}),
}
RELEASED = {
    "vits16": "vit_small_patch16_dinov3",
    "vits16plus": "vit_small_plus_patch16_dinov3",
    "vitb16": "vit_base_patch16_dinov3",
    "vitl16": "vit_large_patch16_dinov3",
    "vith16plus": "vit_huge_plus_patch16_dinov3",
    "vit7b16": "vit_7b_patch16_dinov3",
}
IMAGE_STATISTICS = ([0.4, 0.5, 0.6], [0.2, 0.2, 0.2])


def images(config: DINOv3ViTConfig) -> torch.Tensor:
    return torch.randn(2, config.num_channels, 40, 56, generator=torch.Generator().manual_seed(1))


def tiny_model(**fields) -> DINOv3ViTModel:
    """A random model of ours that timm can hold; every parameter but the mask token is random."""
    sizes = {"hidden_size": 48, "intermediate_size": 112, "num_hidden_layers": 2, "num_attention_heads": 3}
    config = DINOv3ViTConfig(**{"patch_size": 8, "num_register_tokens": 2, **sizes, **fields})
    model = DINOv3ViTModel(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "embeddings.mask_token":
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def zeros(config: DINOv3ViTConfig) -> dict[str, LazyTensor]:
    """The Hub's tensors of a network, all zero, without the memory for them."""
    with torch.device("meta"):
        model = DINOv3ViTModel(config)
    return {name: LazyTensor.full(tensor.shape, 0, tensor.dtype) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", NETWORKS)
def test_our_network_from_timm_computes_what_timm_does(tmp_path, name):
    architecture, arguments = NETWORKS[name]
    theirs = build_timm(architecture, **{**TINY, **arguments})
    fields, tensors = save_timm(theirs, tmp_path)
    config = TIMM_VIT.config_from_json(fields, tensors)
    ours = DINOv3ViTModel(config).eval()
    ours.load_state_dict(read_all(TIMM_VIT.to_hf(tensors, config).tensors))
    with torch.no_grad():
        expected = theirs.forward_features(images(config))
        found = ours(images(config))
    assert relative_difference(found.last_hidden_state, expected) < 1e-5
    assert relative_difference(found.pooler_output, expected[:, 0]) < 1e-5


@pytest.mark.parametrize("name", NETWORKS)
def test_timm_to_hub_and_back_keeps_every_bit(tmp_path, name):
    architecture, arguments = NETWORKS[name]
    fields, tensors = save_timm(build_timm(architecture, **{**TINY, **arguments}), tmp_path)
    config = TIMM_VIT.config_from_json(fields, tensors)
    there = TIMM_VIT.to_hf(tensors, config)
    back = TIMM_VIT.from_hf({**there.tensors, **there.extras}, config)
    assert_same_tensors(back.tensors, tensors)
    assert not there.dropped and not there.differences and not back.differences
    assert set(there.derived) == set(back.dropped), "what timm does not hold is made up and taken away again"


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"use_gated_mlp": True, "hidden_act": "silu", "num_register_tokens": 0},
        {"query_bias": False, "value_bias": False, "rope_theta": 50.0, "num_channels": 1},
        {"layerscale_value": None},
    ],
    ids=["biased", "swiglu", "plain", "no_layer_scale"],
)
def test_timm_opens_our_folder_and_computes_the_same(tmp_path, fields):
    ours = tiny_model(**fields)
    there = TIMM_VIT.from_hf(lazy(ours.state_dict()), ours.config)
    written = TIMM_VIT.config_to_json(ours.config, there.tensors, *IMAGE_STATISTICS)
    theirs = open_timm(tmp_path / "timm", written, there.tensors)
    with torch.no_grad():
        expected = ours(images(ours.config)).last_hidden_state
        found = theirs.forward_features(images(ours.config))
    assert relative_difference(found, expected) < 1e-5
    torch.testing.assert_close(
        theirs.rope.periods, rope_periods(RopeParameters.from_config(ours.config)), rtol=0, atol=0
    )

    config = TIMM_VIT.config_from_json(written, there.tensors)
    back = TIMM_VIT.to_hf(there.tensors, config)
    assert_same_tensors(back.tensors, lazy(ours.state_dict()))
    for name in ("hidden_size", "intermediate_size", "num_attention_heads", "patch_size", "rope_theta", "query_bias"):
        assert config.__dict__[name] == ours.config.__dict__[name], name
    assert (config.layerscale_value is None) == (ours.config.layerscale_value is None)


def test_our_config_json_has_the_fields_that_timm_writes(tmp_path):
    theirs = build_timm("vit_small_patch16_dinov3", **TINY)
    fields, tensors = save_timm(theirs, tmp_path)
    config = TIMM_VIT.config_from_json(fields, tensors)
    written = TIMM_VIT.config_to_json(config, tensors, *IMAGE_STATISTICS)
    assert written.keys() == fields.keys()
    # The tag and the licence are those of released weights.
    assert written["pretrained_cfg"].keys() == fields["pretrained_cfg"].keys() - {"tag", "license"}
    same = ("input_size", "first_conv", "classifier", "crop_pct", "interpolation", "num_classes")
    assert {name: written["pretrained_cfg"][name] for name in same} == {
        name: fields["pretrained_cfg"][name] for name in same
    }
    assert written["pretrained_cfg"]["mean"] == IMAGE_STATISTICS[0]


@pytest.mark.parametrize(
    ("preset", "biased"),
    [(preset, biased) for preset in RELEASED for biased in (False, True) if not (preset == "vit7b16" and biased)],
)
def test_released_sizes_have_the_names_and_shapes_of_timm(preset, biased):
    config = DINOv3ViTConfig.from_preset(preset, untie_global_and_local_cls_norm=False)
    tensors = zeros(config)
    if biased:
        name = "layer.3.attention.v_proj.bias"
        tensors[name] = LazyTensor.full(tensors[name].shape, 0.5, torch.float32)
    converted = TIMM_VIT.from_hf(tensors, config)
    architecture = RELEASED[preset] + ("_qkvb" if biased else "")
    with torch.device("meta"):
        theirs = timm.create_model(architecture)
    assert shapes(converted.tensors) == shapes(theirs.state_dict())
    written = TIMM_VIT.config_to_json(config, converted.tensors, *IMAGE_STATISTICS)
    assert written["architecture"] == architecture and "model_args" not in written
    assert TIMM_VIT.architecture(config) == RELEASED[preset]

    # A bare file of a released size needs no config.json.
    read = TIMM_VIT.read_config(converted.tensors)
    assert shapes(TIMM_VIT.to_hf(converted.tensors, read).tensors) == shapes(tensors)
    assert read.num_attention_heads == config.num_attention_heads


def test_a_size_that_timm_has_no_name_for_is_described_by_arguments(tmp_path):
    config = DINOv3ViTConfig.from_preset("vitl16plus")
    converted = TIMM_VIT.from_hf(zeros(config), config)
    written = TIMM_VIT.config_to_json(config, converted.tensors, *IMAGE_STATISTICS)
    with torch.device("meta"):
        theirs = timm.create_model(written["architecture"], **written["model_args"])
    assert shapes(converted.tensors) == shapes(theirs.state_dict())
    assert TIMM_VIT.architecture(config) is None


def test_zero_biases_come_and_go_as_in_the_file_they_came_from():
    config = DINOv3ViTConfig.from_preset("vits16")
    ours = zeros(config)
    biases = {name for name in ours if name.endswith(("q_proj.bias", "v_proj.bias"))}

    plain = TIMM_VIT.from_hf(ours, config)
    assert biases <= set(plain.dropped) and not any("q_bias" in name for name in plain.tensors)
    again = TIMM_VIT.to_hf(plain.tensors, config)
    assert biases <= set(again.derived)
    assert_same_tensors(again.tensors, ours)

    biased = plain.tensors | {
        f"blocks.{i}.attn.{part}_bias": LazyTensor.full((384,), 0, torch.float32) for i in range(12) for part in "qv"
    }
    there = TIMM_VIT.to_hf(biased, TIMM_VIT.read_config(biased))
    assert set(there.extras) == {"timm.blocks.0.attn.q_bias"} and not biases & set(there.derived)
    assert_same_tensors(TIMM_VIT.from_hf({**there.tensors, **there.extras}, config).tensors, biased)


def test_a_classifier_is_kept_for_the_way_back(tmp_path):
    fields, tensors = save_timm(build_timm("vit_small_patch16_dinov3", num_classes=5, **TINY), tmp_path)
    config = TIMM_VIT.config_from_json(fields, tensors)
    there = TIMM_VIT.to_hf(tensors, config)
    assert set(there.extras) == {"timm.head.weight", "timm.head.bias"}
    back = TIMM_VIT.from_hf({**there.tensors, **there.extras}, config)
    assert_same_tensors(back.tensors, tensors)
    assert TIMM_VIT.config_to_json(config, back.tensors, *IMAGE_STATISTICS)["num_classes"] == 5


def test_what_acts_in_training_only_is_named_with_what_is_lost():
    model = tiny_model(untie_global_and_local_cls_norm=True)
    with torch.no_grad():
        model.embeddings.mask_token.fill_(0.5)
    dropped = TIMM_VIT.from_hf(lazy(model.state_dict()), model.config).dropped
    assert set(dropped) == {"embeddings.mask_token", "local_cls_norm.weight", "local_cls_norm.bias"}
    assert all("values are lost" in reason for reason in dropped.values())


def test_rounded_periods_are_a_difference_of_a_stated_size():
    model = tiny_model(rope_periods_dtype="bfloat16")
    (line,) = TIMM_VIT.from_hf(lazy(model.state_dict()), model.config).differences
    assert "bfloat16" in line and "0.00" in line


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layer_norm_eps": 1e-6}, "layer_norm_eps = 1e-06"),
        ({"norm_type": "rmsnorm"}, "norm_type = 'rmsnorm'"),
        ({"untie_cls_and_patch_norms": True}, "untie_cls_and_patch_norms"),
        ({"proj_bias": False}, "proj_bias = False"),
        ({"value_bias": False}, "value_bias = False"),
        ({"hidden_act": "silu"}, "hidden_act"),
        ({"rope_dtype": "bfloat16"}, "rope_dtype"),
        ({"key_bias": True}, "k_proj.bias is not zero"),
    ],
)
def test_networks_that_timm_has_not_are_refused(fields, message):
    model = tiny_model(**fields)
    with pytest.raises(ValueError, match=message):
        TIMM_VIT.from_hf(lazy(model.state_dict()), model.config)


def test_a_key_bias_of_zero_is_none():
    model = tiny_model(key_bias=True)
    tensors = lazy(model.state_dict())
    biases = {name: LazyTensor.full((48,), 0, torch.float32) for name in tensors if name.endswith("k_proj.bias")}
    assert biases.keys() <= TIMM_VIT.from_hf(tensors | biases, model.config).dropped.keys()


def test_folders_and_files_that_are_no_dinov3_are_refused(tmp_path):
    fields, tensors = save_timm(build_timm("vit_small_patch16_dinov3", **TINY), tmp_path)
    with pytest.raises(ValueError, match="does not tell the number of heads"):
        TIMM_VIT.read_config(tensors)
    with pytest.raises(ValueError, match="'vit_small_patch16_lingbot' is not one of"):
        TIMM_VIT.config_from_json({**fields, "architecture": "vit_small_patch16_lingbot"}, tensors)
    for architecture in (None, 3, "convnext_tiny"):
        with pytest.raises(ValueError, match="is not one of the DINOv3 models vit_small_patch16_dinov3, "):
            TIMM_VIT.config_from_json({**fields, "architecture": architecture}, tensors)
    with pytest.raises(ValueError, match=r"have rope_grid_offset = 0\.5"):
        TIMM_VIT.config_from_json({**fields, "model_args": {"rope_grid_offset": 0.5}}, tensors)
    for args, message in (
        (["depth"], "are no arguments by name"),
        ({"num_heads": "three"}, "num_attention_heads 'three' is not an integer"),
        ({"num_heads": 3, "rope_temperature": "hot"}, "rope_temperature = 'hot'; it is a positive number"),
        ({"num_heads": 3, "init_values": True}, "init_values = True; it is a positive number"),
    ):
        with pytest.raises(ValueError, match=message):
            TIMM_VIT.config_from_json({**fields, "model_args": args}, tensors)
    incomplete = {name: tensor for name, tensor in tensors.items() if name != "cls_token"}
    with pytest.raises(ValueError, match="has no cls_token"):
        TIMM_VIT.config_from_json(fields, incomplete)
    config = TIMM_VIT.config_from_json(fields, tensors)
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.gate is not a parameter"):
        TIMM_VIT.to_hf({**tensors, "blocks.0.attn.gate": tensors["cls_token"]}, config)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"input_size": [3, 256, 256]}, 256),
        ({"input_size": [3, 256, 128]}, [256, 128]),
        ({"input_size": [3]}, 224),
        ({"input_size": "large"}, 224),
        (None, 224),
    ],
)
def test_the_image_size_is_read_where_there_is_one(tmp_path, settings, expected):
    fields, tensors = save_timm(build_timm("vit_small_patch16_dinov3", **TINY), tmp_path)
    config = TIMM_VIT.config_from_json({**fields, "pretrained_cfg": settings}, tensors)
    assert config.image_size == expected
    written = TIMM_VIT.config_to_json(config, tensors, *IMAGE_STATISTICS)
    assert written["pretrained_cfg"]["input_size"][1:] == (expected if expected == [256, 128] else [expected] * 2)


def test_formats_are_told_apart_by_names(tmp_path):
    _, tensors = save_timm(build_timm("vit_small_patch16_dinov3", **TINY), tmp_path)
    model = tiny_model()
    native = state_dict_to_native(model.state_dict(), model.config)
    dinov2 = timm.create_model("vit_small_patch14_reg4_dinov2", depth=1).state_dict()
    assert [TIMM_VIT.recognises(names) for names in (tensors, native, dinov2)] == [True, False, False]
    assert not NATIVE_VIT.recognises(tensors)
