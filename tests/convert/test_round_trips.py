"""Files there and back: what a format can hold comes back with the same bits, and every tensor is accounted for."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, safe_open, save_file

from dinov3_hf.convert.checkpoint import load_model, read_checkpoint
from dinov3_hf.convert.dinov3_vit import ARCHITECTURE_FIELDS, config_from_native, state_dict_from_native
from dinov3_hf.convert.writing import write_checkpoint
from dinov3_hf.models.dinov3_convnext.modeling_dinov3_convnext import DINOv3ConvNextModel
from dinov3_hf.models.dinov3_vit.image_processing import build_image_processor
from dinov3_hf.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTModel
from dinov3_hf.models.dinov3_vit.rope import RopeParameters, rope_periods
from tests.convert.files import (
    CONVNEXT_CASES,
    VIT_CASES,
    assert_same_bits,
    converted,
    heads,
    native_weights,
    prefixed,
    read_native,
    tiny_native,
)
from tests.models.dinov3_vit.tiny import NATIVE_VARIANTS, STOCK_VARIANTS, images, tiny_model
from tests.reference.io import Case
from tests.testing_utils import REPOSITORY, run_python

WIDTH = 32
VARIANTS = {
    name: {**fields, "layer_norm_eps": 1e-5}
    for name, fields in (STOCK_VARIANTS | NATIVE_VARIANTS).items()
    if name != "few_biases"  # the original has no such network
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", [*VIT_CASES, *CONVNEXT_CASES], ids=lambda case: case.name)
def test_native_files_come_back(case, dtype, tmp_path):
    native = {name: tensor.to(dtype) for name, tensor in native_weights(case).items()}
    torch.save(native, tmp_path / "native.pth")
    checkpoint, there = converted(tmp_path / "native.pth", tmp_path / "hub", "hf", max_shard_size=20_000)
    _, back = converted(tmp_path / "hub", tmp_path / "back.pth", "native")
    assert_same_bits(read_native(tmp_path / "back.pth"), native)
    assert_same_bits(torch.load(tmp_path / "back.pth", weights_only=True, mmap=True), native)

    assert checkpoint.num_source_tensors == len(native)
    assert not there.dropped and not there.derived
    # Without registers their parameter is empty in the folder, and absent in the original.
    no_registers = checkpoint.config.model_type.startswith("dinov3_vit") and "storage_tokens" not in native
    assert list(back.dropped) == no_registers * ["embeddings.register_tokens"]
    # Every name is kept, or dropped because the way back derives it.
    assert checkpoint.dropped.keys() == back.derived.keys()
    assert set(checkpoint.dropped) <= set(native)
    assert len(list((tmp_path / "hub").glob("model-*.safetensors"))) > 1


@pytest.mark.parametrize("case", [*VIT_CASES, *CONVNEXT_CASES], ids=lambda case: case.name)
def test_the_folder_opens_and_holds_the_network(case, tmp_path):
    native = native_weights(case)
    torch.save(native, tmp_path / "native.pth")
    checkpoint, _ = converted(tmp_path / "native.pth", tmp_path / "hub", "hf")
    model_class = DINOv3ConvNextModel if case in CONVNEXT_CASES else DINOv3ViTModel
    opened, loading = model_class.from_pretrained(tmp_path / "hub", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["mismatched_keys"]
    assert all(key.startswith("native.") for key in loading["unexpected_keys"])
    state = load_model(checkpoint).state_dict()
    assert_same_bits(opened.state_dict(), state)
    if case in VIT_CASES:
        assert_same_bits(state, state_dict_from_native(native, config_from_native(Case(case).constructor)))


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_folders_come_back(fields, tmp_path):
    model = tiny_model(**fields)
    model.save_pretrained(tmp_path / "ours")
    _, there = converted(tmp_path / "ours", tmp_path / "native.pth", "native")
    again, _ = converted(tmp_path / "native.pth", tmp_path / "back", "hf")
    ours = DINOv3ViTModel.from_pretrained(tmp_path / "ours")
    back = DINOv3ViTModel.from_pretrained(tmp_path / "back")
    assert_same_bits(back.state_dict(), ours.state_dict())
    # What a native file has no place for is said.
    told = {line.split(" = ")[0] for line in there.differences}
    assert told == {"rope_normalize_coords", "rope_dtype"} & fields.keys()
    for name in set(ARCHITECTURE_FIELDS) - told:
        assert again.config.__dict__[name] == model.config.__dict__[name], name


@pytest.mark.parametrize("name", ["key_bias", "swiglu_without_qkv_bias", "local_cls_norm", "cls_norm"])
def test_the_outputs_are_those_of_the_first_model(name, tmp_path):
    model = tiny_model(**VARIANTS[name])
    model.save_pretrained(tmp_path / "ours")
    converted(tmp_path / "ours", tmp_path / "native.pth", "native")
    back = load_model(read_checkpoint(tmp_path / "native.pth"))
    assert torch.equal(back(images()).last_hidden_state, model(images()).last_hidden_state)


def test_rounded_periods_are_kept_and_their_error_is_named(tmp_path):
    native = tiny_native()
    periods = native["rope_embed.periods"]
    native["rope_embed.periods"] = periods.bfloat16().float()
    torch.save(native, tmp_path / "native.pth")
    checkpoint, _ = converted(tmp_path / "native.pth", tmp_path / "hub", "hf")
    error = ((native["rope_embed.periods"] - periods) / periods).abs().max().item()
    assert f"rounded, by up to {error:.2g} of their value" in checkpoint.differences[0]
    assert transformers.AutoConfig.from_pretrained(tmp_path / "hub").model_type == "dinov3_vit"

    exact = DINOv3ViTModel.from_pretrained(tmp_path / "hub", rope_periods_dtype="bfloat16")
    assert torch.equal(rope_periods(exact.rope_parameters), native["rope_embed.periods"])
    assert exact.config.to_dict()["model_type"] == "dinov3_vit_native"
    plain = DINOv3ViTModel.from_pretrained(tmp_path / "hub")
    assert torch.equal(rope_periods(plain.rope_parameters), periods)
    assert not torch.equal(exact(images()).last_hidden_state, plain(images()).last_hidden_state)

    converted(tmp_path / "hub", tmp_path / "back.pth", "native")
    assert_same_bits(read_native(tmp_path / "back.pth"), native)
    # A folder that says so itself needs no extras.
    exact.save_pretrained(tmp_path / "exact")
    converted(tmp_path / "exact", tmp_path / "from_exact.pth", "native")
    assert torch.equal(read_native(tmp_path / "from_exact.pth")["rope_embed.periods"], native["rope_embed.periods"])


@pytest.mark.parametrize("head_dim", [24, 32, 64, 128])
def test_rounded_periods_are_recognised_at_every_width(head_dim):
    rounded = RopeParameters(head_dim, 100.0, None, None, "separate", torch.float32, torch.bfloat16)
    computed_as_in_training = 100.0 ** (2 * torch.arange(head_dim // 4, dtype=torch.bfloat16) / (head_dim // 2))
    assert torch.equal(rope_periods(rounded), computed_as_in_training.float())


def test_extras_of_another_network_are_refused(tmp_path):
    native = tiny_native()
    native["rope_embed.periods"] = native["rope_embed.periods"].bfloat16()
    torch.save(native, tmp_path / "native.pth")
    converted(tmp_path / "native.pth", tmp_path / "hub", "hf")
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    (tmp_path / "hub" / "config.json").write_text(json.dumps(config | {"rope_theta": 50.0}))
    with pytest.raises(ValueError, match=r"extras.safetensors are not the RoPE periods that config.json describes"):
        converted(tmp_path / "hub", tmp_path / "back.pth", "native")
    save_file({"native.blocks.7.attn.k.bias": torch.ones(WIDTH)}, tmp_path / "hub" / "extras.safetensors")
    with pytest.raises(ValueError, match=r"native.blocks.7.attn.k.bias in extras.safetensors belongs to no tensor"):
        converted(tmp_path / "hub", tmp_path / "back.pth", "native")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_checkpoints_keep_their_heads(dtype, tmp_path):
    network = {
        name: tensor.to(dtype) for name, tensor in (prefixed("backbone.", tiny_native()) | heads(WIDTH)).items()
    }
    torch.save({"teacher": network}, tmp_path / "native.pth")
    checkpoint, _ = converted(tmp_path / "native.pth", tmp_path / "hub", "hf")
    assert checkpoint.branch == "teacher"
    assert checkpoint.num_source_tensors == len(network)
    assert_same_bits(load_file(tmp_path / "hub" / "heads.safetensors"), {name: network[name] for name in heads(WIDTH)})
    with safe_open(tmp_path / "hub" / "heads.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["dino_head"]) == {
            "num_prototypes": 40, "bottleneck_dim": 8, "hidden_dim": 24, "num_layers": 3, "mlp_bias": True,
        }  # fmt: skip
        assert json.loads(file.metadata()["ibot_head"]) == {
            "num_prototypes": 30, "bottleneck_dim": 6, "hidden_dim": 20, "num_layers": 2, "mlp_bias": False,
        }  # fmt: skip
    converted(tmp_path / "hub", tmp_path / "back.pth", "native")
    back = read_native(tmp_path / "back.pth")
    assert back.keys() == {"teacher"}
    assert_same_bits(back["teacher"], network)


def test_a_folder_of_the_hub_is_cut_anew(tmp_path):
    tiny_model(untie_global_and_local_cls_norm=True).save_pretrained(tmp_path / "ours")
    converted(tmp_path / "ours", tmp_path / "again", "hf", max_shard_size=20_000)
    for name in ("model.safetensors", "extras.safetensors"):
        found = DINOv3ViTModel.from_pretrained(tmp_path / "again").state_dict()
        assert_same_bits(found, DINOv3ViTModel.from_pretrained(tmp_path / "ours").state_dict()), name
    index = json.loads((tmp_path / "again" / "model.safetensors.index.json").read_text())
    shards = sorted((tmp_path / "again").glob("model-*.safetensors"))
    assert set(index["weight_map"].values()) == {shard.name for shard in shards}
    assert index["metadata"]["total_size"] == sum(
        tensor.nbytes for shard in shards for tensor in load_file(shard).values()
    )


def test_a_folder_has_what_the_hub_expects(tmp_path):
    torch.save(tiny_native(), tmp_path / "dinov3_vit7b16_pretrain_sat493m-a6675841.pth")
    converted(tmp_path / "dinov3_vit7b16_pretrain_sat493m-a6675841.pth", tmp_path / "hub", "hf")
    assert {path.name for path in (tmp_path / "hub").iterdir()} == {
        *("config.json", "model.safetensors", "preprocessor_config.json", "README.md"),
    }
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert (config["model_type"], config["architectures"], config["dtype"]) == (
        *("dinov3_vit", ["DINOv3ViTModel"], "float32"),
    )
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hub")
    assert processor.image_mean == pytest.approx([0.430, 0.411, 0.296])  # its name says satellite
    with safe_open(tmp_path / "hub" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert "Converted from dinov3_vit7b16_pretrain_sat493m" in (tmp_path / "hub" / "README.md").read_text()


@pytest.mark.parametrize(("mean", "std"), [([0.5, 0.25, 0.125], [0.2, 0.1, 0.3]), ([0, 0, 0], [1, 1, 1])])
def test_image_statistics_of_a_folder_stay(mean, std, tmp_path):
    tiny_model().save_pretrained(tmp_path / "ours")
    statistics = {"image_mean": mean, "image_std": std}
    build_image_processor(**statistics).save_pretrained(tmp_path / "ours")
    converted(tmp_path / "ours", tmp_path / "again", "hf")
    processor = json.loads((tmp_path / "again" / "preprocessor_config.json").read_text())
    assert {name: processor[name] for name in statistics} == statistics


def test_half_a_norm_of_local_crops_is_made_whole(tmp_path):
    native = tiny_native(untie_global_and_local_cls_norm=True)
    torch.save(native, tmp_path / "native.pth")
    converted(tmp_path / "native.pth", tmp_path / "hub", "hf")
    save_file({"local_cls_norm.weight": native["local_cls_norm.weight"]}, tmp_path / "hub" / "extras.safetensors")
    _, written = converted(tmp_path / "hub", tmp_path / "back.pth", "native")
    assert written.derived["local_cls_norm.bias"] == "a copy of norm: it acts in training only"
    assert_same_bits(read_native(tmp_path / "back.pth"), native | {"local_cls_norm.bias": native["norm.bias"]})


@pytest.mark.parametrize("where", ["installed", pytest.param("oldest", marks=pytest.mark.slow)])
def test_folders_of_stock_transformers(forks, where, tmp_path):
    floor = REPOSITORY / "build" / "floor"
    if where == "oldest" and not (floor / "installed").exists():
        pytest.skip("needs the oldest transformers; make build/floor/installed")
    script = (
        "import sys, torch, transformers as t; torch.manual_seed(0)\n"
        "vit = t.DINOv3ViTConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,"
        " num_register_tokens=2, patch_size=4)\n"
        "convnext = t.DINOv3ConvNextConfig(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 2, 1])\n"
        "t.DINOv3ViTModel(vit).save_pretrained(sys.argv[1] + '/vit')\n"
        "t.DINOv3ViTBackbone(vit).save_pretrained(sys.argv[1] + '/vit_backbone')\n"
        "t.DINOv3ConvNextModel(convnext).save_pretrained(sys.argv[1] + '/convnext')\n"
        "t.DINOv3ConvNextBackbone(convnext).save_pretrained(sys.argv[1] + '/convnext_backbone')\n"
        "print(t.__version__)"
    )
    if where == "oldest":
        done = run_python("-c", script, tmp_path, PYTHONPATH=str(floor))
    else:
        done = forks.run("-c", script, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1].startswith("5.8." if where == "oldest" else transformers.__version__)
    for name in ("vit", "vit_backbone", "convnext"):
        stock = {
            key.removeprefix("model."): tensor
            for key, tensor in load_file(tmp_path / name / "model.safetensors").items()
        }
        converted(tmp_path / name, tmp_path / f"{name}.pth", "native")
        converted(tmp_path / f"{name}.pth", tmp_path / f"{name}_back", "hf")
        assert_same_bits(load_file(tmp_path / f"{name}_back" / "model.safetensors"), stock)
    # The stock ConvNeXt backbone has no final norm.
    with pytest.raises(ValueError, match=r"convnext_backbone has no parameter layer_norm.weight and 1 more; check"):
        read_checkpoint(tmp_path / "convnext_backbone")


def test_what_the_architecture_has_and_a_folder_lacks_is_derived_when_asked(tmp_path):
    model = tiny_model(layer_norm_eps=1e-5)
    model.save_pretrained(tmp_path / "hub")
    checkpoint = read_checkpoint(tmp_path / "hub")
    checkpoint.config.untie_global_and_local_cls_norm = True  # as --arch vit7b16 says of the 7B's folder on the Hub
    written = write_checkpoint(checkpoint, tmp_path / "native.pth", "native")
    assert written.derived["local_cls_norm.weight"] == "a copy of norm: it acts in training only"
    native = read_native(tmp_path / "native.pth")
    assert torch.equal(native["local_cls_norm.bias"], native["norm.bias"])
    assert torch.equal(load_model(checkpoint).local_cls_norm.weight, model.norm.weight)
