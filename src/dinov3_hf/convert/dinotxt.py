"""dino.txt: the original checkpoints ("native") <-> the file format of our models.

Functions of state dicts and settings; they neither read nor write files. The released file holds the head and the text
tower; the backbone lies beside it, in a file of its own, or with them under `visual_model.backbone.`.

Letters: D width of a tower.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from torch import Tensor

from dinov3_hf.convert import dinov3_vit
from dinov3_hf.convert.dinov3_vit_from_tensors import read_config as read_vit_config
from dinov3_hf.convert.file_format import Converted, Tensors
from dinov3_hf.convert.key_map import KeyMap
from dinov3_hf.convert.lazy_tensor import LazyTensor, concatenate, read_all
from dinov3_hf.models.dinotxt.configuration_dinotxt import DinoTxtConfig, DinoTxtTextConfig, DinoTxtVisionConfig

Value = TypeVar("Value")

NATIVE_BACKBONE, BACKBONE = "visual_model.backbone.", "vision_model.backbone."
# Width of a head of the released text tower; a native file does not say it.
TEXT_HEAD_DIM = 64
RELEASED = "dinov3_vitl16_dinotxt_tet1280d20h24l"


def _text_blocks(native: str, ours: str) -> list[tuple[str, str]]:
    """Rows of one text block."""
    return [
        (f"{native}.{{i}}.attention_norm.{{p}}", f"{ours}.{{i}}.norm1.{{p}}"),
        (f"{native}.{{i}}.attention.q.weight", f"{ours}.{{i}}.attention.q_proj.weight"),
        (f"{native}.{{i}}.attention.k.weight", f"{ours}.{{i}}.attention.k_proj.weight"),
        (f"{native}.{{i}}.attention.v.weight", f"{ours}.{{i}}.attention.v_proj.weight"),
        (f"{native}.{{i}}.attention.proj.{{p}}", f"{ours}.{{i}}.attention.o_proj.{{p}}"),
        (f"{native}.{{i}}.ls1.gamma", f"{ours}.{{i}}.layer_scale1.lambda1"),
        (f"{native}.{{i}}.ffn_norm.{{p}}", f"{ours}.{{i}}.norm2.{{p}}"),
        (f"{native}.{{i}}.feed_forward.fc1.{{p}}", f"{ours}.{{i}}.mlp.up_proj.{{p}}"),
        (f"{native}.{{i}}.feed_forward.fc2.{{p}}", f"{ours}.{{i}}.mlp.down_proj.{{p}}"),
        (f"{native}.{{i}}.ls2.gamma", f"{ours}.{{i}}.layer_scale2.lambda1"),
    ]


# Native name, with qkv split into q, k and v -> ours; without the backbone.
KEYS = KeyMap(
    [
        ("logit_scale", "logit_scale"),
        ("visual_model.head.blocks.{i}.norm1.{p}", "vision_model.layer.{i}.norm1.{p}"),
        ("visual_model.head.blocks.{i}.attn.q.weight", "vision_model.layer.{i}.attention.q_proj.weight"),
        ("visual_model.head.blocks.{i}.attn.k.weight", "vision_model.layer.{i}.attention.k_proj.weight"),
        ("visual_model.head.blocks.{i}.attn.v.weight", "vision_model.layer.{i}.attention.v_proj.weight"),
        ("visual_model.head.blocks.{i}.attn.proj.{p}", "vision_model.layer.{i}.attention.o_proj.{p}"),
        ("visual_model.head.blocks.{i}.ls1.gamma", "vision_model.layer.{i}.layer_scale1.lambda1"),
        ("visual_model.head.blocks.{i}.norm2.{p}", "vision_model.layer.{i}.norm2.{p}"),
        ("visual_model.head.blocks.{i}.mlp.w1.{p}", "vision_model.layer.{i}.mlp.gate_proj.{p}"),
        ("visual_model.head.blocks.{i}.mlp.w2.{p}", "vision_model.layer.{i}.mlp.up_proj.{p}"),
        ("visual_model.head.blocks.{i}.mlp.w3.{p}", "vision_model.layer.{i}.mlp.down_proj.{p}"),
        ("visual_model.head.blocks.{i}.ls2.gamma", "vision_model.layer.{i}.layer_scale2.lambda1"),
        ("visual_model.head.ln_final.{p}", "vision_model.norm.{p}"),
        ("visual_model.head.linear_projection.weight", "vision_model.projection.weight"),
        ("text_model.backbone.token_embedding.weight", "text_model.token_embedding.weight"),
        ("text_model.backbone.positional_embedding", "text_model.position_embedding"),
        *_text_blocks("text_model.backbone.blocks", "text_model.layer"),
        ("text_model.backbone.ln_final.{p}", "text_model.norm.{p}"),
        *_text_blocks("text_model.head.blocks", "text_model.head_layer"),
        ("text_model.head.ln_final.{p}", "text_model.head_norm.{p}"),
        ("text_model.head.linear_projection.weight", "text_model.projection.weight"),
    ]
)

# Settings of the original of which we have one value only.
_ONLY_VALUES: dict[str, Any] = {
    "vision_model_freeze_backbone": True,
    "vision_model_patch_tokens_pooler_type": "mean",
    "vision_model_patch_token_layer": 1,
    "text_model_head_blocks_drop_prob": 0.0,
    "dropout_prob": 0.0,
}


def config_from_native(
    backbone: Mapping[str, Any], text: Mapping[str, Any], model: Mapping[str, Any]
) -> DinoTxtConfig:
    """
    The configuration of a model given by the original's settings.

    Args:
        backbone: Constructor arguments of the vision transformer.
        text: Settings of the text tower.
        model: Settings of the model around both.

    Raises:
        ValueError: A setting has a value that we have no network for.
    """
    for name, only in _ONLY_VALUES.items():
        given = {**text, **model}.get(name, only)
        if given != only:
            raise ValueError(f"{name} {given!r} is not supported; the released models have {only!r}.")
    embed_dim = model["embed_dim"]
    uses = (model["vision_model_use_class_token"], model["vision_model_use_patch_tokens"])
    return DinoTxtConfig(
        text_config=DinoTxtTextConfig(
            vocab_size=text["vocab_size"],
            max_position_embeddings=text["context_length"],
            hidden_size=text["dim"],
            intermediate_size=int(text["dim"] * text["ffn_ratio"]),
            num_hidden_layers=text["num_layers"],
            num_attention_heads=text["num_heads"],
            layerscale_value=text["ls_init_value"] or None,
            is_causal=text["is_causal"],
            num_head_layers=model["text_model_num_head_blocks"],
            head_is_causal=model["text_model_head_blocks_is_causal"],
            pooling=model["text_model_tokens_pooler_type"],
            projection_dim=embed_dim if model["text_model_use_linear_projection"] else None,
            bos_token_id=text["vocab_size"] - 2,
            eos_token_id=text["vocab_size"] - 1,
        ),
        vision_config=DinoTxtVisionConfig(
            backbone_config=dinov3_vit.config_from_native(backbone),
            num_head_layers=model["vision_model_num_head_blocks"],
            drop_path_rate=model["vision_model_head_blocks_drop_path"],
            use_class_token=uses[0],
            use_patch_tokens=uses[1],
            projection_dim=embed_dim // sum(uses) if model["vision_model_use_linear_projection"] else None,
        ),
    )


def recognises(names: Collection[str]) -> bool:
    """Whether these are parameters of a native dino.txt, with or without its backbone."""
    return "text_model.backbone.token_embedding.weight" in names and "visual_model.head.ln_final.weight" in names


def read_config(native: Tensors) -> DinoTxtConfig:
    """
    The configuration of the model that the tensors are of, with settings of the released one where they do not tell.

    Raises:
        ValueError: There is no backbone, the tensors contradict each other, or do not tell the number of heads.
    """
    backbone = _part(native, NATIVE_BACKBONE)
    if not backbone:
        raise ValueError("the checkpoint has no backbone, only the head and the text tower; give its backbone too.")
    vocab_size, width = native["text_model.backbone.token_embedding.weight"].shape
    heads, left = divmod(width, TEXT_HEAD_DIM)
    if left:
        raise ValueError(f"the text tower is {width} wide, which no heads of width {TEXT_HEAD_DIM} make up.")
    text_projection = native.get("text_model.head.linear_projection.weight")
    vision_projection = native.get("visual_model.head.linear_projection.weight")
    vision = DinoTxtVisionConfig(
        backbone_config=read_vit_config(backbone),
        num_head_layers=_num_blocks(native, "visual_model.head.blocks"),
        projection_dim=None if vision_projection is None else vision_projection.shape[0],
    )
    num_head_layers = _num_blocks(native, "text_model.head.blocks")
    return DinoTxtConfig(
        text_config=DinoTxtTextConfig(
            vocab_size=vocab_size,
            max_position_embeddings=native["text_model.backbone.positional_embedding"].shape[0],
            hidden_size=width,
            intermediate_size=native["text_model.backbone.blocks.0.feed_forward.fc1.weight"].shape[0],
            num_hidden_layers=_num_blocks(native, "text_model.backbone.blocks"),
            num_attention_heads=heads,
            layerscale_value=1e-5 if "text_model.backbone.blocks.0.ls1.gamma" in native else None,
            num_head_layers=num_head_layers,
            projection_dim=None if text_projection is None else text_projection.shape[0],
            bos_token_id=vocab_size - 2,
            eos_token_id=vocab_size - 1,
        ),
        vision_config=vision,
    )


def to_hf(native: Tensors, config: DinoTxtConfig) -> Converted:
    """
    Our state dict; see `FileFormat`.

    Raises:
        ValueError: A name does not belong to this network, or a value contradicts `config`.
    """
    backbone = dinov3_vit.to_hf(_part(native, NATIVE_BACKBONE), _vision(config).backbone_config)
    split: dict[str, LazyTensor] = {}
    for name, tensor in native.items():
        if name.endswith(".qkv.weight") and not name.startswith(NATIVE_BACKBONE):  # (3D, D)
            parts = zip("qkv", tensor.chunk(3), strict=True)
            split |= {name.replace(".qkv.", f".{part}."): third for part, third in parts}
        elif not name.startswith(NATIVE_BACKBONE):
            split[name] = tensor
    acting = {n: t for n, t in backbone.extras.items() if not n.startswith(dinov3_vit.WAY_BACK)}
    way_back = {n.removeprefix(dinov3_vit.WAY_BACK): t for n, t in backbone.extras.items() if n not in acting}
    return Converted(
        # What acts in training only is in the model's own file: no class of transformers opens it.
        tensors=KEYS.apply(split) | _prefixed(backbone.tensors | acting, BACKBONE),
        extras=_prefixed(way_back, f"{dinov3_vit.WAY_BACK}{NATIVE_BACKBONE}"),
        derived=_prefixed(backbone.derived, BACKBONE),
        dropped=_prefixed(backbone.dropped, NATIVE_BACKBONE),
        differences=backbone.differences,
    )


def from_hf(ours: Tensors, config: DinoTxtConfig) -> Converted:
    """
    A native state dict, with the backbone; see `FileFormat`.

    Raises:
        ValueError: A name does not belong to this network, or the original has no such backbone.
    """
    if _vision(config).is_convolutional:
        raise ValueError("the original's dino.txt has a ViT as its backbone; keep this model in its own format.")
    way_back = _prefixed(_part(ours, f"{dinov3_vit.WAY_BACK}{NATIVE_BACKBONE}"), dinov3_vit.WAY_BACK)
    backbone = dinov3_vit.from_hf(_part(ours, BACKBONE) | way_back, _vision(config).backbone_config)
    others = {n: t for n, t in ours.items() if not n.startswith((BACKBONE, dinov3_vit.WAY_BACK))}
    tensors: dict[str, LazyTensor] = {}
    split = KEYS.inverse().apply(others)
    for name, tensor in split.items():
        if re.search(r"\.(attn|attention)\.q\.", name):
            thirds = [split[re.sub(r"\.q\.weight$", f".{part}.weight", name)] for part in "qkv"]
            tensors[name.replace(".q.weight", ".qkv.weight")] = concatenate(thirds)  # (3D, D)
        elif not re.search(r"\.(attn|attention)\.[kv]\.", name):
            tensors[name] = tensor
    return Converted(
        tensors=tensors | _prefixed(backbone.tensors, NATIVE_BACKBONE),
        derived=_prefixed(backbone.derived, NATIVE_BACKBONE),
        dropped=_prefixed(backbone.dropped, BACKBONE),
        differences=backbone.differences,
    )


def architecture(config: DinoTxtConfig) -> str | None:
    """The original's name of the released architecture."""
    vision, text = _vision(config), _text(config)
    same_backbone = not vision.is_convolutional and dinov3_vit.architecture(vision.backbone_config) == "dinov3_vitl16"
    released_head = DinoTxtVisionConfig(backbone_config=vision.backbone_config).to_dict()
    same = vision.to_dict() == released_head and text.to_dict() == DinoTxtTextConfig().to_dict()
    return RELEASED if same_backbone and same else None


