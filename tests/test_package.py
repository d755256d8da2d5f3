"""`import dinov3_hf`: what it costs, which names it has, what it registers with transformers."""

import json

import pytest
import torch
import transformers
from transformers import (
    CONFIG_MAPPING,
    AutoBackbone,
    AutoConfig,
    AutoModel,
    AutoModelForPreTraining,
    AutoModelForZeroShotImageClassification,
    PreTrainedConfig,
)

import dinov3_hf
from dinov3_hf.auto import _register_configuration
from dinov3_hf.models.dinotxt.configuration_dinotxt import DinoTxtConfig, DinoTxtTextConfig, DinoTxtVisionConfig
from dinov3_hf.models.dinotxt.modeling_dinotxt import DinoTxtModel
from dinov3_hf.models.dinov3_convnext.configuration_dinov3_convnext import (
    DINOv3ConvNextConfig,
    DINOv3ConvNextNativeConfig,
)
from dinov3_hf.models.dinov3_convnext.modeling_dinov3_convnext import (
    DINOv3ConvNextBackbone,
    DINOv3ConvNextModel,
    DINOv3ConvNextNativeBackbone,
    DINOv3ConvNextNativeModel,
)
from dinov3_hf.models.dinov3_pretraining.configuration_dinov3_distillation import DINOv3DistillationConfig
from dinov3_hf.models.dinov3_pretraining.configuration_dinov3_pretraining import DINOv3PreTrainingConfig
from dinov3_hf.models.dinov3_pretraining.modeling_dinov3_distillation import DINOv3ForDistillation
from dinov3_hf.models.dinov3_pretraining.modeling_dinov3_pretraining import DINOv3ForPreTraining
from dinov3_hf.models.dinov3_vit.configuration_dinov3_vit import DINOv3ViTConfig, DINOv3ViTNativeConfig
from dinov3_hf.models.dinov3_vit.modeling_dinov3_vit import (
    DINOv3ViTBackbone,
    DINOv3ViTModel,
    DINOv3ViTNativeBackbone,
    DINOv3ViTNativeModel,
)
from tests.models.dinotxt.tiny import tiny_config
from tests.models.dinov3_convnext.tiny import TINY as CONVNEXT
from tests.models.dinov3_vit.tiny import TINY, images, tiny_model
from tests.testing_utils import run_python

STOCK = "transformers.models.dinov3_vit."
HEAD = {"num_prototypes": 24, "bottleneck_dim": 8, "hidden_dim": 16}


