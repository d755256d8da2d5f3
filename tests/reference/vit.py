"""Kinds vit, vit_rope_augmentation, vit_drop_path, rope_table."""

import re
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from dinov3_hf.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTModel
from dinov3_hf.models.dinov3_vit.rope import RopeDraws, RopeParameters, rope_periods, rope_tables

from .compare import Comparison, refuse_unknown
from .io import Case
from .native import RecordedDraws, build_vit, vit_config

# Constructor arguments of the original's RoPE, without the prefix that they have in its ViT.
ROPE_SIZES = ("embed_dim", "num_heads")
ROPE_OPTIONS = (
    *("base", "min_period", "max_period", "normalize_coords"),
    *("shift_coords", "jitter_coords", "rescale_coords"),
)
ROPE_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


@torch.no_grad()
def check_vit(case: Case, compare: Comparison) -> None:
    """Forwards in eval mode on every image, with and without mask; crop lists in eval and in training mode."""
    model = build_vit(case.constructor, case.weights).eval()
    tags = case.config["image_tags"]
    for tag in tags:
        image, mask = case.inputs[f"image_{tag}"], case.inputs.get(f"mask_{tag}")
        unmasked = model(image, output_hidden_states=True)
        _check_features(compare, f"eval/forward_features/{tag}/unmasked", model, unmasked)
        compare.check(f"eval/call/{tag}", unmasked.pooler_output)
        if mask is not None:
            masked = model(image, mask, output_hidden_states=True)
            _check_features(compare, f"eval/forward_features/{tag}/masked", model, masked)
        cos, sin = rope_tables(model.rope_parameters, model.patch_grid(image))  # (1, P, d)
        compare.check(f"eval/rope/{tag}/cos", cos[0])
        compare.check(f"eval/rope/{tag}/sin", sin[0])
        _check_intermediate_layers(compare, tag, model, image)
    if "local_crops" in case.inputs:
        crops = [case.inputs[f"image_{tags[0]}"], case.inputs["local_crops"]]
        masks = [case.inputs.get(f"mask_{tags[0]}"), None]
        _check_crop_list(compare, "eval", model, crops, masks)
        with RecordedDraws(case.inputs).replayed():
            _check_crop_list(compare, "train", model.train(), crops, masks)


@torch.no_grad()
def check_vit_with_draws(case: Case, compare: Comparison) -> None:
    """A forward in training mode on two crop groups that replays the recorded random numbers."""
    model = build_vit(case.constructor, case.weights).train()
    draws = RecordedDraws(case.inputs)
    with draws.replayed():
        _check_crop_list(compare, "train", model, [case.inputs["image"], case.inputs["local_crops"]], [None, None])
    if draws.bounds:
        compare.check("draw_low_high_count", torch.tensor(draws.bounds, dtype=torch.float64))


@torch.no_grad()
def check_rope_table(case: Case, compare: Comparison) -> None:
    """Tables with and without augmentation, and between which bounds the augmentation is drawn."""
    native = case.constructor
    refuse_unknown("constructor", native, (*ROPE_SIZES, *ROPE_OPTIONS))
    config = vit_config(
        {
            **{name: native[name] for name in ROPE_SIZES},
            **{f"pos_embed_rope_{name}": native[name] for name in ROPE_OPTIONS if name in native},
            "pos_embed_rope_dtype": ROPE_DTYPES[case.config.get("rope_dtype", "float32")],
            "depth": 1,
            "patch_size": 1,
        }
    )
    names = {"shift": "shift_uniform", "jitter": "jitter_log_uniform", "rescale": "rescale_log_uniform"}
    recorded = {ours: case.inputs[name] for ours, name in names.items() if name in case.inputs}
    grid = tuple(case.config["grid"])
    parameters = RopeParameters.from_config(config)
    compare.check("periods", rope_periods(parameters))
    augmentation = RopeDraws(**{name: values[None] for name, values in recorded.items()})
    for mode, draws in (("train", augmentation), ("eval", None)):
        cos, sin = rope_tables(parameters, grid, draws)  # (1, P, d)
        compare.check(f"{mode}/cos", cos[0])
        compare.check(f"{mode}/sin", sin[0])

    replay = RecordedDraws({f"draw_{index}": values for index, values in enumerate(recorded.values())})
    with replay.replayed():
        DINOv3ViTModel(config).train()(torch.zeros(1, 3, *grid))
    compare.check("uniform_bounds", torch.tensor([bounds[:2] for bounds in replay.bounds], dtype=torch.float64))


def _check_features(
    compare: Comparison, prefix: str, model: DINOv3ViTModel, output: BaseModelOutputWithPooling
) -> None:
    """The native feature dictionary."""
    num_prefix_tokens = model.config.num_prefix_tokens
    compare.check(f"{prefix}/x_norm_clstoken", output.pooler_output)
    compare.check(f"{prefix}/x_storage_tokens", output.last_hidden_state[:, 1:num_prefix_tokens])
    compare.check(f"{prefix}/x_norm_patchtokens", output.last_hidden_state[:, num_prefix_tokens:])
    compare.check(f"{prefix}/x_prenorm", output.hidden_states[-1])


def _check_crop_list(
    compare: Comparison, mode: str, model: DINOv3ViTModel, crops: list[Tensor], masks: Sequence[Tensor | None]
) -> None:
    for index, output in enumerate(model(crops, bool_masked_pos=list(masks), output_hidden_states=True)):
        _check_features(compare, f"{mode}/forward_features_list/{index}", model, output)


def _check_intermediate_layers(compare: Comparison, tag: str, model: DINOv3ViTModel, image: Tensor) -> None:
    """Every recorded selection; its options are in the names of the outputs."""
    pattern = re.compile(
        rf"eval/intermediate/{re.escape(tag)}/n(?P<blocks>\d+(_\d+)*)(?P<is_list>_list)?"
        r"/(norm_(?P<norm>True|False)/(?P<index>\d+)/(?P<what>patches|class|extra)|(?P<reshape>reshape))"
    )
    for name in compare.expected:
        match = pattern.fullmatch(name)
        if match is None:
            continue
        blocks = [int(block) for block in match["blocks"].split("_")]
        layers = model.get_intermediate_layers(
            image,
            blocks if match["is_list"] else blocks[0],
            reshape=match["reshape"] is not None,
            return_class_token=True,
            return_extra_tokens=True,
            norm=match["norm"] != "False",
        )
        entry = dict(zip(("patches", "class", "extra"), layers[int(match["index"] or 0)], strict=True))
        compare.check(name, entry[match["what"] or "patches"])
