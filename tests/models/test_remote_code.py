"""Code in the folders of our own model types: it opens them where this package is not installed, and only there."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForPreTraining

import dinov3_hf.auto  # noqa: F401  (registers when it is imported)
from dinov3_hf.models.dinov3_convnext.configuration_dinov3_convnext import (
    DINOv3ConvNextConfig,
    DINOv3ConvNextNativeConfig,
)
from dinov3_hf.models.dinov3_convnext.modeling_dinov3_convnext import (
    DINOv3ConvNextBackbone,
    DINOv3ConvNextModel,
    DINOv3ConvNextNativeModel,
)
from dinov3_hf.models.dinov3_pretraining.configuration_dinov3_distillation import DINOv3DistillationConfig
from dinov3_hf.models.dinov3_pretraining.configuration_dinov3_pretraining import DINOv3PreTrainingConfig
from dinov3_hf.models.dinov3_pretraining.modeling_dinov3_distillation import DINOv3ForDistillation
from dinov3_hf.models.dinov3_pretraining.modeling_dinov3_pretraining import DINOv3ForPreTraining
from dinov3_hf.models.dinov3_pretraining.teacher_targets import TeacherTargets
from dinov3_hf.models.dinov3_vit.configuration_dinov3_vit import DINOv3ViTConfig, DINOv3ViTNativeConfig
from dinov3_hf.models.dinov3_vit.image_processing import build_image_processor
from dinov3_hf.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTBackbone, DINOv3ViTModel, DINOv3ViTNativeModel
from dinov3_hf.models.remote_code import flat_sources
from tests.models.dinov3_pretraining.test_modeling import BATCH, make_batch
from tests.models.dinov3_vit.tiny import NATIVE_VARIANTS, TINY, images, randomize, tiny_config, tiny_model
from tests.models.other_process import VERSIONS, run_without_us

HEAD = {"num_prototypes": 24, "bottleneck_dim": 8, "hidden_dim": 16}
CONVNEXT = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 2, 1], "image_size": 64}
CONVNEXT_VARIANTS = {"convnext_patch_grid": {"patch_size": 16}, "convnext_plain": {"layer_scale_init_value": None}}
PRETRAINING = {"pretraining": {}, "pretraining_of_native": {"norm_type": "rmsnorm"}}
DISTILLATION = "distillation"
TRAINED = (*PRETRAINING, DISTILLATION)
NAMES = [*NATIVE_VARIANTS, *CONVNEXT_VARIANTS, *TRAINED]
MODELING = [
    *(
        f"dinov3_hf.models.{family}.modeling_{family}"
        for family in ("dinov3_vit", "dinov3_convnext", "dinov3_pretraining")
    ),
    "dinov3_hf.models.dinov3_pretraining.modeling_dinov3_distillation",
]


def pretraining_model(**fields) -> DINOv3ForPreTraining:
    config = DINOv3PreTrainingConfig(backbone_config={**TINY, **fields}, dino_head=HEAD, ibot_head=HEAD)
    if fields:
        config.backbone_config = DINOv3ViTNativeConfig(**TINY, **fields)
    return randomize(DINOv3ForPreTraining(config)).eval()


def distillation_model() -> DINOv3ForDistillation:
    config = DINOv3DistillationConfig(
        backbone_config=TINY, objective="features", teacher_width=20, patch_size=TINY["patch_size"]
    )
    return randomize(DINOv3ForDistillation(config)).eval()


def distillation_crops() -> dict:
    crops = {name: tensor for name, tensor in make_batch().items() if name.endswith("crops")}
    generator = torch.Generator().manual_seed(0)
    target = {
        "cls": torch.randn(2, BATCH, 20, generator=generator),
        "patches": torch.randn(2 * BATCH, 16, 20, generator=generator),
    }
    return {**crops, "target": {"cls_probs": None, "masked_probs": None, "prototype_entropy": {}, **target}}


def code_in(folder) -> set[str]:
    return {path.name for path in folder.glob("*.py")}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Models of our own types, by the name of their folder."""
    folder = tmp_path_factory.mktemp("own")
    by_name = {name: tiny_model(**fields) for name, fields in NATIVE_VARIANTS.items()}
    by_name |= {
        name: randomize(DINOv3ConvNextModel(DINOv3ConvNextConfig(**CONVNEXT, **fields))).eval()
        for name, fields in CONVNEXT_VARIANTS.items()
    }
    by_name |= {name: pretraining_model(**fields) for name, fields in PRETRAINING.items()}
    by_name[DISTILLATION] = distillation_model()
    for name, model in by_name.items():
        model.save_pretrained(folder / "models" / name)
    build_image_processor("satellite", 16).save_pretrained(folder / "models" / "rmsnorm")
    pixels = {name: images(2, 64, 48) if name in CONVNEXT_VARIANTS else images() for name in by_name}
    crops = {name: {**make_batch(), "teacher_temperature": 0.05} for name in PRETRAINING}
    inputs = {"pixels": pixels, "crops": {**crops, DISTILLATION: distillation_crops()}}
    return SimpleNamespace(folder=folder, by_name=by_name, inputs=inputs)