def run_code(code: str, *arguments, run=run_python) -> dict:
    """What the program prints as JSON in its last line."""
    done = run("-c", f"import json, sys\n{code}", *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# ---- names -------------------------------------------------------------------------------------------------------


def test_every_public_name_is_there():
    assert set(dinov3_hf.__all__) <= set(dir(dinov3_hf))
    for name in dinov3_hf.__all__:
        value = getattr(dinov3_hf, name)
        assert value.__name__ == name
        assert value.__module__ == dinov3_hf._MODULES[name]
        assert dinov3_hf.__dict__[name] is value
    with pytest.raises(AttributeError, match="module 'dinov3_hf' has no attribute 'DINOv3'"):
        dinov3_hf.DINOv3  # noqa: B018
    with pytest.raises(ImportError):
        from dinov3_hf import SSLTrainr  # noqa: F401


def test_names_for_type_checkers_are_the_names_of_the_module():
    assert sorted(dinov3_hf._MODULES) == sorted(dinov3_hf.__all__) == dinov3_hf.__all__


# ---- cost --------------------------------------------------------------------------------------------------------


def test_import_loads_models_and_nothing_else():
    """Beside torch, the Auto classes, stock's modeling file, and bases of tokenizers and processors, only modules of
    ours: the code of the models."""
    loaded, lazily = run_code(
        "import torch\n"
        "from transformers import AutoBackbone, AutoModel, AutoModelForPreTraining\n"
        "from transformers import AutoModelForZeroShotImageClassification, AutoProcessor, AutoTokenizer\n"
        "from transformers import PreTrainedTokenizerFast, ProcessorMixin\n"
        f"import {STOCK}modeling_dinov3_vit\n"
        "before = set(sys.modules)\n"
        "import dinov3_hf\n"
        "loaded = set(sys.modules) - before\n"
        "from dinov3_hf import SSLConfig\n"
        "print(json.dumps([sorted(loaded), sorted(set(sys.modules) - before - loaded)]))"
    )
    assert "dinov3_hf.models.dinov3_vit.modeling_dinov3_vit" in loaded
    assert {name.split(".")[0] for name in loaded} == {"dinov3_hf"}
    rooms = {name.split(".")[1] for name in loaded if "." in name}
    assert rooms == {"auto", "models", "objectives", "distributed"}
    assert "dinov3_hf.training.ssl_config" in lazily


# ---- registration ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("auto_class", "config", "expected"),
    [
        (AutoModel, DINOv3ViTConfig(**TINY), DINOv3ViTModel),
        (AutoBackbone, DINOv3ViTConfig(**TINY), DINOv3ViTBackbone),
        (AutoModel, DINOv3ConvNextConfig(**CONVNEXT), DINOv3ConvNextModel),
        (AutoBackbone, DINOv3ConvNextConfig(**CONVNEXT), DINOv3ConvNextBackbone),
        (AutoModel, DINOv3ConvNextNativeConfig(**CONVNEXT, patch_size=16), DINOv3ConvNextNativeModel),
        (AutoBackbone, DINOv3ConvNextNativeConfig(**CONVNEXT, patch_size=16), DINOv3ConvNextNativeBackbone),
        (AutoModel, DINOv3ViTNativeConfig(**TINY, norm_type="rmsnorm"), DINOv3ViTNativeModel),
        (AutoBackbone, DINOv3ViTNativeConfig(**TINY, norm_type="rmsnorm"), DINOv3ViTNativeBackbone),
        (
            AutoModelForPreTraining,
            DINOv3PreTrainingConfig(backbone_config=TINY, dino_head=HEAD, ibot_head=HEAD),
            DINOv3ForPreTraining,
        ),
        (
            AutoModelForPreTraining,
            DINOv3DistillationConfig(
                backbone_config=TINY, dino_head=HEAD, ibot_head=HEAD, patch_size=TINY["patch_size"]
            ),
            DINOv3ForDistillation,
        ),
        (AutoModel, tiny_config(), DinoTxtModel),
        (AutoModelForZeroShotImageClassification, tiny_config(), DinoTxtModel),
    ],
)
def test_our_configurations_build_our_models(auto_class, config, expected):
    model = auto_class.from_config(config, attn_implementation="eager")
    assert type(model) is expected
    assert {module.config._attn_implementation for module in model.modules() if hasattr(module, "config")} == {"eager"}


def test_our_model_types_are_known():
    assert type(AutoConfig.for_model("dinov3_vit_native")) is DINOv3ViTNativeConfig
    assert type(AutoConfig.for_model("dinov3_convnext_native")) is DINOv3ConvNextNativeConfig
    assert type(AutoConfig.for_model("dinov3_pretraining")) is DINOv3PreTrainingConfig
    assert type(AutoConfig.for_model("dinov3_distillation")) is DINOv3DistillationConfig
    assert type(AutoConfig.for_model("dinotxt_text")) is DinoTxtTextConfig
    assert type(AutoConfig.for_model("dinotxt_vision")) is DinoTxtVisionConfig
    assert type(AutoConfig.for_model("dinotxt")) is DinoTxtConfig


