"""A teacher gives the tokens that its own library gives, from any source; what is no teacher gets one clear line."""

import json
import shutil
from collections import Counter
from functools import partial
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from dinov3_hf.data.sources.spec import load_images
from dinov3_hf.errors import ArgumentError
from dinov3_hf.models.dinov3_convnext.configuration_dinov3_convnext import DINOv3ConvNextConfig
from dinov3_hf.models.dinov3_convnext.modeling_dinov3_convnext import DINOv3ConvNextModel
from dinov3_hf.models.dinov3_pretraining.modeling_dinov3_pretraining import DINOv3ForPreTraining
from dinov3_hf.models.dinov3_vit.configuration_dinov3_vit import DINOv3ViTNativeConfig
from dinov3_hf.models.dinov3_vit.image_processing import build_image_processor
from dinov3_hf.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTModel
from dinov3_hf.training.distillation_teacher import DistillationTeacher, load_teacher, read_teacher
from dinov3_hf.training.ssl_trainer import SSLTrainer
from tests.testing_utils import require_package, save_tiny_vit
from tests.training.test_ssl_trainer import make_args

HEAD = {"num_prototypes": 32, "bottleneck_dim": 16, "hidden_dim": 40, "num_layers": 2}


def pixels(height: int = 32, width: int = 48, num_channels: int = 3) -> torch.Tensor:
    return torch.randn(2, num_channels, height, width, generator=torch.Generator().manual_seed(1))


def teacher_of(folder: Path, **options) -> DistillationTeacher:
    return load_teacher(read_teacher(str(folder)), **{"bf16": False, **options})


