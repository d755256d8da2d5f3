"""Whether the weights of one backbone mean the same in another."""

from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedConfig

from dinov3_hf.models.dinov3_pretraining.backbones import own_annotations

# Without a say in what patch tokens a trained network computes: training noise, initial values, shapes of outputs.
_OTHER_PURPOSES = frozenset(
    (
        *("image_size", "initializer_range", "attention_dropout", "drop_path_rate", "layer_scale_init_value"),
        *("pos_embed_shift", "pos_embed_jitter", "pos_embed_rescale", "rope_augmentation_per_block"),
        *("apply_layernorm", "reshape_hidden_states", "return_class_token", "class_token_in_feature_maps"),
        *("layerscale_value", "untie_global_and_local_cls_norm", "num_labels"),
    )
)


def network_differences(here: PreTrainedConfig, there: PreTrainedConfig) -> Iterator[tuple[str, Any, Any]]:
    """Fields (name, value here, value there) by which two backbones compute different functions of their weights.

    The kind of backbone comes first, and then alone.
    """
    families = [config.model_type.removesuffix("_native") for config in (here, there)]
    if families[0] != families[1]:
        yield "model_type", *families
        return
    for name in own_annotations(type(here)):
        one, other = here.__dict__[name], there.__dict__.get(name)
        if name not in _OTHER_PURPOSES and one != other:
            yield name, one, other
