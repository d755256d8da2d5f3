"""DINOv3 for the Hugging Face ecosystem.

`import dinov3_hf` registers our model types with the `Auto*` classes of transformers. The public names below are
imported from their modules when they are first used.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dinov3_hf.auto import register_auto_classes
    from dinov3_hf.models.dinotxt.configuration_dinotxt import DinoTxtConfig, DinoTxtTextConfig, DinoTxtVisionConfig
    from dinov3_hf.models.dinotxt.modeling_dinotxt import DinoTxtModel, DinoTxtTextModel, DinoTxtVisionModel
    from dinov3_hf.models.dinotxt.processing_dinotxt import DinoTxtProcessor
    from dinov3_hf.models.dinotxt.tokenization_dinotxt import DinoTxtTokenizer
    from dinov3_hf.models.dinov3_convnext.configuration_dinov3_convnext import DINOv3ConvNextConfig
    from dinov3_hf.models.dinov3_convnext.modeling_dinov3_convnext import DINOv3ConvNextBackbone, DINOv3ConvNextModel
    from dinov3_hf.models.dinov3_pretraining.configuration_dinov3_distillation import DINOv3DistillationConfig
    from dinov3_hf.models.dinov3_pretraining.configuration_dinov3_pretraining import DINOv3PreTrainingConfig
    from dinov3_hf.models.dinov3_pretraining.modeling_dinov3_distillation import DINOv3ForDistillation
    from dinov3_hf.models.dinov3_pretraining.modeling_dinov3_pretraining import DINOv3ForPreTraining
    from dinov3_hf.models.dinov3_vit.configuration_dinov3_vit import DINOv3ViTConfig
    from dinov3_hf.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTBackbone, DINOv3ViTModel
    from dinov3_hf.training.ssl_config import SSLConfig
    from dinov3_hf.training.ssl_trainer import SSLTrainer

__version__ = "0.1.0.dev0"

__all__ = [
    "DINOv3ConvNextBackbone",
    "DINOv3ConvNextConfig",
    "DINOv3ConvNextModel",
    "DINOv3DistillationConfig",
    "DINOv3ForDistillation",
    "DINOv3ForPreTraining",
    "DINOv3PreTrainingConfig",
    "DINOv3ViTBackbone",
    "DINOv3ViTConfig",
    "DINOv3ViTModel",
    "DinoTxtConfig",
    "DinoTxtModel",
    "DinoTxtProcessor",
    "DinoTxtTextConfig",
    "DinoTxtTextModel",
    "DinoTxtTokenizer",
    "DinoTxtVisionConfig",
    "DinoTxtVisionModel",
    "DistillationConfig",
    "DistillationTrainer",
    "SSLConfig",
    "SSLTrainer",
    "register_auto_classes",
]

_MODULES = {
    "DINOv3ConvNextBackbone": "dinov3_hf.models.dinov3_convnext.modeling_dinov3_convnext",
    "DINOv3ConvNextConfig": "dinov3_hf.models.dinov3_convnext.configuration_dinov3_convnext",
    "DINOv3ConvNextModel": "dinov3_hf.models.dinov3_convnext.modeling_dinov3_convnext",
    "DINOv3DistillationConfig": "dinov3_hf.models.dinov3_pretraining.configuration_dinov3_distillation",
    "DINOv3ForDistillation": "dinov3_hf.models.dinov3_pretraining.modeling_dinov3_distillation",
    "DINOv3ForPreTraining": "dinov3_hf.models.dinov3_pretraining.modeling_dinov3_pretraining",
    "DINOv3PreTrainingConfig": "dinov3_hf.models.dinov3_pretraining.configuration_dinov3_pretraining",
    "DINOv3ViTBackbone": "dinov3_hf.models.dinov3_vit.modeling_dinov3_vit",
    "DINOv3ViTConfig": "dinov3_hf.models.dinov3_vit.configuration_dinov3_vit",
    "DINOv3ViTModel": "dinov3_hf.models.dinov3_vit.modeling_dinov3_vit",
    "DinoTxtConfig": "dinov3_hf.models.dinotxt.configuration_dinotxt",
    "DinoTxtModel": "dinov3_hf.models.dinotxt.modeling_dinotxt",
    "DinoTxtProcessor": "dinov3_hf.models.dinotxt.processing_dinotxt",
    "DinoTxtTextConfig": "dinov3_hf.models.dinotxt.configuration_dinotxt",
    "DinoTxtTextModel": "dinov3_hf.models.dinotxt.modeling_dinotxt",
    "DinoTxtTokenizer": "dinov3_hf.models.dinotxt.tokenization_dinotxt",
    "DinoTxtVisionConfig": "dinov3_hf.models.dinotxt.configuration_dinotxt",
    "DinoTxtVisionModel": "dinov3_hf.models.dinotxt.modeling_dinotxt",
    "DistillationConfig": "dinov3_hf.training.distillation_config",
    "DistillationTrainer": "dinov3_hf.training.distillation_trainer",
    "SSLConfig": "dinov3_hf.training.ssl_config",
    "SSLTrainer": "dinov3_hf.training.ssl_trainer",
    "register_auto_classes": "dinov3_hf.auto",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value  # the next use finds it without coming here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _is_our_command_line() -> bool:
    """Whether this process is `dinov3-hf` or `python -m dinov3_hf`.

    These import what their command needs and nothing more: `dinov3-hf --help` answers without torch, whose import
    alone takes longer than an answer should. Every other process gets the registrations at import.
    """
    script = sys.argv[0].replace("\\", "/").rsplit("/", 1)[-1] if sys.argv else ""
    if script == "-m":  # what Python puts there while it looks for the module to run
        return "dinov3_hf" in sys.orig_argv
    return script.removesuffix(".exe") == "dinov3-hf"


if not _is_our_command_line():
    import_module("dinov3_hf.auto")  # registers when it is imported