@pytest.fixture(scope="module", params=VERSIONS)
def elsewhere(request, models, tmp_path_factory):
    """What came out of the same folders in a process without this package."""
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "models").symlink_to(models.folder / "models")
    Image.radial_gradient("L").convert("RGB").save(folder / "picture.png")
    torch.save({**models.inputs, "picture": str(folder / "picture.png")}, folder / "inputs.pt")
    script = Path(__file__).with_name("remote_process.py")
    run_without_us(request.param, script, folder, HF_MODULES_CACHE=str(folder / "modules"))
    return SimpleNamespace(folder=folder, outputs=torch.load(folder / "outputs.pt"))


@pytest.mark.parametrize("name", NAMES)
def test_folders_open_without_this_package(models, elsewhere, name):
    found, model = elsewhere.outputs[name], models.by_name[name]
    assert not any(found["loading"].values()), found["loading"]
    assert found["knows_its_config"]
    with torch.no_grad():
        if name in TRAINED:
            crops = dict(models.inputs["crops"][name])
            if name == DISTILLATION:
                crops["target"] = TeacherTargets(**crops["target"])
            assert torch.equal(found["loss"], model(**crops).loss)
        else:
            pixels = models.inputs["pixels"][name]
            assert torch.equal(found["last_hidden_state"], model(pixels).last_hidden_state)
            backbone_class = DINOv3ConvNextBackbone if name in CONVNEXT_VARIANTS else DINOv3ViTBackbone
            backbone = backbone_class.from_pretrained(models.folder / "models" / name, out_indices=[1, 2])
            for theirs, ours in zip(found["feature_maps"], backbone(pixels).feature_maps, strict=True):
                assert torch.equal(theirs, ours)


@pytest.mark.parametrize("name", NAMES)
def test_code_is_run_only_when_asked_for(elsewhere, name):
    assert "trust_remote_code=True" in elsewhere.outputs[name]["untrusted"]


@pytest.mark.parametrize("name", NAMES)
def test_what_was_opened_there_can_be_saved_there(models, elsewhere, name):
    original, again, config = (
        folder / name
        for folder in (models.folder / "models", elsewhere.folder / "again", elsewhere.folder / "configs")
    )
    assert "auto_classes.py" in code_in(original) and code_in(original) == code_in(again) == code_in(config)
    for file in code_in(original):
        assert (original / file).read_bytes() == (again / file).read_bytes() == (config / file).read_bytes(), file
    expected = models.by_name[name].state_dict()
    found = elsewhere.outputs[name]["state_dict"]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    cls = AutoModelForPreTraining if name in TRAINED else AutoModel
    assert type(cls.from_pretrained(again)).__module__.startswith("dinov3_hf.")
    assert type(AutoConfig.from_pretrained(config)) is type(AutoConfig.from_pretrained(original))


def test_the_pipeline_runs_our_code(models, elsewhere):
    assert elsewhere.outputs["pipeline"].shape == (1, 1 + TINY["num_register_tokens"] + 16, TINY["hidden_size"])


# ---- in a process with this package ------------------------------------------------------------------------------


@pytest.mark.parametrize("trust", [{}, {"trust_remote_code": True}, {"trust_remote_code": False}])
@pytest.mark.parametrize(
    ("name", "config_class", "model_class"),
    [
        ("rmsnorm", DINOv3ViTNativeConfig, DINOv3ViTNativeModel),
        ("convnext_plain", DINOv3ConvNextNativeConfig, DINOv3ConvNextNativeModel),
    ],
)
def test_here_our_classes_are_used(models, trust, name, config_class, model_class):
    source = models.folder / "models" / name
    assert type(AutoModel.from_pretrained(source, **trust)) is model_class
    assert type(AutoConfig.from_pretrained(source, **trust)) is config_class
    assert type(AutoModel.from_config(AutoConfig.from_pretrained(source), **trust)) is model_class
    assert not any(name.startswith("transformers_modules") for name in sys.modules)


