"""Placement on devices, offload, loading in other dtypes, quantised weights."""

import importlib
import json

import pytest
import torch
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.utils import compute_module_sizes
from safetensors.torch import load_file

from dinov3_hf import (
    DINOv3ConvNextConfig,
    DINOv3ConvNextModel,
    DINOv3ForPreTraining,
    DINOv3PreTrainingConfig,
    DINOv3ViTConfig,
    DINOv3ViTModel,
)
from tests.models.compositions import CONVNEXT
from tests.models.dinov3_vit.tiny import TINY, images, randomize, tiny_model
from tests.testing_utils import require_package

GB = 10**9
BLOCKS = {"DINOv3ViTEmbeddings", "DINOv3ViTLayer", "DINOv3ConvNextLayer"}


def tiny_models() -> dict[str, torch.nn.Module]:
    convnext = DINOv3ConvNextModel(DINOv3ConvNextConfig(**CONVNEXT))
    return {
        "vit": tiny_model(num_hidden_layers=6, untie_global_and_local_cls_norm=True),
        "vit_native": tiny_model(num_hidden_layers=6, norm_type="rmsnorm", untie_cls_and_patch_norms=True),
        "convnext": randomize(convnext).eval(),
    }


MODELS = tiny_models()


def num_bytes(model: torch.nn.Module) -> int:
    return sum(parameter.numel() * parameter.itemsize for parameter in model.parameters())


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("big")
    for name, model in MODELS.items():
        model.save_pretrained(folder / name)
    return folder


@torch.no_grad()
def features(model: torch.nn.Module) -> torch.Tensor:
    return model(images(2, 64, 48)).last_hidden_state


# ---- placement ---------------------------------------------------------------------------------------------------


def placement(preset: str, dtype: torch.dtype, max_memory: dict) -> dict:
    """Device -> bytes of weights that accelerate plans for it, on a model without memory of its own."""
    with torch.device("meta"):
        model = DINOv3ViTModel(DINOv3ViTConfig.from_preset(preset)).to(dtype)
    places = infer_auto_device_map(model, dict(max_memory), no_split_module_classes=model._no_split_modules)
    assert_whole_blocks(model, places)
    sizes = compute_module_sizes(model)
    return {device: sum(sizes[name] for name in places if places[name] == device) for device in places.values()}


def assert_whole_blocks(model: torch.nn.Module, places: dict) -> None:
    for name, module in model.named_modules():
        if type(module).__name__ in BLOCKS:
            inside = {key for key in places if key.startswith(f"{name}.")}
            assert not inside, f"{name} is split"


@pytest.mark.parametrize(
    ("preset", "dtype", "max_memory", "expected"),
    [
        ("vith16plus", torch.bfloat16, {0: 4 * GB}, {0: 1.68}),
        ("vith16plus", torch.float32, {0: 4 * GB}, {0: 3.36}),
        ("vit7b16", torch.bfloat16, {0: 16 * GB, 1: 16 * GB}, {0: 13.43}),
        ("vit7b16", torch.float32, {0: 16 * GB, 1: 16 * GB}, {0: 14.78, 1: 12.08}),
        ("vit7b16", torch.float32, {0: 24 * GB, 1: 24 * GB}, {0: 22.84, 1: 4.03}),
        ("vit7b16", torch.bfloat16, {0: 8 * GB, 1: 8 * GB}, {0: 7.39, 1: 6.04}),
        ("vit7b16", torch.bfloat16, {0: 4 * GB, "cpu": 64 * GB}, {0: 3.36, "cpu": 10.07}),
    ],
)
def test_plans(preset, dtype, max_memory, expected):
    found = {device: size / GB for device, size in placement(preset, dtype, max_memory).items()}
    assert found == pytest.approx(expected, abs=0.01)


def test_seven_billion_in_float32_are_too_many_for_one_device():
    assert "disk" in placement("vit7b16", torch.float32, {0: 24 * GB})


