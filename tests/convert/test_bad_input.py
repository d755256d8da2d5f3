"""Checkpoints that are not what they should be: one clear line, and nothing is written."""

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from dinov3_hf.convert.checkpoint import read_checkpoint
from dinov3_hf.convert.safetensors_file import read_safetensors
from dinov3_hf.convert.writing import write_checkpoint
from tests.convert.files import CONVNEXT_CASES, converted, heads, native_weights, prefixed, tiny_native
from tests.models.dinov3_vit.tiny import tiny_model


def without(names, tensors):
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(names)}


def native_with(**changed):
    return tiny_native() | {name.replace("__", "."): tensor for name, tensor in changed.items()}


def native_with_mask():
    return {"blocks.0.attn.qkv.bias_mask": tiny_native()["blocks.0.attn.qkv.bias_mask"]}


CONVNEXT = native_weights(CONVNEXT_CASES[0])
BAD_STATES = {
    "resnet": (
        {"conv1.weight": torch.zeros(64, 3, 7, 7), "layer1.0.bn1.running_mean": torch.zeros(64)},
        r"is no DINOv3 backbone of a known format \(native.*\): it has 2 tensors such as conv1.weight",
    ),
    "CLIP": (
        {"visual.class_embedding": torch.zeros(8), "visual.transformer.resblocks.0.ln_1.weight": torch.zeros(8)},
        r"is no DINOv3 backbone of a known format",
    ),
    "DINOv2": (
        {**without("rope", without("storage", tiny_native())), "pos_embed": torch.zeros(1, 5, 32)},
        r"is no DINOv3 backbone of a known format",
    ),
    "heads alone": (heads(), r"holds heads \(dino_head.*, ...\) and no backbone; give the backbone's file"),
    "nothing": ({}, r"holds no tensors; give a checkpoint"),
    "no tensors": ({"epoch": 3, "args": None}, r"holds no tensors; give a checkpoint"),
    "an extra key": (native_with(head__weight=torch.zeros(2, 32)), r"head.weight is not a parameter of this"),
    "a missing key": (without("norm.bias", tiny_native()), r"has no parameter norm.bias; check that it is a whole"),
    "missing keys": (without("blocks.1.mlp", tiny_native()), r"has no parameter layer.1.mlp.up_proj.weight and"),
    "a missing block": (without("blocks.1.", tiny_native()), r"the checkpoint has no block 1 of 3; it is not whole"),
    "no mask token": (without("mask_token", tiny_native()), r"the checkpoint has no mask_token; check"),
    "no heads count": (without("rope", tiny_native()), r"no rope_embed.periods, from which the number"),
    "a shape": (native_with(blocks__1__norm1__weight=torch.ones(16)), r"layer.1.norm1.weight has the shape \(16,\)"),
    "axes": (native_with(cls_token=torch.ones(32)), r"cls_token has the shape \(32,\); a DINOv3 ViT has 3 axes there"),
    "qkv": (native_with(blocks__1__attn__qkv__weight=torch.ones(95, 32)), r"\(95, 32\) cannot be cut into 3 parts"),
    "qkv of no axis": (native_with(blocks__1__attn__qkv__weight=torch.ones(())), r"\(\) cannot be cut into 3 parts"),
    "a block of any number": (
        native_with(blocks__99999999999__norm1__weight=torch.ones(32)),
        r"the checkpoint has no block 3 of 100000000000; it is not whole",
    ),
    "the mask of another width": (
        native_with(blocks__0__attn__qkv__bias_mask=torch.ones(90)),
        r"bias_mask has 90 values instead of 96; check the architecture",
    ),
    "a mask of nothing": (
        without("blocks.0.attn.qkv.bias", tiny_native()) | native_with_mask(),
        r"blocks.0.attn.qkv.bias_mask has no bias to mask",
    ),
    "a mask of NaN": (
        native_with(blocks__0__attn__qkv__bias_mask=torch.full((96,), torch.nan)),
        r"bias_mask is not ones, zeros and ones .* NaN there means weights that were never initialised",
    ),
    "periods of no RoPE": (
        native_with(rope_embed__periods=torch.tensor([1.0, 9.0, 2.0, 3.0])),
        r"rope_embed.periods are not geometric",
    ),
    "periods of NaN": (native_with(rope_embed__periods=torch.full((4,), torch.nan)), r"are not geometric"),
    "too many periods": (native_with(rope_embed__periods=torch.ones(9)), r"has 9 values, which fits no head"),
    "integers": (native_with(norm__weight=torch.ones(32, dtype=torch.int64)), r"norm.weight has the dtype"),
    "two of one name": (
        native_with(module__cls_token=torch.zeros(1, 1, 32)),
        r"are both cls_token of the model; remove one",
    ),
    "a ConvNeXt without a block": (without("stages.2.0", CONVNEXT), r"has no stages.2.0; check that it is whole"),
    "a ConvNeXt with a key": (CONVNEXT | {"stages.0.0.x": torch.ones(1)}, r"stages.0.0.x is not a parameter of this"),
}  # fmt: skip


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize(("content", "says"), BAD_STATES.values(), ids=BAD_STATES)
def test_state_dicts_of_no_whole_network(content, says, suffix, tmp_path):
    path = tmp_path / f"a.{suffix}"
    if suffix == "pth":
        torch.save(content, path)
    else:
        save_file({name: tensor for name, tensor in content.items() if isinstance(tensor, torch.Tensor)}, path)
    with pytest.raises(ValueError, match=says) as error:
        read_checkpoint(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


@pytest.mark.parametrize("to", ["hf", "native"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(value, to, tmp_path):
    weight = torch.ones(3 * 32, 32)
    weight[40, 3] = value
    torch.save(native_with(blocks__2__attn__qkv__weight=weight), tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"blocks.2.attn.qkv.weight|layer.2.attention.k_proj.weight") as error:
        converted(tmp_path / "a.pth", tmp_path / "new.pth", to)
    assert "holds NaN or infinite weights; convert an earlier or an undamaged checkpoint" in str(error.value)
    assert str(error.value).startswith(f"{tmp_path / 'a.pth'}: ")
    assert {path.name for path in tmp_path.iterdir()} == {"a.pth"}


@pytest.mark.parametrize("where", ["masked key bias", "head"])
def test_what_does_not_act_may_not_be_nan_either(where, tmp_path):
    native, branch = tiny_native(), heads()
    if where == "head":
        branch["ibot_head.last_layer.weight"][3, 3] = torch.nan
    else:
        native["blocks.0.attn.qkv.bias"][40] = torch.nan
    torch.save({"teacher": prefixed("backbone.", native) | branch}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="holds NaN or infinite weights"):
        converted(tmp_path / "a.pth", tmp_path / "hub", "hf")
    assert {path.name for path in tmp_path.iterdir()} == {"a.pth"}


def header_of(path):
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(path, header, data, length=None):
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


@pytest.mark.parametrize(
    "lie", ["shape", "offsets", "overlap", "beyond the end", "length", "huge length", "dtype", "no json", "short"]
)
def test_safetensors_headers_that_lie(lie, tmp_path):
    path = tmp_path / "a.safetensors"
    save_file(tiny_native(), path)
    header, data = header_of(path)
    entry = header["norm.weight"]
    start, end = entry["data_offsets"]
    length = None
    if lie == "shape":
        entry["shape"] = [33]
    elif lie == "offsets":
        entry["data_offsets"] = [end, start]
    elif lie == "overlap":
        entry["data_offsets"] = [start - 4, end]
    elif lie == "beyond the end":
        data = data[:-100]
    elif lie == "length":
        length = 17
    elif lie == "huge length":
        length = 1 << 60
    elif lie == "dtype":
        entry["dtype"] = "F8_E4M3"
    with_header(path, header, data, length)
    if lie == "no json":
        path.write_bytes(struct.pack("<Q", 8) + b"not json" + data)
    elif lie == "short":
        path.write_bytes(b"abc")
    with pytest.raises(ValueError, match=r"a\.safetensors is damaged, or is no safetensors file") as error:
        read_checkpoint(path)
    assert "\n" not in str(error.value)


def test_dtypes_that_no_model_has(tmp_path):
    save_file({"a": torch.zeros(2, dtype=torch.int16)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"a in .*a\.safetensors has the dtype I16; convert it to F32 or BF16 first"):
        read_safetensors(tmp_path / "a.safetensors")


def edit_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"model_type": "vit"}, r"config.json describes a 'vit' model; the types known are dinov3_vit, "),
        ({"model_type": None}, r"config.json describes a None model"),
        ({"hidden_size": 36}, r"config.json describes no network \(hidden_size 36 cannot be split into"),
        ({"hidden_size": 48}, r"has the shape \(1, 1, 32\), where the architecture has \(1, 1, 48\)"),
        ({"hidden_size": "wide"}, r"config.json describes no network"),
        ({"num_hidden_layers": 4}, r"has no parameter layer.3.norm1.weight and 16 more"),
        ({"num_hidden_layers": 2}, r"describes no network \(out_features must be a subset"),
        ({"num_hidden_layers": 10**9}, r"describes 1000000000 blocks, for which there are too few tensors"),
        ({"hidden_size": 2**62}, r"describes no network"),
        ({"hidden_act": "jump"}, r"describes no network"),
        ({"use_gated_mlp": True}, r"has no parameter layer.0.mlp.gate_proj.weight"),
    ],
)  # fmt: skip
def test_configurations_of_other_networks(fields, says, tmp_path):
    tiny_model().save_pretrained(tmp_path / "hub")
    edit_config(tmp_path / "hub", **fields)
    with pytest.raises(ValueError, match=says) as error:
        read_checkpoint(tmp_path / "hub")
    assert "\n" not in str(error.value)


