"""Registration with the `Auto*` classes of transformers. No other file touches these registries.

What `transformers` itself opens stays as it is: `AutoModel` on a folder or Hub id of model type `dinov3_vit` or
`dinov3_convnext` returns the class of transformers, unless `register_auto_classes(override_native=True)` was called.
"""

from transformers import (
    CONFIG_MAPPING,
    AutoBackbone,
    AutoConfig,
    AutoModel,
    AutoModelForPreTraining,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)

from dinov3_hf.models.dinotxt.configuration_dinotxt import DinoTxtConfig, DinoTxtTextConfig, DinoTxtVisionConfig
from dinov3_hf.models.dinotxt.modeling_dinotxt import DinoTxtModel, DinoTxtTextModel, DinoTxtVisionModel
from dinov3_hf.models.dinotxt.processing_dinotxt import DinoTxtProcessor
from dinov3_hf.models.dinotxt.tokenization_dinotxt import DinoTxtTokenizer
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
from dinov3_hf.models.dinov3_vit.configuration_dinov3_vit import (
    DINOv3ViTConfig,
    DINOv3ViTNativeConfig,
)
from dinov3_hf.models.dinov3_vit.modeling_dinov3_vit import (
    DINOv3ViTBackbone,
    DINOv3ViTModel,
    DINOv3ViTNativeBackbone,
    DINOv3ViTNativeModel,
)

# Backbones: configuration, model and backbone classes of a model type of ours.
BackboneClasses = tuple[type[PreTrainedConfig], type[PreTrainedModel], type[PreTrainedModel]]
NATIVE_BACKBONES: tuple[BackboneClasses, ...] = (
    (DINOv3ViTNativeConfig, DINOv3ViTNativeModel, DINOv3ViTNativeBackbone),
    (DINOv3ConvNextNativeConfig, DINOv3ConvNextNativeModel, DINOv3ConvNextNativeBackbone),
)
# The same under a model type that transformers has too.
STOCK_BACKBONES: tuple[BackboneClasses, ...] = (
    (DINOv3ViTConfig, DINOv3ViTModel, DINOv3ViTBackbone),
    (DINOv3ConvNextConfig, DINOv3ConvNextModel, DINOv3ConvNextBackbone),
)
# What is trained without labels: configuration and model class.
TRAINING_MODELS: tuple[tuple[type[PreTrainedConfig], type[PreTrainedModel]], ...] = (
    (DINOv3PreTrainingConfig, DINOv3ForPreTraining),
    (DINOv3DistillationConfig, DINOv3ForDistillation),
)
# Images with text: configuration and model class; the first is the whole model, with a processor and a tokenizer.
TEXT_MODELS: tuple[tuple[type[PreTrainedConfig], type[PreTrainedModel]], ...] = (
    (DinoTxtConfig, DinoTxtModel),
    (DinoTxtTextConfig, DinoTxtTextModel),
    (DinoTxtVisionConfig, DinoTxtVisionModel),
)


def register_auto_classes(override_native: bool = False) -> None:
    """
    Let the `Auto*` classes find our model types. `import dinov3_hf` has done this already.

    Args:
        override_native: Also open `dinov3_vit` and `dinov3_convnext` folders and Hub ids with our classes, in this
            process.

    Raises:
        ValueError: transformers or another package has one of our model types.
    """
    if DINOv3PreTrainingConfig not in _registered:
        for config_class, model_class, backbone_class in NATIVE_BACKBONES:
            _register_configuration(config_class)
            AutoModel.register(config_class, model_class)
            AutoBackbone.register(config_class, backbone_class)
        for config_class, model_class in TRAINING_MODELS:
            _register_configuration(config_class)
            AutoModelForPreTraining.register(config_class, model_class)
        for config_class, model_class in TEXT_MODELS:
            _register_configuration(config_class)
            AutoModel.register(config_class, model_class)
        AutoModelForZeroShotImageClassification.register(DinoTxtConfig, DinoTxtModel)
        AutoProcessor.register(DinoTxtConfig, DinoTxtProcessor)
        AutoTokenizer.register(DinoTxtConfig, fast_tokenizer_class=DinoTxtTokenizer)
        # These configurations have the name of one in transformers, which looks classes up by name where it finds no
        # entry: without these entries `from_config` would build that class. Its own configuration is not touched.
        for config_class, model_class, backbone_class in STOCK_BACKBONES:
            AutoModel.register(config_class, model_class, exist_ok=True)
            AutoBackbone.register(config_class, backbone_class, exist_ok=True)
        _registered.add(DINOv3PreTrainingConfig)
    if override_native:
        for config_class, _, _ in STOCK_BACKBONES:
            AutoConfig.register(config_class.model_type, config_class, exist_ok=True)


def _register_configuration(config_class: type[PreTrainedConfig]) -> None:
    model_type = config_class.model_type
    # Looked up here because AutoConfig.register replaces what another package has registered without a word.
    if model_type in CONFIG_MAPPING:
        raise ValueError(
            f"model type {model_type!r} is taken by {CONFIG_MAPPING[model_type]}; "
            "do not import that package and dinov3_hf into one process."
        )
    AutoConfig.register(model_type, config_class)


_registered: set[type[PreTrainedConfig]] = set()

register_auto_classes()