def randomise(model: nn.Module) -> None:
    """Fresh weights are small or zero, so that much of a network would not be seen."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape)
            is_factor = tensor.ndim <= 1 and not name.endswith(("bias", "mean"))  # variances too
            tensor.copy_(1 + 0.2 * noise.abs() if is_factor else 0.2 * noise)


def assert_same(tokens, cls: torch.Tensor, patches: torch.Tensor, grid: tuple[int, int], exact: bool = True) -> None:
    tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-5, "atol": 1e-5}
    assert tokens.grid == grid
    assert cls.std(dim=0).max() > 1e-3 and patches.std(dim=1).max() > 1e-3
    torch.testing.assert_close(tokens.cls, cls, **tolerance)
    torch.testing.assert_close(tokens.patches, patches, **tolerance)


def save_heads(folder: Path, width: int = 24, **changes) -> dict[str, torch.Tensor]:
    """Write prototype heads as the output of a run has them."""
    shapes = {name: {**HEAD, **changes} for name in ("dino_head", "ibot_head")}
    tensors = {
        f"{name}.{key}": torch.randn(shape)
        for name, head in shapes.items()
        for key, shape in {
            "mlp.0.weight": (head["hidden_dim"], width),
            "mlp.0.bias": (head["hidden_dim"],),
            "mlp.2.weight": (head["bottleneck_dim"], head["hidden_dim"]),
            "mlp.2.bias": (head["bottleneck_dim"],),
            "last_layer.weight": (head["num_prototypes"], head["bottleneck_dim"]),
        }.items()
    }
    metadata = {"format": "pt", **{name: json.dumps(head) for name, head in shapes.items()}}
    save_file(tensors, folder / "heads.safetensors", metadata=metadata)
    return tensors


# ---- our own backbones ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("registers", [0, 2])
def test_tokens_of_a_vit(registers, tmp_path):
    model = save_tiny_vit(tmp_path, num_register_tokens=registers)
    tokens = teacher_of(tmp_path)(pixels())
    with torch.no_grad():
        expected = model(pixel_values=pixels()).last_hidden_state
    assert_same(tokens, expected[:, 0], expected[:, 1 + registers :], (4, 6))
    description = read_teacher(str(tmp_path))
    assert (description.width, description.patch_size, description.stride, description.num_channels) == (24, 8, 8, 3)
    assert description.statistics == ((0.5,) * 3, (0.25,) * 3)
    assert description.heads == {}
    assert description.summary == "ViT with 2 blocks of width 24 and patches of 8 px"
    assert description.source == str(tmp_path)


def test_tokens_of_a_native_variant(tmp_path):
    tiny = {"patch_size": 8, "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2}
    config = DINOv3ViTNativeConfig(
        **tiny, num_attention_heads=2, num_register_tokens=1, untie_cls_and_patch_norms=True
    )
    model = DINOv3ViTModel(config).eval()
    with torch.no_grad():
        randomise(model)
    model.save_pretrained(tmp_path)
    build_image_processor(image_size=32).save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(pixel_values=pixels()).last_hidden_state
    teacher = teacher_of(tmp_path)
    assert_same(teacher(pixels()), expected[:, 0], expected[:, 2:], (4, 6))
    assert teacher.description.model_type == "dinov3_vit_native"


@pytest.mark.parametrize("patch_size", [None, 16])  # of feature maps for dense tasks; nothing to a teacher
def test_tokens_of_a_convnext(patch_size, tmp_path):
    config = DINOv3ConvNextConfig(
        hidden_sizes=[8, 8, 12, 16], depths=[1, 1, 1, 1], layer_scale_init_value=0.5, patch_size=patch_size
    )
    model = DINOv3ConvNextModel(config).eval()
    model.save_pretrained(tmp_path)
    build_image_processor(image_size=64).save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(pixel_values=pixels(64, 96)).last_hidden_state
    teacher = teacher_of(tmp_path)
    assert_same(teacher(pixels(64, 96)), expected[:, 0], expected[:, 1:], (2, 3))
    description = teacher.description
    assert (description.width, description.patch_size, description.stride) == (16, None, 32)
    assert len(teacher.blocks()) == 4


def test_heads_are_those_of_the_file(tmp_path):
    save_tiny_vit(tmp_path)
    saved = save_heads(tmp_path)
    teacher = teacher_of(tmp_path)
    assert teacher.description.heads == {"dino_head": HEAD, "ibot_head": HEAD}
    found = {name: tensor for name, tensor in teacher.state_dict().items() if "_head." in name}
    torch.testing.assert_close(found, saved, rtol=0, atol=0)
    logits = teacher.dino_head(teacher(pixels()).cls)
    assert logits.shape == (2, 32) and logits.std() > 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Output folder of a finished run: teacher/, checkpoint-1, checkpoint-2."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    args = make_args(folder, max_steps=2, save_strategy="steps", save_steps=1)
    torch.manual_seed(0)
    trainer = SSLTrainer(DINOv3ForPreTraining(args.pretraining_config()), args, load_images("digits", split="train"))
    trainer.train()
    trainer.save_teacher(folder / "teacher")
    return folder


def test_folders_of_a_run(trained, tmp_path):
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    sources = {name: read_teacher(str(run / name)).source for name in ("", "teacher", "checkpoint-1", "checkpoint-2")}
    assert sources == {
        "": str(run / "teacher"),
        "teacher": str(run / "teacher"),
        "checkpoint-1": str(run / "checkpoint-1" / "teacher"),
        "checkpoint-2": str(run / "checkpoint-2" / "teacher"),
    }
    teacher = teacher_of(run)
    assert teacher.description.heads.keys() == {"dino_head", "ibot_head"}
    weights = load_file(run / "teacher" / "heads.safetensors")
    assert torch.equal(teacher.ibot_head.last_layer.weight, weights["ibot_head.last_layer.weight"])
    side = teacher.description.patch_size
    expected = DINOv3ViTModel.from_pretrained(run / "teacher").eval()
    with torch.no_grad():
        outputs = expected(pixel_values=pixels(2 * side, 3 * side))
    tokens = teacher(pixels(2 * side, 3 * side))
    assert torch.equal(tokens.cls, outputs.pooler_output)
    assert torch.equal(tokens.patches, outputs.last_hidden_state[:, -6:])

    shutil.rmtree(run / "teacher")  # a run that goes on
    read_teacher.cache_clear()
    assert read_teacher(str(run)).source == str(run / "checkpoint-2" / "teacher")
    (run / "checkpoint-2" / "trainer_state.json").unlink()
    read_teacher.cache_clear()
    assert read_teacher(str(run)).source == str(run / "checkpoint-1" / "teacher")
    with pytest.raises(ValueError, match=r"teacher .*checkpoint-2 is no complete checkpoint: .*; name another one"):
        read_teacher(str(run / "checkpoint-2"))


def test_students_of_an_earlier_distillation(tmp_path):
    for name in ("vits16", "convnext_tiny"):
        save_tiny_vit(tmp_path / "run" / name)
        save_heads(tmp_path / "run" / name)
    assert read_teacher(str(tmp_path / "run" / "vits16")).heads["dino_head"] == HEAD
    with pytest.raises(FileNotFoundError, match=r"name a model folder, such as .*run/convnext_tiny\.$"):
        read_teacher(str(tmp_path / "run"))


# ---- transformers ---------------------------------------------------------------------------------------------------

VIT = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "image_size": 32}
STOCK = {  # model, prefix tokens
    "deit": (lambda: transformers.DeiTModel(transformers.DeiTConfig(**VIT, patch_size=8)), 2),
    "dinov2": (lambda: transformers.Dinov2Model(transformers.Dinov2Config(**VIT, patch_size=8)), 1),
    "dinov2_with_registers": (
        lambda: transformers.Dinov2WithRegistersModel(
            transformers.Dinov2WithRegistersConfig(**VIT, patch_size=8, num_register_tokens=3)
        ),
        4,
    ),
    "dinov3_vit": (
        lambda: transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**VIT, patch_size=8, num_register_tokens=4)),
        5,
    ),
    "vit": (lambda: transformers.ViTModel(transformers.ViTConfig(**VIT, patch_size=8)), 1),
    "vit_msn": (lambda: transformers.ViTMSNModel(transformers.ViTMSNConfig(**VIT, patch_size=8)), 1),
    "siglip_vision_model": (
        lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**VIT, patch_size=8)),
        0,
    ),
}
INTERPOLATE = ("deit", "vit", "vit_msn", "siglip_vision_model")


def save(model: transformers.PreTrainedModel, folder: Path, image_size: int = 32) -> transformers.PreTrainedModel:
    with torch.no_grad():
        randomise(model)
    model.eval().save_pretrained(folder)
    build_image_processor(image_size=image_size).save_pretrained(folder)
    return model


@pytest.mark.parametrize("size", [(32, 32), (48, 16), (64, 40)])  # as trained, as many patches, more
@pytest.mark.parametrize("family", STOCK)
def test_tokens_of_vits_of_transformers(family, size, tmp_path):
    make, num_prefix = STOCK[family]
    model = save(make(), tmp_path)
    options = {"interpolate_pos_encoding": True} if family in INTERPOLATE else {}
    with torch.no_grad():
        outputs = model(pixel_values=pixels(*size), **options)
    cls = outputs.last_hidden_state[:, 0] if num_prefix else outputs.pooler_output
    teacher = teacher_of(tmp_path)
    grid = (size[0] // 8, size[1] // 8)
    # This package computes DINOv3 itself; attention in the pooler depends on where weights lie in memory.
    exact = family not in ("dinov3_vit", "siglip_vision_model")
    assert_same(teacher(pixels(*size)), cls, outputs.last_hidden_state[:, num_prefix:], grid, exact)
    if size == (32, 32):
        with torch.no_grad():
            trained = model(pixel_values=pixels(32, 32)).last_hidden_state
        assert_same(teacher(pixels(32, 32)), cls, trained[:, num_prefix:], grid, exact)
    description = teacher.description
    assert (description.width, description.patch_size, description.num_channels) == (24, 8, 3)
    assert description.statistics.mean == tuple(build_image_processor(image_size=32).image_mean)
    description.check_crop(64)
    with pytest.raises(
        ValueError, match=r"crops of 36 pixels are no multiple of the patch size 8 .*; use 32 or 40\.$"
    ):
        description.check_crop(36)


def test_patches_of_a_vit_stand_where_they_are_in_the_image(tmp_path):
    save(STOCK["dinov2_with_registers"][0](), tmp_path)
    teacher = teacher_of(tmp_path)
    crops = pixels(32, 48)
    changed = crops.clone()
    changed[:, :, 8:16, 32:40] += 1.0  # row 1, column 4
    moved = (teacher(changed).patches - teacher(crops).patches).norm(dim=-1).mean(0)  # (N,)
    assert moved.argmax().item() == 1 * 6 + 4


def test_the_image_tower_of_text_and_images(tmp_path):
    text = {"vocab_size": 64, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1}
    config = transformers.SiglipConfig(
        text_config={**text, "num_attention_heads": 2}, vision_config={**VIT, "patch_size": 8}
    )
    model = save(transformers.SiglipModel(config), tmp_path)
    with torch.no_grad():
        outputs = model.vision_model(pixel_values=pixels(), interpolate_pos_encoding=True)
    teacher = teacher_of(tmp_path)
    assert_same(teacher(pixels()), outputs.pooler_output, outputs.last_hidden_state, (4, 6), exact=False)
    assert teacher.description.summary == "siglip_vision_model of transformers, 24 wide, with patches of 8 px"


def stock_convnet(family: str) -> transformers.PreTrainedModel:
    stages = {"hidden_sizes": [8, 8, 12, 16], "depths": [1, 1, 1, 1]}
    if family == "convnext":
        return transformers.ConvNextModel(transformers.ConvNextConfig(**stages))
    if family == "convnextv2":
        return transformers.ConvNextV2Model(transformers.ConvNextV2Config(**stages))
    if family == "regnet":
        return transformers.RegNetModel(transformers.RegNetConfig(**stages, embedding_size=8, groups_width=4))
    return transformers.ResNetModel(transformers.ResNetConfig(**stages, embedding_size=8))


@pytest.mark.parametrize("family", ["convnext", "convnextv2", "regnet", "resnet"])
def test_the_last_map_of_convnets_of_transformers(family, tmp_path):
    model = save(stock_convnet(family), tmp_path, 64)
    with torch.no_grad():
        outputs = model(pixel_values=pixels(64, 96))
    teacher = teacher_of(tmp_path)
    tokens = teacher(pixels(64, 96))
    assert_same(tokens, outputs.pooler_output.flatten(1), outputs.last_hidden_state.flatten(2).mT, (2, 3))
    torch.testing.assert_close(tokens.patches[:, 1 * 3 + 2], outputs.last_hidden_state[:, :, 1, 2])
    description = teacher.description
    assert (description.width, description.patch_size, description.stride) == (16, None, 32)
    assert teacher.blocks() == []
    description.check_crop(96)
    with pytest.raises(ValueError, match=r"no multiple of the stride 32 of the teacher .*; use 32 or 64"):
        description.check_crop(48)


# ---- timm -----------------------------------------------------------------------------------------------------------

TINY = {"embed_dim": 24, "depth": 2, "num_heads": 2, "img_size": 64}
TIMM = {  # architecture, its arguments, prefix tokens
    "cls": ("vit_small_patch16_224", TINY, 1),
    "cls_registers": ("vit_small_patch14_reg4_dinov2", {**TINY, "img_size": 56}, 5),
    "registers": ("vit_small_patch16_224", {**TINY, "class_token": False, "reg_tokens": 2, "global_pool": "avg"}, 2),
    "siglip": ("vit_base_patch16_siglip_224", TINY, 0),
    "dinov3": ("vit_small_patch16_dinov3", TINY, 5),
}
CONVNETS = {
    "convnext": ("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 8, 12, 16]}, 16),
    "resnet": ("resnet10t", {"channels": [8, 8, 12, 16]}, 16),
}


def timm_folder(folder: Path, architecture: str, arguments: dict, weights: dict[str, torch.Tensor]) -> None:
    """Write a folder as timm's on the Hub are."""
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / "model.safetensors")
    pretrained = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "input_size": [3, 64, 64]}
    config = {"architecture": architecture, "num_classes": 0, "model_args": arguments, "pretrained_cfg": pretrained}
    (folder / "config.json").write_text(json.dumps(config))


