"""Registration with the `Auto*` classes of transformers. No other file touches these registries.

What `transformers` itself opens stays as it is: `AutoModel` on a folder or Hub id of model type `dinov3_vit` returns
the class of transformers, unless `register_auto_classes(override_native=True)` was called.
"""

from transformers import (
    CONFIG_MAPPING,
    AutoBackbone,
    AutoConfig,
    AutoModel,
    AutoModelForPreTraining,
    PreTrainedConfig,
)

from dinov3_hf.models.dinov3_pretraining.configuration_dinov3_pretraining import DINOv3PreTrainingConfig
from dinov3_hf.models.dinov3_pretraining.modeling_dinov3_pretraining import DINOv3ForPreTraining
from dinov3_hf.models.dinov3_vit.configuration_dinov3_vit import (
    NATIVE_MODEL_TYPE,
    STOCK_MODEL_TYPE,
    DINOv3ViTConfig,
    DINOv3ViTNativeConfig,
)
from dinov3_hf.models.dinov3_vit.modeling_dinov3_vit import (
    DINOv3ViTBackbone,
    DINOv3ViTModel,
    DINOv3ViTNativeBackbone,
    DINOv3ViTNativeModel,
)


def register_auto_classes(override_native: bool = False) -> None:
    """
    Let the `Auto*` classes find our model types. `import dinov3_hf` has done this already.

    Args:
        override_native: Also open `dinov3_vit` folders and Hub ids with our classes, in this process.

    Raises:
        ValueError: transformers or another package has one of our model types.
    """
    if NATIVE_MODEL_TYPE not in _registered:
        _register_configuration(DINOv3ViTNativeConfig)
        AutoModel.register(DINOv3ViTNativeConfig, DINOv3ViTNativeModel)
        AutoBackbone.register(DINOv3ViTNativeConfig, DINOv3ViTNativeBackbone)
        _register_configuration(DINOv3PreTrainingConfig)
        AutoModelForPreTraining.register(DINOv3PreTrainingConfig, DINOv3ForPreTraining)
        # Our configuration has the name of the one in transformers, which looks classes up by name where it finds no
        # entry: without these entries `from_config` would build that class. Its own configuration is not touched.
        AutoModel.register(DINOv3ViTConfig, DINOv3ViTModel, exist_ok=True)
        AutoBackbone.register(DINOv3ViTConfig, DINOv3ViTBackbone, exist_ok=True)
        _registered.add(NATIVE_MODEL_TYPE)
    if override_native:
        AutoConfig.register(STOCK_MODEL_TYPE, DINOv3ViTConfig, exist_ok=True)


def _register_configuration(config_class: type[PreTrainedConfig]) -> None:
    model_type = config_class.model_type
    # Looked up here because AutoConfig.register replaces what another package has registered without a word.
    if model_type in CONFIG_MAPPING:
        raise ValueError(
            f"model type {model_type!r} is taken by {CONFIG_MAPPING[model_type]}; "
            "do not import that package and dinov3_hf into one process."
        )
    AutoConfig.register(model_type, config_class)


_registered: set[str] = set()

register_auto_classes()