@pytest.mark.parametrize("name", MODELS)
def test_blocks_stay_whole_wherever_the_border_falls(name):
    model = MODELS[name]
    for percent in range(5, 100, 5):
        limits = {0: num_bytes(model) * percent // 100, 1: num_bytes(model)}
        places = infer_auto_device_map(model, limits, no_split_module_classes=list(model._no_split_modules))
        assert_whole_blocks(model, places)


def test_training_models_keep_the_blocks_of_their_backbone_whole():
    head = {"num_prototypes": 24, "bottleneck_dim": 8, "hidden_dim": 16}
    config = DINOv3PreTrainingConfig(backbone_config=TINY, dino_head=head, ibot_head=head)
    assert set(DINOv3ForPreTraining(config)._no_split_modules) == {"DINOv3ViTEmbeddings", "DINOv3ViTLayer"}


def test_every_argument_of_a_block_moves_to_its_device():
    """The second device is `meta`: an operation that mixes it with the CPU fails, as one that mixes two GPUs would."""
    model = tiny_model(num_hidden_layers=4)
    before = model.encode([images()], [None], collect=[1])
    places = {"embeddings": "cpu", "layer.0": "cpu", "layer.1": "cpu", "layer.2": "meta", "layer.3": "meta"}
    model = dispatch_model(model, {**places, "norm": "meta"}, main_device="cpu", force_hooks=True)
    encoded = model.encode([images(), images(3, 8, 8)], [None, None], collect=range(-1, 4))
    devices = [encoded.collected[block].device.type for block in range(-1, 4)]
    assert devices == ["cpu", "cpu", "cpu", "meta", "meta"]
    assert torch.equal(encoded.collected[1][: len(before.collected[1])], before.collected[1])
    assert {each.device.type for each in model.final_norm(encoded.hidden_states, encoded.groups)} == {"meta"}


# ---- loading -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device_map", ["auto", "balanced", "sequential", "cpu", {"": "cpu"}])
@pytest.mark.parametrize("name", MODELS)
def test_device_maps_that_hold_the_whole_model(folders, name, device_map):
    loaded = type(MODELS[name]).from_pretrained(folders / name, device_map=device_map)
    assert not any(parameter.is_meta for parameter in loaded.parameters())
    assert torch.equal(features(loaded), features(MODELS[name]))


def offloaded(folders, name: str, tmp_path, device_map="auto"):
    """A model of which less than half is in memory, the rest on disk."""
    limit = {"cpu": num_bytes(MODELS[name]) * 6 // 10}
    return type(MODELS[name]).from_pretrained(
        folders / name, device_map=device_map, max_memory=limit, offload_folder=tmp_path / "offload"
    )


@pytest.mark.parametrize("device_map", ["auto", "balanced"])
@pytest.mark.parametrize("name", MODELS)
def test_offload_to_disk_changes_nothing(folders, name, device_map, tmp_path):
    loaded = offloaded(folders, name, tmp_path, device_map)
    assert set(loaded.hf_device_map.values()) == {"cpu", "disk"}
    assert_whole_blocks(loaded, loaded.hf_device_map)
    assert torch.equal(features(loaded), features(MODELS[name]))
    assert torch.equal(features(loaded), features(MODELS[name]))  # what was fetched has gone again, and comes again


@pytest.mark.parametrize("name", MODELS)
def test_an_offloaded_model_is_saved_whole(folders, name, tmp_path):
    offloaded(folders, name, tmp_path).save_pretrained(tmp_path / "saved")
    for file in ("model.safetensors", *(["extras.safetensors"] if name == "vit" else [])):
        expected, found = load_file(folders / name / file), load_file(tmp_path / "saved" / file)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


def test_a_place_for_each_module(folders, tmp_path):
    places = {"embeddings": "cpu", "norm": "cpu", "local_cls_norm": "cpu"}
    places |= {f"layer.{block}": "disk" if block == 3 else "cpu" for block in range(6)}
    loaded = DINOv3ViTModel.from_pretrained(
        folders / "vit", device_map=places, offload_folder=tmp_path / "offload", low_cpu_mem_usage=True
    )
    on_meta = {name for name, parameter in loaded.named_parameters() if parameter.is_meta}
    assert on_meta and all(name.startswith("layer.3.") for name in on_meta)
    assert torch.equal(features(loaded), features(MODELS["vit"]))


@pytest.mark.parametrize("name", MODELS)
def test_dtypes(folders, name, tmp_path):
    model_class = type(MODELS[name])
    half = model_class.from_pretrained(folders / name, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    expected = features(MODELS[name])
    assert (features(half).float() - expected).norm() < 0.05 * expected.norm()  # images may stay float32
    half.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert {parameter.dtype for parameter in model_class.from_pretrained(tmp_path).parameters()} == {torch.bfloat16}
    wide = model_class.from_pretrained(tmp_path, dtype=torch.float32)
    assert {parameter.dtype for parameter in wide.parameters()} == {torch.float32}


# ---- quantised weights -------------------------------------------------------------------------------------------

# Library, configuration of transformers, how far features may be off.
QUANTISED = {
    "int8": ("torchao.quantization", "Int8WeightOnlyConfig", 0.03),
    "float8": ("torchao.quantization", "Float8WeightOnlyConfig", 0.06),
    "bitsandbytes": ("bitsandbytes", None, 0.03),
}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=require_package(QUANTISED[kind][0].split(".")[0])) for kind in QUANTISED]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", [{}, {"norm_type": "rmsnorm"}], ids=["stock", "native"])
def test_weights_of_eight_bits(kind, dtype, variant, tmp_path):
    from transformers import BitsAndBytesConfig, TorchAoConfig

    module, name, tolerance = QUANTISED[kind]
    quantisation = (
        BitsAndBytesConfig(load_in_8bit=True)
        if name is None
        else TorchAoConfig(vars(importlib.import_module(module))[name]())
    )
    model = tiny_model(hidden_size=64, intermediate_size=128, **variant)
    model.save_pretrained(tmp_path / "model")
    loaded = DINOv3ViTModel.from_pretrained(
        tmp_path / "model", dtype=dtype, device_map="cpu", quantization_config=quantisation
    )
    assert type(loaded.layer[0].mlp.up_proj.weight) is not torch.nn.Parameter
    expected, found = features(model), features(loaded)
    assert 0 < (found.float() - expected).norm() / expected.norm() < tolerance
    loaded.save_pretrained(tmp_path / "quantised")
    again = DINOv3ViTModel.from_pretrained(tmp_path / "quantised", device_map="cpu")
    assert torch.equal(features(again), found)


@require_package("torchao")
def test_convnext_with_weights_of_eight_bits(folders):
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    loaded = DINOv3ConvNextModel.from_pretrained(
        folders / "convnext", device_map="cpu", quantization_config=TorchAoConfig(Int8WeightOnlyConfig())
    )
    expected = features(MODELS["convnext"])
    assert 0 < (features(loaded) - expected).norm() / expected.norm() < 0.03