def save_timm(folder: Path, architecture: str, arguments: dict) -> nn.Module:
    """Write a folder, and return timm's model."""
    import timm

    model = timm.create_model(architecture, num_classes=0, **arguments).eval()
    with torch.no_grad():
        randomise(model)
    timm_folder(folder, architecture, arguments, model.state_dict())
    return model


@require_package("timm")
@pytest.mark.parametrize("name", TIMM)
def test_tokens_of_vits_of_timm(name, tmp_path):
    architecture, arguments, num_prefix = TIMM[name]
    model = save_timm(tmp_path, architecture, arguments)
    teacher = teacher_of(tmp_path)
    description = teacher.description
    side, size = description.patch_size, arguments["img_size"]
    assert side == (14 if "14" in architecture else 16)
    assert description.statistics == ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    with torch.no_grad():
        features = model.forward_features(pixels(size, size))
        pooled = model.forward_head(features, pre_logits=True)
    cls = features[:, 0] if name in ("cls", "cls_registers", "dinov3") else pooled
    assert_same(teacher(pixels(size, size)), cls, features[:, num_prefix:], (4, 4))
    if name in ("cls", "cls_registers"):
        assert torch.equal(cls, pooled)  # timm takes it too; of DINOv3 it takes the mean

    description.check_crop(6 * side)
    with torch.no_grad():
        model.set_input_size((3 * side, 5 * side))
        features = model.forward_features(pixels(3 * side, 5 * side))
        pooled = model.forward_head(features, pre_logits=True)
    cls = features[:, 0] if description.has_cls else pooled
    tokens = teacher(pixels(3 * side, 5 * side))
    assert_same(tokens, cls, features[:, num_prefix:], (3, 5), exact=False)
    with pytest.raises(ValueError, match=f"no multiple of the patch size {side} of the teacher"):
        description.check_crop(4 * side + 1)


