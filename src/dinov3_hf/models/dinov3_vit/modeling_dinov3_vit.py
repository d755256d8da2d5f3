"""DINOv3 vision transformer (arXiv 2508.10104), in the file format of the class of the same name in transformers.

Legend: B images of a crop group, C channels, H x W pixels, h x w patch grid, P = h * w patches, R register tokens,
N = 1 + R + P tokens of an image, D width, A heads, d = D / A head width, L blocks, T tokens of all images of all crop
groups. Crops of different sizes are packed into one (T, D) matrix: every token-wise layer sees that matrix, attention
runs per group. A single batch of images is the case of one group.
"""

import math
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_outputs import BackboneOutput, BaseModelOutputWithPooling
from transformers.utils import cached_file, logging

from dinov3_hf.models.backbone_parts import convert_patch_embedding_channels, layers_asked_for
from dinov3_hf.models.dinov3_vit.configuration_dinov3_vit import (
    STOCK_MODEL_TYPE,
    DINOv3ViTConfig,
    DINOv3ViTNativeConfig,
)
from dinov3_hf.models.dinov3_vit.layers import (
    CropGroup,
    DINOv3ViTEmbeddings,
    DINOv3ViTLayer,
    DINOv3ViTLayerScale,
    DINOv3ViTRMSNorm,
    ForwardDraws,
    KeptImages,
    Rotation,
    build_norm,
    num_kept,
    unpack,
)
from dinov3_hf.models.dinov3_vit.rope import (
    RopeDraws,
    RopeParameters,
    draw_bounds,
    num_drawn_tables,
    rotation_tables,
)
from dinov3_hf.models.publishing import PublishingMixin
from dinov3_hf.models.remote_code import RemoteCodeMixin

logger = logging.get_logger(__name__)

EXTRAS_NAME = "extras.safetensors"  # tensors that act in training only; the class of transformers does not know them
EXTRAS_PREFIX = "local_cls_norm."

# Every random number of a forward is given to it, or comes from these two functions, before the first block runs:
# recomputing a block for its gradient therefore repeats it exactly.


def draw_uniform(low: float, high: float, count: int, device: torch.device) -> Tensor:
    """`count` uniform numbers, float32 (count,)."""
    return torch.empty(count, dtype=torch.float32, device=device).uniform_(low, high)


def draw_permutation(n: int, device: torch.device) -> Tensor:
    """A random order of n images, int64 (n,)."""
    return torch.randperm(n, device=device)


@dataclass
class EncodedCrops:
    """What the blocks leave behind."""

    hidden_states: Tensor  # (T, D) before the final norm
    groups: tuple[CropGroup, ...]
    collected: dict[int, Tensor] = field(default_factory=dict)  # block index -> (T, D) after it; -1 is the embeddings
    attentions: list[list[Tensor | None]] = field(default_factory=list)  # [block][group] (B, A, N, N)