def state_dict_from_native(native: Mapping[str, Tensor], config: DinoTxtConfig) -> dict[str, Tensor]:
    """
    The state dict of our model from a native one; dtypes stay as they are.

    Raises:
        ValueError: As `to_hf`.
    """
    converted = to_hf({name: LazyTensor.of(tensor) for name, tensor in native.items()}, config)
    # Cloned, because thirds of one matrix share its memory.
    return {name: tensor.read().clone() for name, tensor in converted.tensors.items()}


def state_dict_to_native(ours: Mapping[str, Tensor], config: DinoTxtConfig) -> dict[str, Tensor]:
    """
    A native state dict, with the backbone's buffers, from that of our model; dtypes stay as they are.

    Raises:
        ValueError: As `from_hf`.
    """
    return read_all(from_hf({name: LazyTensor.of(tensor) for name, tensor in ours.items()}, config).tensors)


def _vision(config: DinoTxtConfig) -> Any:
    """The configuration is complete once it has been made; the type of the field says what may be given."""
    return config.vision_config


def _text(config: DinoTxtConfig) -> Any:
    return config.text_config


def _part(tensors: Tensors, prefix: str) -> dict[str, LazyTensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _prefixed(values: Mapping[str, Value], prefix: str) -> dict[str, Value]:
    return {f"{prefix}{name}": value for name, value in values.items()}


def _num_blocks(native: Tensors, prefix: str) -> int:
    pattern = re.compile(rf"{re.escape(prefix)}\.(\d+)\.")
    return len({match[1] for name in native if (match := pattern.match(name))})