@require_package("timm")
@pytest.mark.parametrize("name", CONVNETS)
def test_the_last_map_of_convnets_of_timm(name, tmp_path):
    architecture, arguments, width = CONVNETS[name]
    model = save_timm(tmp_path, architecture, arguments)
    teacher = teacher_of(tmp_path)
    with torch.no_grad():
        features = model.forward_features(pixels(64, 96))
        pooled = model.forward_head(features, pre_logits=True)
    assert_same(teacher(pixels(64, 96)), pooled, features.flatten(2).mT, (2, 3))
    description = teacher.description
    assert (description.width, description.patch_size, description.stride) == (width, None, 32)
    assert description.summary == f"{architecture} of timm, {width} wide, with a stride of 32 px"
    description.check_crop(128)


@require_package("timm")
def test_a_folder_of_timms_model_that_transformers_wrote(tmp_path):
    config = transformers.TimmWrapperConfig(architecture="vit_small_patch16_224", model_args=TINY)
    model = save(transformers.TimmWrapperModel(config), tmp_path, 64)
    with torch.no_grad():
        expected = model(pixel_values=pixels(64, 64)).last_hidden_state
    teacher = teacher_of(tmp_path)
    assert_same(teacher(pixels(64, 64)), expected[:, 0], expected[:, 1:], (4, 4))
    assert teacher.description.statistics.mean == tuple(build_image_processor(image_size=64).image_mean)