class DINOv3ViTPreTrainedModel(PublishingMixin, RemoteCodeMixin, PreTrainedModel):
    """Initialisation, and files: what the class of transformers knows, plus `extras.safetensors`."""

    config_class = DINOv3ViTConfig
    # A prefix that no module here has: transformers strips it from names in files that carry it.
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["DINOv3ViTEmbeddings", "DINOv3ViTLayer"]
    _keys_to_ignore_on_load_missing = [rf"^{EXTRAS_PREFIX}"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, mean=0.0, std=std, a=-2.0, b=2.0)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            bound = 1 / math.sqrt(math.prod(module.weight.shape[1:]))
            init.uniform_(module.weight, -bound, bound)
            init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, (nn.LayerNorm, DINOv3ViTRMSNorm)):
            init.ones_(module.weight)
            if isinstance(module, nn.LayerNorm):
                init.zeros_(module.bias)
        elif isinstance(module, DINOv3ViTLayerScale):
            init.constant_(module.lambda1, module.initial_value)
        elif isinstance(module, DINOv3ViTEmbeddings):
            init.normal_(module.cls_token, mean=0.0, std=std)
            init.normal_(module.register_tokens, mean=0.0, std=std)
            init.zeros_(module.mask_token)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Save as [`PreTrainedModel.save_pretrained`] does; tensors that act in training only go to a file beside."""
        tensors = self.state_dict() if state_dict is None else state_dict
        extras = {name: tensor for name, tensor in tensors.items() if name.startswith(EXTRAS_PREFIX)}
        if extras and is_main_process:  # first, so that push_to_hub takes the file along
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            save_file(
                {name: tensor.contiguous() for name, tensor in extras.items()}, Path(save_directory, EXTRAS_NAME)
            )
        known = {name: tensor for name, tensor in tensors.items() if name not in extras}
        # Our parameters already have the names of the file; there is no conversion to revert.
        kwargs.setdefault("save_original_format", False)
        super().save_pretrained(save_directory, is_main_process=is_main_process, state_dict=known, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *model_args: Any,
        num_channels: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        Load as [`PreTrainedModel.from_pretrained`] does.

        Args:
            pretrained_model_name_or_path: A folder or a Hub id.
            num_channels: Convert the patch embedding to this number of input channels (see `set_num_channels`).
            kwargs: As in [`PreTrainedModel.from_pretrained`].
        """
        # Some versions of transformers save the blocks of their class as `model.layer.N`.
        kwargs["key_mapping"] = {r"^model\.layer\.": "layer.", **(kwargs.get("key_mapping") or {})}
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        model = loaded[0] if kwargs.get("output_loading_info", False) else loaded
        if model.config.untie_global_and_local_cls_norm:
            model._load_extras(pretrained_model_name_or_path, kwargs)
        if num_channels is not None:
            model.set_num_channels(num_channels)
        return loaded