@pytest.mark.parametrize("name", ["rmsnorm", "convnext_plain", "pretraining", DISTILLATION])
def test_the_folder_has_what_its_class_needs_and_no_more(models, name):
    folder = models.folder / "models" / name
    imported = {}
    for file in code_in(folder):
        source = (folder / file).read_text()
        assert source.startswith("# SPDX-License-Identifier: Apache-2.0\n")
        assert not re.search(r"^\s*(from|import) dinov3_hf", source, flags=re.MULTILINE)
        found = re.findall(r"^\s*from \.(\w+) import", source, flags=re.MULTILINE)
        imported[file] = {f"{module}.py" for module in found}
    assert imported.pop("auto_classes.py") == set(imported)
    [unused] = imported.keys() - set().union(*imported.values())
    assert unused.startswith("modeling_")
    assert not list(folder.glob(".*"))  # no part of a file that was being written


@pytest.mark.parametrize("module", MODELING)
def test_no_two_modules_share_a_file(module):
    sources = flat_sources(module)
    assert module.rpartition(".")[2] in sources
    assert len({source.split('"""')[1] for source in sources.values()}) == len(sources)  # docstrings


def test_what_transformers_can_represent_gets_no_code(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    tiny_config().save_pretrained(tmp_path / "config")
    for folder in (tmp_path / "model", tmp_path / "config"):
        assert not code_in(folder)
        assert "auto_map" not in json.loads((folder / "config.json").read_text())


def test_a_configuration_that_becomes_representable_drops_its_code(tmp_path):
    tiny_config(norm_type="rmsnorm").save_pretrained(tmp_path / "native")
    config = DINOv3ViTConfig.from_pretrained(tmp_path / "native")
    config.norm_type = "layernorm"
    config.save_pretrained(tmp_path / "stock")
    assert not code_in(tmp_path / "stock")
    written = json.loads((tmp_path / "stock" / "config.json").read_text())
    assert written["model_type"] == "dinov3_vit" and "auto_map" not in written


def test_every_way_of_saving_writes_code_once(tmp_path):
    model = tiny_model(norm_type="rmsnorm")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    model.save_pretrained(tmp_path / "given", state_dict=model.state_dict())
    model.config.save_pretrained(tmp_path / "config")
    tiny_config(norm_type="rmsnorm").save_pretrained(tmp_path / "fresh")
    for folder in tmp_path.iterdir():
        assert code_in(folder) == code_in(tmp_path / "shards")
        assert "AutoModel" in json.loads((folder / "config.json").read_text())["auto_map"]


def test_other_processes_of_a_run_write_nothing(tmp_path):
    tiny_model(norm_type="rmsnorm", untie_global_and_local_cls_norm=True).save_pretrained(
        tmp_path / "rank1", is_main_process=False
    )
    # Some versions of transformers write the weights in every process.
    assert {path.name for path in (tmp_path / "rank1").iterdir()} <= {"model.safetensors"}


def test_an_interrupted_save_leaves_the_old_code(tmp_path, monkeypatch):
    from dinov3_hf.models import remote_code

    config = tiny_config(norm_type="rmsnorm")
    config.save_pretrained(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def full_disk(self, text, **kwargs):
        self.write_bytes(text[:100].encode())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(remote_code.Path, "write_text", full_disk)
    with pytest.raises(OSError, match="No space left"):
        config.save_pretrained(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_trained_native_teacher_carries_its_code(tmp_path):
    from dinov3_hf.training.ssl_config import SSLConfig
    from dinov3_hf.training.teacher_folder import save_teacher_folder

    model = pretraining_model(norm_type="rmsnorm")
    args = SSLConfig(output_dir=str(tmp_path), use_cpu=True)
    save_teacher_folder(model.teacher, args, tmp_path / "teacher")
    assert "auto_classes.py" in code_in(tmp_path / "teacher")
    opened = DINOv3ViTModel.from_pretrained(tmp_path / "teacher").eval()
    with torch.no_grad():
        assert torch.equal(opened(images()).pooler_output, model.teacher.backbone(images()).pooler_output)