@require_package("timm")
def test_networks_of_one_size(tmp_path):
    timm_folder(tmp_path, "botnet26t_256", {}, {"unread": torch.zeros(1)})
    description = read_teacher(str(tmp_path))
    description.check_crop(256)
    with pytest.raises(ValueError, match=r"does not take crops of 320 pixels: .*; use the size that it was trained"):
        description.check_crop(320)


@require_package("timm")
@pytest.mark.parametrize(
    ("architecture", "arguments", "says"),
    [
        ("swin_tiny_patch4_window7_224", {"embed_dim": 12, "depths": [1, 1], "num_heads": [1, 1]}, r"\(28, 28, 24\)"),
        ("mobilenetv3_small_050", {}, r"\(288, 8, 8\) and pools them to \(1024,\)"),
        ("beit_base_patch16_224", {"embed_dim": 24, "depth": 1, "num_heads": 2}, r"\(197, 24\)"),
    ],
)
def test_networks_of_other_kinds(architecture, arguments, says, tmp_path):
    timm_folder(tmp_path, architecture, arguments, {"unread": torch.zeros(1)})
    with pytest.raises(ValueError, match=rf"makes features {says}.*neither a ViT nor a ConvNet.*; use another model"):
        read_teacher(str(tmp_path))


# ---- fixed, whole, compiled -----------------------------------------------------------------------------------------