class DINOv3ViTEncoder(DINOv3ViTPreTrainedModel):
    """Embeddings, blocks and final norms; the models below differ in what they return."""

    def __init__(self, config: DINOv3ViTConfig) -> None:
        super().__init__(_our_config(config))
        config = self.config
        config.validate_architecture()
        self.rope_parameters = RopeParameters.from_config(config)
        self.embeddings = DINOv3ViTEmbeddings(config)
        self.layer = nn.ModuleList([DINOv3ViTLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = build_norm(config)
        self.cls_norm = build_norm(config) if config.untie_cls_and_patch_norms else None
        self.local_cls_norm = build_norm(config) if config.untie_global_and_local_cls_norm else None

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.patch_embeddings

    def patch_grid(self, pixel_values: Tensor) -> tuple[int, int]:
        """Rows and columns of patches of images (B, C, H, W)."""
        return pixel_values.shape[-2] // self.config.patch_size, pixel_values.shape[-1] // self.config.patch_size

    def set_num_channels(self, num_channels: int) -> None:
        """
        Let a trained network take images of another number of channels, by `convert_patch_embedding_channels`.

        Grey images (1 channel) then give the features that they gave as RGB images of three equal channels.
        """
        convolution = self.embeddings.patch_embeddings
        if num_channels == convolution.in_channels:
            return
        weight = convert_patch_embedding_channels(convolution.weight.detach(), num_channels)
        convolution.weight = nn.Parameter(weight, requires_grad=convolution.weight.requires_grad)
        convolution.in_channels = num_channels
        self.config.num_channels = num_channels

    def encode(
        self,
        crops: Sequence[Tensor],
        masks: Sequence[Tensor | None],
        collect: Collection[int] = (),
        output_attentions: bool = False,
        num_blocks: int | None = None,
        draws: ForwardDraws | None = None,
    ) -> EncodedCrops:
        """
        Embeddings and the first `num_blocks` blocks (default all) of several crop groups together.

        Args:
            crops: One (B, C, H, W) for each group.
            masks: One bool (B, P) or `None` for each group; `True` is replaced by the mask token.
            collect: Block indices whose output to keep, -1 for the embeddings.
            output_attentions: Whether to keep attention probabilities.
            draws: What training mode would draw.
        """
        if output_attentions and self.config._attn_implementation != "eager":
            logger.warning_once("output_attentions needs attention written out: this call uses it in every block.")
        tokens = [self._embed(pixels, mask) for pixels, mask in zip(crops, masks, strict=True)]  # G x (B, N, D)
        groups = tuple(CropGroup(*group.shape[:2]) for group in tokens)
        packed = [group.flatten(0, 1) for group in tokens]  # G x (B * N, D)
        hidden_states = packed[0] if len(packed) == 1 else torch.cat(packed)  # (T, D)

        if not self.training:
            draws = ForwardDraws()
        elif draws is None:
            draws = self._draw(groups, hidden_states.device)
        rotations = self._rotations([self.patch_grid(pixels) for pixels in crops], draws, hidden_states.device)
        kept = self._kept_images(groups, draws, hidden_states.device)
        encoded = EncodedCrops(hidden_states, groups)
        if -1 in collect:
            encoded.collected[-1] = hidden_states
        for index, layer in enumerate(self.layer[:num_blocks]):
            hidden_states, attentions = layer(hidden_states, groups, rotations[index], kept[index], output_attentions)
            if index in collect:
                encoded.collected[index] = hidden_states
            if output_attentions:
                encoded.attentions.append(attentions)
        encoded.hidden_states = hidden_states
        return encoded

    def final_norm(
        self, hidden_states: Tensor, groups: Sequence[CropGroup], is_crop_list: bool = False
    ) -> list[Tensor]:
        """Normalised tokens of each group, (T, D) -> G x (B, N, D)."""
        if self.cls_norm is None and not (self.local_cls_norm is not None and is_crop_list and self.training):
            return unpack(self.norm(hidden_states), groups)
        normalized = []
        for index, tokens in enumerate(unpack(hidden_states, groups)):  # (B, N, D)
            prefix_norm = self.norm if self.cls_norm is None else self.cls_norm
            if self.local_cls_norm is not None and is_crop_list and self.training and index == 1:
                prefix_norm = self.local_cls_norm
            prefix, patches = tokens.tensor_split([self.config.num_prefix_tokens], dim=1)
            normalized.append(torch.cat((prefix_norm(prefix), self.norm(patches)), dim=1))  # (B, N, D)
        return normalized

    def _load_extras(self, source: str | os.PathLike[str], kwargs: dict[str, Any]) -> None:
        names = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "subfolder")
        where = {name: kwargs[name] for name in names if name in kwargs}
        path = cached_file(source, EXTRAS_NAME, _raise_exceptions_for_missing_entries=False, **where)
        if path is None:
            logger.warning(
                f"{source} has no {EXTRAS_NAME}: local_cls_norm is newly initialised. It acts in training only; "
                "set untie_global_and_local_cls_norm=False to train without it."
            )
            return
        if self.local_cls_norm.weight.is_meta:
            # The device map has put it on disk, or on the CPU to be fetched; it is small, and stays in memory instead.
            self.local_cls_norm = build_norm(self.config).to(self.dtype)
        self.load_state_dict(load_file(path), strict=False)

    def _embed(self, pixel_values: Tensor, mask: Tensor | None) -> Tensor:
        channels, patch_size = self.config.num_channels, self.config.patch_size
        if pixel_values.ndim != 4 or pixel_values.shape[1] != channels:
            raise ValueError(
                f"pixel_values of shape {tuple(pixel_values.shape)} are not (images, {channels}, height, width); "
                "for another number of channels convert the model with set_num_channels."
            )
        height, width = self.patch_grid(pixel_values)
        if height * width == 0:
            raise ValueError(
                f"images of {tuple(pixel_values.shape[-2:])} pixels are smaller than one patch of {patch_size}."
            )
        if mask is not None and mask.shape != (pixel_values.shape[0], height * width):
            raise ValueError(
                f"bool_masked_pos of shape {tuple(mask.shape)} does not fit {pixel_values.shape[0]} images of "
                f"{height} x {width} patches; give one value for each patch."
            )
        return self.embeddings(pixel_values, mask)

    def _rotations(
        self, grids: Sequence[tuple[int, int]], draws: ForwardDraws, device: torch.device
    ) -> list[list[Rotation]]:
        """RoPE tables, [block][group]."""
        num_blocks = self.config.num_hidden_layers
        tables = [
            rotation_tables(self.rope_parameters, grid, self.config.num_prefix_tokens, drawn, device)
            for grid, drawn in zip(grids, draws.rope or [None] * len(grids), strict=True)
        ]  # G x 2 x (M, N, 1, 1, d)
        return [[(cos[block % len(cos)], sin[block % len(sin)]) for cos, sin in tables] for block in range(num_blocks)]

    def _kept_images(
        self, groups: Sequence[CropGroup], draws: ForwardDraws, device: torch.device
    ) -> list[tuple[KeptImages, KeptImages] | None]:
        """Stochastic depth, [block] (attention, FFN): a branch adds images / kept images times what it computes."""
        if draws.kept_images is None:
            return [None] * self.config.num_hidden_layers
        rows, scales, kept_groups, start = [], [], [], 0
        for group, images in zip(groups, draws.kept_images, strict=True):
            count = images.shape[-1]
            tokens = torch.arange(group.num_tokens, device=device)  # (N,)
            rows.append((start + images[..., None] * group.num_tokens + tokens).flatten(2))  # (L, 2, kept * N)
            kept_groups.append(CropGroup(count, group.num_tokens))
            scales.append(torch.full((kept_groups[-1].num_rows, 1), group.num_images / count, device=device))
            start += group.num_rows
        scale, parts = torch.cat(scales), tuple(kept_groups)  # (K, 1)
        return [
            (KeptImages(attention, scale, parts), KeptImages(mlp, scale, parts))
            for attention, mlp in (block.unbind() for block in torch.cat(rows, dim=2).unbind())
        ]

    def _draw(self, groups: Sequence[CropGroup], device: torch.device) -> ForwardDraws:
        """Numbers of this forward's own: an exact subset of each group for each branch, and RoPE augmentation."""
        config = self.config
        bounds = draw_bounds(config)
        rope: list[dict[str, list[Tensor]]] = [{name: [] for name in bounds} for _ in groups]
        for _ in range(num_drawn_tables(config)):
            for group_draws in rope:
                for name, (bound, count) in bounds.items():
                    group_draws[name].append(draw_uniform(-bound, bound, count, device))
        orders: list[list[Tensor]] = [[] for _ in groups]  # [group][2 * block + branch]
        for _ in range(2 * config.num_hidden_layers if config.drop_path_rate > 0 else 0):
            for group, group_orders in zip(groups, orders, strict=True):
                count = num_kept(group.num_images, config.drop_path_rate)
                group_orders.append(draw_permutation(group.num_images, device)[:count])
        return ForwardDraws(
            tuple(torch.stack(order).unflatten(0, (-1, 2)) for order in orders) if config.drop_path_rate > 0 else None,
            tuple(RopeDraws(**{name: torch.stack(drawn) for name, drawn in group.items()}) for group in rope)
            if bounds
            else None,
        )


def _our_config(config: Any) -> DINOv3ViTConfig:
    """The configuration of transformers is one of ours with fewer fields."""
    if isinstance(config, DINOv3ViTConfig):
        return config
    if config.model_type != STOCK_MODEL_TYPE:
        raise ValueError(f"a {config.model_type!r} configuration does not describe a DINOv3 ViT; use DINOv3ViTConfig.")
    return DINOv3ViTConfig.from_dict(config.to_dict())


class DINOv3ViTModel(DINOv3ViTEncoder):
    """
    DINOv3 ViT that returns normalised tokens.

    It takes one batch of images, or a list of batches of different sizes, which then go through the token-wise layers
    together and come back as a list; the numbers are those of separate calls.
    """

    def __init__(self, config: DINOv3ViTConfig) -> None:
        super().__init__(config)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor | list[Tensor],
        bool_masked_pos: Tensor | list[Tensor | None] | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        draws: ForwardDraws | None = None,
    ) -> Any:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(B, C, H, W)`, or a list of them):
                Normalised images, or crop groups.
            bool_masked_pos (`torch.BoolTensor` of shape `(B, P)`, or a list of them and `None`, *optional*):
                Patches to replace by the mask token.
            output_attentions (`bool`, *optional*):
                Also return attention probabilities of every block.
            output_hidden_states (`bool`, *optional*):
                Also return the embeddings and the output of every block, before the final norm.
            return_dict (`bool`, *optional*):
                Whether to return outputs with names, or tuples.
            draws (`ForwardDraws`, *optional*):
                The random numbers of training mode, on the device of the images; by default they come from torch's
                generator. Not read in eval mode.

        Returns:
            [`BaseModelOutputWithPooling`], or a list with one for each crop group: `last_hidden_state` (B, N, D) =
            normalised [CLS, registers, patches], `pooler_output` (B, D) = normalised CLS.
        """
        is_crop_list = isinstance(pixel_values, (list, tuple))
        crops = list(pixel_values) if is_crop_list else [pixel_values]
        masks = bool_masked_pos if isinstance(bool_masked_pos, (list, tuple)) else [bool_masked_pos] * len(crops)
        if (is_crop_list and isinstance(bool_masked_pos, Tensor)) or len(masks) != len(crops):
            raise ValueError(f"bool_masked_pos must be a list of {len(crops)} masks or None, one for each crop group.")
        config = self.config
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return_dict = config.return_dict if return_dict is None else return_dict

        num_blocks = config.num_hidden_layers
        collect = range(-1, num_blocks) if output_hidden_states else ()
        encoded = self.encode(crops, masks, collect, output_attentions, draws=draws)
        hidden_states = [unpack(encoded.collected[index], encoded.groups) for index in sorted(encoded.collected)]
        outputs = []
        for index, tokens in enumerate(self.final_norm(encoded.hidden_states, encoded.groups, is_crop_list)):
            output = BaseModelOutputWithPooling(
                last_hidden_state=tokens,
                pooler_output=tokens[:, 0],
                hidden_states=tuple(states[index] for states in hidden_states) if output_hidden_states else None,
                attentions=tuple(block[index] for block in encoded.attentions) if output_attentions else None,
            )
            outputs.append(output if return_dict else output.to_tuple())
        return outputs if is_crop_list else outputs[0]

    def get_intermediate_layers(
        self,
        pixel_values: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        return_extra_tokens: bool = False,
        norm: bool = True,
    ) -> tuple[Tensor | tuple[Tensor, ...], ...]:
        """
        Features of several blocks, in block order.

        Args:
            pixel_values: (B, C, H, W).
            n: The last n blocks, or block indices.
            reshape: Patches as (B, D, h, w) instead of (B, P, D).
            return_class_token: Also return CLS, (B, D).
            return_extra_tokens: Also return the register tokens, (B, R, D).
            norm: Apply the final norm to every block's output.

        Returns:
            One entry a block: the patches, or a tuple (patches, class token, extra tokens) of what was asked for.
        """
        blocks = layers_asked_for(n, self.config.num_hidden_layers, "blocks")
        encoded = self.encode([pixel_values], [None], blocks, num_blocks=blocks[-1] + 1)
        features: list[Tensor | tuple[Tensor, ...]] = []
        for block in blocks:
            packed = encoded.collected[block]  # (B * N, D)
            tokens = (self.final_norm if norm else unpack)(packed, encoded.groups)[0]  # (B, N, D)
            patches = tokens[:, self.config.num_prefix_tokens :]  # (B, P, D)
            if reshape:
                patches = (
                    patches.transpose(1, 2).unflatten(2, self.patch_grid(pixel_values)).contiguous()
                )  # (B, D, h, w)
            asked = [patches]
            if return_class_token:
                asked.append(tokens[:, 0])  # (B, D)
            if return_extra_tokens:
                asked.append(tokens[:, 1 : self.config.num_prefix_tokens])  # (B, R, D)
            features.append(patches if len(asked) == 1 else tuple(asked))
        return tuple(features)


@dataclass
class DINOv3ViTBackboneOutput(BackboneOutput):
    """
    Args:
        cls_tokens (`tuple(torch.FloatTensor)`, *optional*):
            CLS token (B, D) of each feature map, with `config.return_class_token`.
    """

    cls_tokens: tuple[Tensor, ...] | None = None


class DINOv3ViTBackbone(BackboneMixin, DINOv3ViTEncoder):
    """DINOv3 ViT that returns the feature maps named by `config.out_features` ("stem", "stage1", ... one a block)."""

    def __init__(self, config: DINOv3ViTConfig) -> None:
        super().__init__(config)
        self.num_features = [config.hidden_size] * (config.num_hidden_layers + 1)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(B, C, H, W)`):
                Normalised images.
            output_hidden_states, output_attentions, return_dict (`bool`, *optional*):
                As in [`DINOv3ViTModel`].

        Returns:
            [`DINOv3ViTBackboneOutput`]: `feature_maps`, each (B, D, h, w), or (B, P, D) without
            `config.reshape_hidden_states`, then (B, 1 + P, D) with `config.class_token_in_feature_maps`. The last
            block's always has the final norm, the others with `config.apply_layernorm`.
        """
        config = self.config
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return_dict = config.return_dict if return_dict is None else return_dict

        last = config.num_hidden_layers - 1
        stages = {name: index - 1 for index, name in enumerate(self.stage_names) if name in self.out_features}
        collect = range(-1, last + 1) if output_hidden_states else stages.values()
        encoded = self.encode([pixel_values], [None], collect, output_attentions)

        feature_maps, cls_tokens = [], []
        for block in stages.values():
            normalize = self.final_norm if config.apply_layernorm or block == last else unpack
            tokens = normalize(encoded.collected[block], encoded.groups)[0]  # (B, N, D)
            patches = tokens[:, config.num_prefix_tokens :]  # (B, P, D)
            if config.reshape_hidden_states:
                patches = (
                    patches.transpose(1, 2).unflatten(2, self.patch_grid(pixel_values)).contiguous()
                )  # (B, D, h, w)
            elif config.class_token_in_feature_maps:
                patches = torch.cat((tokens[:, :1], patches), dim=1)  # (B, 1 + P, D)
            feature_maps.append(patches)
            cls_tokens.append(tokens[:, 0])  # (B, D)
        hidden_states = [unpack(encoded.collected[index], encoded.groups)[0] for index in sorted(encoded.collected)]
        output = DINOv3ViTBackboneOutput(
            feature_maps=tuple(feature_maps),
            cls_tokens=tuple(cls_tokens) if config.return_class_token else None,
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
            attentions=tuple(block[0] for block in encoded.attentions) if output_attentions else None,
        )
        return output if return_dict else output.to_tuple()


class DINOv3ViTNativeModel(DINOv3ViTModel):
    """[`DINOv3ViTModel`] as `AutoModel` finds it for `dinov3_vit_native`."""

    config_class = DINOv3ViTNativeConfig


class DINOv3ViTNativeBackbone(DINOv3ViTBackbone):
    """[`DINOv3ViTBackbone`] as `AutoBackbone` finds it for `dinov3_vit_native`."""

    config_class = DINOv3ViTNativeConfig