def test_folders_that_are_not_whole(tmp_path):
    hub = tmp_path / "hub"
    hub.mkdir()
    with pytest.raises(FileNotFoundError, match=r"hub has no config.json; give a folder of transformers or timm"):
        read_checkpoint(hub)
    (hub / "config.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match=r"config.json holds a list and no JSON object; copy it again"):
        read_checkpoint(hub)
    (hub / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is no JSON file"):
        read_checkpoint(hub)
    (hub / "config.json").unlink()
    tiny_model().save_pretrained(hub)
    (hub / "model.safetensors").rename(hub / "elsewhere.safetensors")
    with pytest.raises(FileNotFoundError, match=r"hub has neither model.safetensors nor model.safetensors.index.json"):
        read_checkpoint(hub)


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda files: files.pop("norm.bias"), r"index.json and its shards do not agree about norm.bias"),
        (lambda files: files.update({"more": files["norm.bias"]}), r"do not agree about more"),
        (lambda files: files.update({"norm.bias": "../secret.safetensors"}), r"names ../secret.safetensors, which"),
        (lambda files: files.update({"norm.bias": "absent.safetensors"}), r"absent.safetensors"),
        (lambda files: files.update({"norm.bias": 3}), r"index.json has no weight_map of file names"),
    ],
)  # fmt: skip
def test_indices_that_are_wrong(edit, says, tmp_path):
    tiny_model().save_pretrained(tmp_path / "ours")
    converted(tmp_path / "ours", tmp_path / "hub", "hf", max_shard_size=20_000)
    index = tmp_path / "hub" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    edit(content["weight_map"])
    index.write_text(json.dumps(content))
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        read_checkpoint(tmp_path / "hub")