def test_a_teacher_never_changes(tmp_path):
    """In training mode it would draw random RoPE scales and leave blocks out."""
    save_tiny_vit(tmp_path, pos_embed_rescale=2.0, drop_path_rate=0.5)
    save_heads(tmp_path)
    teacher = teacher_of(tmp_path)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    first = teacher(pixels())
    whole = nn.ModuleDict({"teacher": teacher}).train()
    assert not any(module.training for module in teacher.modules())
    second = whole["teacher"](pixels().requires_grad_())
    assert torch.equal(first.patches, second.patches)
    assert not second.cls.requires_grad and not second.patches.requires_grad
    assert not second.cls.is_inference()  # a loss may keep it for its backward pass


@pytest.mark.parametrize("bf16", [False, True])
def test_autocast_changes_nothing(bf16, tmp_path):
    model = save_tiny_vit(tmp_path)
    save_heads(tmp_path)
    teacher = teacher_of(tmp_path, bf16=bf16)
    dtype = torch.bfloat16 if bf16 else torch.float32
    assert {parameter.dtype for parameter in teacher.parameters()} == {dtype}
    with torch.autocast("cpu", torch.bfloat16):
        tokens = teacher(pixels())
    assert tokens.cls.dtype == tokens.patches.dtype == dtype
    with torch.no_grad():
        expected = model.to(dtype)(pixel_values=pixels().to(dtype)).last_hidden_state
    assert_same(tokens, expected[:, 0], expected[:, 3:], (4, 6))


@pytest.mark.parametrize("family", ["dinov2", "siglip_vision_model", "vit"])
def test_other_families_in_bf16(family, tmp_path):
    save(STOCK[family][0](), tmp_path)
    exact, rounded = teacher_of(tmp_path)(pixels()), teacher_of(tmp_path, bf16=True)(pixels())
    assert rounded.patches.dtype == torch.bfloat16
    distance = (rounded.patches.float() - exact.patches).norm() / exact.patches.norm()
    assert 0 < distance < 0.05


def test_each_attention_gives_the_same(tmp_path):
    save(STOCK["dinov2"][0](), tmp_path)
    eager = teacher_of(tmp_path, attn_implementation="eager")
    assert eager.backbone.config._attn_implementation == "eager"
    torch.testing.assert_close(eager(pixels()).patches, teacher_of(tmp_path)(pixels()).patches)


@pytest.fixture
def compiled(monkeypatch) -> Counter:
    """Counts what is compiled, which is only captured: turning it into machine code takes long."""
    torch._dynamo.reset()
    counts: Counter = Counter()

    def backend(graph, inputs):
        counts["graphs"] += 1
        return graph

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    yield counts
    torch._dynamo.reset()


@pytest.mark.parametrize("family", ["ours", "vit"])
def test_compiling_changes_nothing(family, compiled, tmp_path):
    if family == "ours":
        save_tiny_vit(tmp_path)
    else:
        save(STOCK[family][0](), tmp_path)
    expected = teacher_of(tmp_path)(pixels())
    assert compiled["graphs"] == 0
    teacher = teacher_of(tmp_path, compiled=True)
    tokens = teacher(pixels())
    assert compiled["graphs"] >= 1
    assert all(("forward" in block.__dict__) for block in teacher.blocks())
    torch.testing.assert_close(tokens.patches, expected.patches)
    torch.testing.assert_close(tokens.cls, expected.cls)
    assert len(teacher.blocks()) == (2 if family == "ours" else 0)
    assert teacher.state_dict().keys() == teacher_of(tmp_path).state_dict().keys()


# ---- bad input ------------------------------------------------------------------------------------------------------