def test_entries_of_stock_are_untouched():
    config = AutoConfig.for_model("dinov3_vit", **TINY)
    assert type(config) is transformers.DINOv3ViTConfig
    assert type(AutoModel.from_config(config)) is transformers.DINOv3ViTModel
    assert type(AutoBackbone.from_config(config)) is transformers.DINOv3ViTBackbone
    config = AutoConfig.for_model("dinov3_convnext", **CONVNEXT)
    assert type(config) is transformers.DINOv3ConvNextConfig
    assert type(AutoModel.from_config(config)) is transformers.DINOv3ConvNextModel
    assert type(AutoBackbone.from_config(config)) is transformers.DINOv3ConvNextBackbone


def test_folders_open_with_the_class_of_their_type(tmp_path):
    tiny_model().save_pretrained(tmp_path / "stock")
    tiny_model(norm_type="rmsnorm").save_pretrained(tmp_path / "native")
    assert type(AutoModel.from_pretrained(tmp_path / "stock")) is transformers.DINOv3ViTModel
    assert type(AutoModel.from_pretrained(tmp_path / "native")) is DINOv3ViTNativeModel


def test_a_pretraining_model_opens_with_its_auto_class(tmp_path):
    config = DINOv3PreTrainingConfig(backbone_config=TINY, dino_head=HEAD, ibot_head=HEAD)
    model = DINOv3ForPreTraining(config)
    with torch.no_grad():
        model.teacher.backbone.norm.weight.add_(1)  # no longer a copy of the student
    model.save_pretrained(tmp_path)
    loaded = AutoModelForPreTraining.from_pretrained(tmp_path)
    assert type(loaded) is DINOv3ForPreTraining
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in loaded.teacher.parameters())


def test_registering_again_changes_nothing():
    dinov3_hf.register_auto_classes()
    test_entries_of_stock_are_untouched()


def test_override_native(forks, tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    torch.save(images(), tmp_path / "images.pt")
    found = run_code(
        "import torch, transformers\n"
        "from transformers import AutoBackbone, AutoConfig, AutoModel\n"
        "import dinov3_hf\n"
        "before = type(AutoModel.from_pretrained(sys.argv[1])).__module__\n"
        "for _ in range(2):\n"
        "    dinov3_hf.register_auto_classes(override_native=True)\n"
        "config, model = AutoConfig.from_pretrained(sys.argv[1]), AutoModel.from_pretrained(sys.argv[1])\n"
        "built = AutoModel.from_config(config), AutoBackbone.from_config(config)\n"
        "by_hand = transformers.DINOv3ViTModel.from_pretrained(sys.argv[1])\n"
        "pixels = torch.load(sys.argv[1] + '/images.pt')\n"
        "with torch.no_grad():\n"
        "    checksum = model(pixels).pooler_output.sum().item()\n"
        "classes = [type(each).__module__ for each in (config, model, *built, by_hand)]\n"
        "print(json.dumps([before, classes, checksum]))",
        tmp_path,
        run=forks.run,
    )
    before, classes, checksum = found
    assert before == f"{STOCK}modeling_dinov3_vit"
    ours = "dinov3_hf.models.dinov3_vit."
    modeling = f"{ours}modeling_dinov3_vit"
    assert classes == [f"{ours}configuration_dinov3_vit", *[modeling] * 3, f"{STOCK}modeling_dinov3_vit"]
    assert checksum == pytest.approx(model(images()).pooler_output.sum().item(), rel=1e-5)


@pytest.mark.parametrize("config_class", [DINOv3ViTNativeConfig, DINOv3PreTrainingConfig, DINOv3DistillationConfig])
def test_a_model_type_that_is_taken_fails_loudly(config_class, monkeypatch):
    class Other(PreTrainedConfig):
        model_type = f"{config_class.model_type}_of_another_package"

    ours = type("Ours", (config_class,), {"model_type": Other.model_type})
    monkeypatch.setitem(CONFIG_MAPPING._extra_content, Other.model_type, Other)  # what register does, undone
    with pytest.raises(ValueError, match=f"model type '{Other.model_type}' is taken by .*Other"):
        _register_configuration(ours)
    assert CONFIG_MAPPING[Other.model_type] is Other