def test_the_weights_of_a_folder_alone(tmp_path):
    tiny_model().save_pretrained(tmp_path / "hub")
    with pytest.raises(ValueError, match=r"does not say what it is; give its folder .*hub, which has a config.json"):
        read_checkpoint(tmp_path / "hub" / "model.safetensors")


def test_heads_that_are_not_whole(tmp_path):
    broken = without("dino_head.last_layer", heads())
    torch.save({"teacher": prefixed("backbone.", tiny_native()) | broken}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"dino_head has no last_layer.weight of two axes; check the checkpoint"):
        converted(tmp_path / "a.pth", tmp_path / "hub", "hf")
    assert {path.name for path in tmp_path.iterdir()} == {"a.pth"}


EXTRAS = {
    "another width": (
        {"native.blocks.1.attn.k.bias": torch.ones(33)},
        r"k.bias in extras.safetensors is torch.float32",
    ),
    "another dtype": (
        {"native.blocks.1.attn.k.bias": torch.ones(32).half()},
        r"is torch.float16 of shape \(32,\), and",
    ),
    "a mask of another width": ({"native.blocks.0.attn.qkv.bias_mask": torch.ones(3)}, r"is not ones, zeros and ones"),
    "no mask": (
        {"native.blocks.0.attn.qkv.bias_mask": torch.ones(96)},
        r"bias_mask in extras.safetensors is not ones",
    ),
    "a weight of the model": (
        {"norm.weight": torch.zeros(32)},
        r"extras.safetensors holds norm.weight, as the model's",
    ),
    "an unknown name": ({"norm3.weight": torch.zeros(32)}, r"norm3.weight is not a parameter of this architecture"),
}