def one_line(kind: type[Exception], source: Path | str | None, says: str) -> None:
    with pytest.raises(kind, match=says) as error:
        load_teacher(read_teacher(None if source is None else str(source)), bf16=False)
    assert "\n" not in str(error.value)


def folder_with(folder: Path, **config) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"weight": torch.zeros(1)}, folder / "model.safetensors")
    return folder


def test_what_is_no_model_folder(tmp_path):
    one_line(ArgumentError, None, "teacher is not set; name the model to distil")
    one_line(FileNotFoundError, tmp_path / "nowhere", "there is no teacher folder .*nowhere; name one that exists")
    one_line(FileNotFoundError, tmp_path / "gone.pth", "there is no teacher .*gone.pth; name a model folder")
    one_line(FileNotFoundError, "nobody/at-all", "there is no model folder nobody/at-all, and as a Hub repository")
    (tmp_path / "empty").mkdir()
    one_line(FileNotFoundError, tmp_path / "empty", "holds no config.json of a model; name a model folder, such as")
    file = tmp_path / "dinov3_vits16.pth"
    file.touch()
    one_line(ValueError, file, "is a file; convert it first, dinov3-hf convert .* --to hf, and give --teacher dinov3_")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    one_line(ValueError, tmp_path / "broken", r"broken/config.json is no JSON")


def test_families_that_are_not_known(tmp_path):
    one_line(ValueError, folder_with(tmp_path / "bert", model_type="bert"), "a 'bert' model, .*; use timm's version")
    one_line(ValueError, folder_with(tmp_path / "none"), "a None model, whose outputs are not known here")
    clip = folder_with(tmp_path / "clip", model_type="clip", vision_config={"patch_size": 8})
    one_line(ValueError, clip, "a 'clip' model, whose outputs are not known here")


def test_code_of_a_folder_is_not_run(tmp_path):
    folder = folder_with(
        tmp_path / "remote", model_type="theirs", auto_map={"AutoConfig": "code.C", "AutoModel": "code.M"}
    )
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    one_line(ValueError, folder, "a 'theirs' model, whose outputs are not known here")
    save(STOCK["dinov2"][0](), tmp_path / "known")
    config = json.loads((tmp_path / "known" / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "code.C", "AutoModel": "code.M"}
    (tmp_path / "known" / "config.json").write_text(json.dumps(config))
    shutil.copy(folder / "code.py", tmp_path / "known")
    assert isinstance(teacher_of(tmp_path / "known").backbone, transformers.Dinov2Model)
    assert not (tmp_path / "ran").exists()


def test_weights_that_cannot_be_read(tmp_path):
    for name in ("pickle", "none", "damaged", "other"):
        save_tiny_vit(tmp_path / name)
    weights = load_file(tmp_path / "pickle" / "model.safetensors")
    (tmp_path / "pickle" / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pickle" / "pytorch_model.bin")
    one_line(
        ValueError, tmp_path / "pickle", "weights in pytorch_model.bin, a pickle, .*; save it with save_pretrained"
    )
    (tmp_path / "none" / "model.safetensors").unlink()
    one_line(
        FileNotFoundError, tmp_path / "none", r"has no weights \(model.safetensors\); copy or download them again"
    )
    file = tmp_path / "damaged" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    one_line(ValueError, tmp_path / "damaged", "the weights of .*damaged cannot be read .*; copy or download")
    save_tiny_vit(tmp_path / "three", num_hidden_layers=3)
    shutil.copy(tmp_path / "three" / "config.json", tmp_path / "other")
    one_line(ValueError, tmp_path / "other", r"the weights of the model .*other lack layer.2\.")


def test_weights_of_a_pooler_may_be_missing_where_there_is_cls(tmp_path):
    for family, remove in (("vit", "pooler."), ("dinov2", "encoder.layer.1.norm1"), ("siglip_vision_model", "head.")):
        save(STOCK[family][0](), tmp_path / family)
        file = tmp_path / family / "model.safetensors"
        weights = load_file(file)
        kept = {name: tensor for name, tensor in weights.items() if remove not in name}
        assert len(kept) < len(weights)
        save_file(kept, file, metadata={"format": "pt"})
    assert teacher_of(tmp_path / "vit")(pixels()).grid == (4, 6)
    for family, name in (("dinov2", "layer.1.norm1"), ("siglip_vision_model", "head.")):
        one_line(ValueError, tmp_path / family, rf"the weights of the model .* lack .*{name}")


def test_the_backbone_of_a_classifier(tmp_path):
    """As released ViTs are: the names have a prefix, there is a classifier, and no pooler."""
    model = save(transformers.ViTForImageClassification(transformers.ViTConfig(**VIT, patch_size=8)), tmp_path)
    with torch.no_grad():
        expected = model.vit(pixel_values=pixels(), interpolate_pos_encoding=True).last_hidden_state
    assert_same(teacher_of(tmp_path)(pixels()), expected[:, 0], expected[:, 1:], (4, 6))


def test_heads_that_do_not_fit(tmp_path):
    for name in ("damaged", "narrow", "shape", "lacking", "ibot"):
        save_tiny_vit(tmp_path / name)
        save_heads(tmp_path / name)
    file = tmp_path / "damaged" / "heads.safetensors"
    file.write_bytes(file.read_bytes()[:400])
    one_line(ValueError, tmp_path / "damaged", r"heads.safetensors is no whole safetensors file")
    save_heads(tmp_path / "narrow", width=16)
    one_line(
        ValueError,
        tmp_path / "narrow",
        r"does not fit the backbone beside it, which is 24 wide: dino_head.mlp.0.weight is \(40, 16\), not \(40, 24\)",
    )
    tensors = load_file(tmp_path / "shape" / "heads.safetensors")
    as_it_says = {"dino_head": json.dumps({**HEAD, "num_prototypes": 64})}
    save_file(tensors, tmp_path / "shape" / "heads.safetensors", metadata=as_it_says)
    one_line(ValueError, tmp_path / "shape", r"dino_head.last_layer.weight is \(32, 16\), not \(64, 16\)")
    del tensors["dino_head.last_layer.weight"]
    save_file(tensors, tmp_path / "lacking" / "heads.safetensors", metadata={"dino_head": json.dumps(HEAD)})
    one_line(ValueError, tmp_path / "lacking", "dino_head.last_layer.weight is missing")
    save_file(tensors, tmp_path / "ibot" / "heads.safetensors", metadata={"ibot_head": json.dumps(HEAD)})
    one_line(ValueError, tmp_path / "ibot", "holds no DINO head; remove it to distil features")


def test_images_that_do_not_fit(tmp_path):
    save_tiny_vit(tmp_path / "bare")
    (tmp_path / "bare" / "preprocessor_config.json").unlink()
    one_line(FileNotFoundError, tmp_path / "bare", r"has no image processor \(preprocessor_config.json\)")
    save_tiny_vit(tmp_path / "grey", num_channels=1)
    assert read_teacher(str(tmp_path / "grey")).num_channels == 1
    build_image_processor(image_size=32).save_pretrained(tmp_path / "grey")
    read_teacher.cache_clear()
    one_line(ValueError, tmp_path / "grey", "image_mean of the teacher .* has 3 values, but .* images of 1 channels")


# ---- the Hub --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_heads", [False, True])
def test_a_repository_of_the_hub(with_heads, tmp_path, monkeypatch):
    """As it lies in the cache after a download."""
    snapshot = tmp_path / "models--owner--name" / "snapshots" / ("0" * 40)
    model = save_tiny_vit(snapshot)
    if with_heads:
        save_heads(snapshot)
    (tmp_path / "models--owner--name" / "refs").mkdir()
    (tmp_path / "models--owner--name" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    read_teacher.cache_clear()
    teacher = load_teacher(read_teacher("owner/name"), bf16=False)
    with torch.no_grad():
        expected = model(pixel_values=pixels()).last_hidden_state
    assert_same(teacher(pixels()), expected[:, 0], expected[:, 3:], (4, 6))
    assert (teacher.dino_head is not None) is with_heads
    assert teacher.description.source == "owner/name"