@pytest.mark.parametrize(("extras", "says"), EXTRAS.values(), ids=EXTRAS)
def test_extras_that_do_not_fit_the_model(extras, says, tmp_path):
    tiny_model().save_pretrained(tmp_path / "hub")
    save_file(extras, tmp_path / "hub" / "extras.safetensors")
    with pytest.raises(ValueError, match=says) as error:
        converted(tmp_path / "hub", tmp_path / "native.pth", "native")
    assert str(error.value).startswith(str(tmp_path / "hub")) and "\n" not in str(error.value)
    assert {path.name for path in tmp_path.iterdir()} == {"hub"}


def edit_weights(folder, changed):
    weights = load_file(folder / "model.safetensors")
    save_file(weights | changed, folder / "model.safetensors", {"format": "pt"})


def test_parameters_with_and_without_the_prefix_of_transformers(tmp_path):
    tiny_model().save_pretrained(tmp_path / "hub")
    edit_weights(tmp_path / "hub", {"model.norm.weight": torch.zeros(32)})
    with pytest.raises(ValueError, match=r"hub holds norm.weight and model.norm.weight, which are one parameter"):
        read_checkpoint(tmp_path / "hub")


@pytest.mark.parametrize("to", ["native", "timm"])
def test_queries_and_keys_of_two_dtypes(to, tmp_path):
    tiny_model().save_pretrained(tmp_path / "hub")
    edit_weights(tmp_path / "hub", {"layer.0.attention.k_proj.weight": torch.zeros(32, 32, dtype=torch.bfloat16)})
    with pytest.raises(ValueError, match=r"hub: tensors of float32 and bfloat16 are to be one tensor; save the model"):
        converted(tmp_path / "hub", tmp_path / "new.pth", to)
    assert {path.name for path in tmp_path.iterdir()} == {"hub"}


def test_networks_that_the_original_has_not(tmp_path):
    tiny_model(query_bias=False).save_pretrained(tmp_path / "hub")
    checkpoint = read_checkpoint(tmp_path / "hub")
    with pytest.raises(ValueError, match="the original has a bias on queries and values together"):
        write_checkpoint(checkpoint, tmp_path / "native.pth", "native")
    assert {path.name for path in tmp_path.iterdir()} == {"hub"}


def test_a_file_that_changes_while_it_is_read(tmp_path):
    """Shapes are announced first and values come later; a file that was replaced meanwhile is noticed."""
    native = tiny_native()
    save_file(native, tmp_path / "a.safetensors")
    checkpoint = read_checkpoint(tmp_path / "a.safetensors")
    tensor = checkpoint.tensors["norm.weight"]
    object.__setattr__(tensor, "read", lambda: load_file(tmp_path / "a.safetensors")["norm.weight"][:5])
    with pytest.raises(ValueError, match=r"norm.weight is not of the shape and dtype that the file announces"):
        write_checkpoint(checkpoint, tmp_path / "hub", "hf")
    assert {path.name for path in tmp_path.iterdir()} == {"a.safetensors"}
