"""DINOv3 ConvNeXt (arXiv 2508.10104), in the file format of the class of the same name in transformers.

Legend: B images, C channels, H x W pixels, h x w positions of a feature map, P = h * w positions of the last one,
D width of a stage; the width of the last stage is that of the tokens.
"""

import os
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BackboneOutput, BaseModelOutputWithPoolingAndNoAttention

from dinov3_hf.models.backbone_parts import convert_patch_embedding_channels, layers_asked_for
from dinov3_hf.models.dinov3_convnext.configuration_dinov3_convnext import (
    STOCK_MODEL_TYPE,
    DINOv3ConvNextConfig,
    DINOv3ConvNextNativeConfig,
)
from dinov3_hf.models.publishing import PublishingMixin
from dinov3_hf.models.remote_code import RemoteCodeMixin


class DINOv3ConvNextLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of a feature map (B, D, h, w)."""

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class DINOv3ConvNextLayer(GradientCheckpointingLayer):
    """A block: depthwise 7x7 convolution, norm, two pointwise layers with an activation between, LayerScale."""

    def __init__(self, config: DINOv3ConvNextConfig, channels: int, drop_path_rate: float) -> None:
        super().__init__()
        self.depthwise_conv = nn.Conv2d(channels, channels, kernel_size=7, padding=3, groups=channels)
        self.layer_norm = nn.LayerNorm(channels, eps=config.layer_norm_eps)
        self.pointwise_conv1 = nn.Linear(channels, 4 * channels)
        self.activation_fn = ACT2FN[config.hidden_act]
        self.pointwise_conv2 = nn.Linear(4 * channels, channels)
        has_layer_scale = config.layer_scale_init_value is not None
        self.gamma = nn.Parameter(torch.empty(channels)) if has_layer_scale else None
        self.drop_path_rate = drop_path_rate

    def forward(self, features: Tensor, draws: Tensor | None = None) -> Tensor:
        """(B, D, h, w) -> (B, D, h, w); `draws` (B,) uniform in [0, 1) decide which images the branch skips."""
        branch = self.depthwise_conv(features).permute(0, 2, 3, 1)  # (B, h, w, D)
        branch = self.pointwise_conv1(self.layer_norm(branch))  # (B, h, w, 4D)
        branch = self.pointwise_conv2(self.activation_fn(branch))  # (B, h, w, D)
        if self.gamma is not None:
            branch = branch * self.gamma
        if self.training and self.drop_path_rate > 0:
            branch = branch * self._drop_path_scale(branch, draws)
        return features + branch.permute(0, 3, 1, 2)

    def _drop_path_scale(self, branch: Tensor, draws: Tensor | None) -> Tensor:
        """Stochastic depth: per image 0 with probability p, else 1 / (1 - p), as (B, 1, 1, 1)."""
        if draws is None:
            draws = torch.rand(len(branch), device=branch.device)
        scale = (draws >= self.drop_path_rate) / (1 - self.drop_path_rate)  # (B,)
        return scale.to(branch.dtype)[:, None, None, None]


class DINOv3ConvNextStage(nn.Module):
    """Blocks of one resolution, after the layer that reduces it: the stem, or a down-sampling by two."""

    def __init__(self, config: DINOv3ConvNextConfig, index: int) -> None:
        super().__init__()
        width, eps = config.hidden_sizes[index], config.layer_norm_eps
        if index == 0:
            convolution = nn.Conv2d(config.num_channels, width, kernel_size=4, stride=4)
            layers = [convolution, DINOv3ConvNextLayerNorm(width, eps=eps)]
        else:
            width_before = config.hidden_sizes[index - 1]
            convolution = nn.Conv2d(width_before, width, kernel_size=2, stride=2)
            layers = [DINOv3ConvNextLayerNorm(width_before, eps=eps), convolution]
        self.downsample_layers = nn.ModuleList(layers)
        first, last_of_all = sum(config.depths[:index]), sum(config.depths) - 1
        ramp = config.drop_path_rate / max(last_of_all, 1)
        self.layers = nn.ModuleList(
            [DINOv3ConvNextLayer(config, width, (first + i) * ramp) for i in range(config.depths[index])]
        )

    def forward(self, features: Tensor, draws: Sequence[Tensor | None]) -> Tensor:
        """(B, D', h', w') -> (B, D, h, w); one of `draws` for each block."""
        for layer in self.downsample_layers:
            features = layer(features)
        for layer, drawn in zip(self.layers, draws, strict=True):
            features = layer(features, drawn)
        return features


class DINOv3ConvNextPreTrainedModel(PublishingMixin, RemoteCodeMixin, PreTrainedModel):
    """Initialisation, and files with the names that the class of transformers writes."""

    config_class = DINOv3ConvNextConfig
    # A prefix that no module here has: transformers strips it from names in files that carry it.
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["DINOv3ConvNextLayer"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            init.trunc_normal_(module.weight, mean=0.0, std=self.config.initializer_range, a=-2.0, b=2.0)
            init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, DINOv3ConvNextLayer) and module.gamma is not None:
            init.constant_(module.gamma, self.config.layer_scale_init_value)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Save as [`PreTrainedModel.save_pretrained`] does."""
        # Our parameters already have the names of the file; there is no conversion to revert.
        kwargs.setdefault("save_original_format", False)
        super().save_pretrained(save_directory, is_main_process=is_main_process, state_dict=state_dict, **kwargs)

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
            num_channels: Convert the stem to this number of input channels (see `set_num_channels`).
            kwargs: As in [`PreTrainedModel.from_pretrained`].
        """
        # transformers can be told to save the stages of its class as `model.stages.N`.
        kwargs["key_mapping"] = {r"^model\.stages\.": "stages.", **(kwargs.get("key_mapping") or {})}
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        if num_channels is not None:
            model = loaded[0] if kwargs.get("output_loading_info", False) else loaded
            model.set_num_channels(num_channels)
        return loaded


class DINOv3ConvNextEncoder(DINOv3ConvNextPreTrainedModel):
    """Stem and stages; the models below differ in what they return."""

    def __init__(self, config: DINOv3ConvNextConfig) -> None:
        super().__init__(_our_config(config))
        config = self.config
        config.validate_architecture()
        self.stages = nn.ModuleList([DINOv3ConvNextStage(config, index) for index in range(config.num_stages)])

    def get_input_embeddings(self) -> Any:
        return self.get_submodule("stages.0.downsample_layers.0")

    def set_num_channels(self, num_channels: int) -> None:
        """
        Let a trained network take images of another number of channels, by `convert_patch_embedding_channels`.

        Grey images (1 channel) then give the features that they gave as RGB images of three equal channels.
        """
        convolution = self.get_input_embeddings()
        if num_channels == convolution.in_channels:
            return
        weight = convert_patch_embedding_channels(convolution.weight.detach(), num_channels)
        convolution.weight = nn.Parameter(weight, requires_grad=convolution.weight.requires_grad)
        convolution.in_channels = num_channels
        self.config.num_channels = num_channels

    def encode(self, pixel_values: Tensor, collect: Collection[int], draws: Tensor | None = None) -> dict[int, Tensor]:
        """
        Feature maps of the stages in `collect`, stage index -> (B, D, h, w); later stages are not computed.

        Args:
            pixel_values: (B, C, H, W).
            collect: At least one stage index.
            draws: (blocks of all stages, B) uniform in [0, 1), what training mode would draw.
        """
        channels, stride = self.config.num_channels, self.config.stride
        if pixel_values.ndim != 4 or pixel_values.shape[1] != channels:
            raise ValueError(
                f"pixel_values of shape {tuple(pixel_values.shape)} are not (images, {channels}, height, width); "
                "for another number of channels convert the model with set_num_channels."
            )
        if min(pixel_values.shape[-2:]) < stride:
            raise ValueError(
                f"images of {tuple(pixel_values.shape[-2:])} pixels are smaller than the stride of {stride} pixels."
            )
        features = pixel_values.to(self.get_input_embeddings().weight.dtype)
        by_block = [None] * sum(self.config.depths) if draws is None else draws.unbind()
        collected: dict[int, Tensor] = {}
        for index, stage in enumerate(self.stages[: max(collect) + 1]):
            first = sum(self.config.depths[:index])
            features = stage(features, by_block[first : first + self.config.depths[index]])
            if index in collect:
                collected[index] = features
        return collected

    def to_patch_grid(self, features: Tensor, pixel_values: Tensor, patch_size: int | None) -> Tensor:
        """A feature map, resized to (B, D, H // patch_size, W // patch_size) where there is a patch size."""
        if patch_size is None:
            return features
        size = [pixels // patch_size for pixels in pixel_values.shape[-2:]]
        if min(size) == 0:
            raise ValueError(
                f"images of {tuple(pixel_values.shape[-2:])} pixels are smaller than one patch of {patch_size}."
            )
        # In float32, because antialiased resizing is not there in bfloat16 on a CPU.
        resized = F.interpolate(features.float(), size, mode="bilinear", antialias=True)
        return resized.to(features.dtype)


def _our_config(config: Any) -> DINOv3ConvNextConfig:
    """The configuration of transformers is one of ours with fewer fields."""
    if isinstance(config, DINOv3ConvNextConfig):
        return config
    if config.model_type != STOCK_MODEL_TYPE:
        raise ValueError(
            f"a {config.model_type!r} configuration does not describe a DINOv3 ConvNeXt; use DINOv3ConvNextConfig."
        )
    return DINOv3ConvNextConfig.from_dict(config.to_dict())


class DINOv3ConvNextModel(DINOv3ConvNextEncoder):
    """
    DINOv3 ConvNeXt that returns normalised tokens: the mean over the last feature map, in the place of a ViT's CLS
    token, then the positions of that map, row by row.

    It takes one batch of images, or a list of batches of different sizes, which come back as a list.
    """

    def __init__(self, config: DINOv3ConvNextConfig) -> None:
        super().__init__(config)
        self.layer_norm = nn.LayerNorm(self.config.hidden_size, eps=self.config.layer_norm_eps)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor | list[Tensor],
        bool_masked_pos: Tensor | list[Tensor | None] | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        draws: Sequence[Tensor] | None = None,
        patch_size: int | None = None,
    ) -> Any:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(B, C, H, W)`, or a list of them):
                Normalised images, or crop groups.
            bool_masked_pos (*optional*):
                Ignored, as in the original: there is no mask token. It is here so that a ConvNeXt can be called as a
                ViT is.
            output_hidden_states (`bool`, *optional*):
                Also return the images and the feature map of every stage.
            return_dict (`bool`, *optional*):
                Whether to return outputs with names, or tuples.
            draws (sequence of `torch.Tensor` of shape `(blocks of all stages, B)`, *optional*):
                For each crop group the random numbers of stochastic depth, uniform in [0, 1); by default they come
                from torch's generator. Not read in eval mode.
            patch_size (`int`, *optional*):
                Resize the last feature map to H // patch_size x W // patch_size, as `get_intermediate_layers` does
                with `config.patch_size`: so a ConvNeXt learns from a ViT, patch by patch.

        Returns:
            [`BaseModelOutputWithPoolingAndNoAttention`], or a list with one for each crop group: `last_hidden_state`
            (B, 1 + P, D) = normalised [pooled, positions], `pooler_output` (B, D) = normalised pooled. Whatever
            `config.patch_size`, the positions are those of the last feature map, unless `patch_size` is given.
        """
        config = self.config
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return_dict = config.return_dict if return_dict is None else return_dict
        last = config.num_stages - 1
        outputs = []
        is_crop_list = isinstance(pixel_values, (list, tuple))
        crops = pixel_values if is_crop_list else [pixel_values]
        for pixels, drawn in zip(crops, draws or [None] * len(crops), strict=True):
            collected = self.encode(pixels, range(last + 1) if output_hidden_states else (last,), drawn)
            positions = self.to_patch_grid(collected[last], pixels, patch_size)  # (B, D, h, w)
            tokens = self.layer_norm(_tokens(collected[last], positions))  # (B, 1 + P, D)
            output = BaseModelOutputWithPoolingAndNoAttention(
                last_hidden_state=tokens,
                pooler_output=tokens[:, 0],
                hidden_states=(pixels, *collected.values()) if output_hidden_states else None,
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
        Features of several stages, in stage order, on the patch grid if the configuration has a `patch_size`.

        Args:
            pixel_values: (B, C, H, W).
            n: The last n stages, or stage indices.
            reshape: Positions as (B, D, h, w) instead of (B, h * w, D).
            return_class_token: Also return the mean over the stage's map (before it is resized), (B, D).
            return_extra_tokens: Also return the register tokens, of which a ConvNeXt has none, (B, 0, D).
            norm: Apply the final norm to the last stage; the other stages have none.

        Returns:
            One entry a stage: the positions, or a tuple (positions, class token, extra tokens) of what was asked for.
        """
        last = self.config.num_stages - 1
        stages = layers_asked_for(n, self.config.num_stages, "stages")
        features: list[Tensor | tuple[Tensor, ...]] = []
        for stage, whole in self.encode(pixel_values, stages).items():
            resized = self.to_patch_grid(whole, pixel_values, self.config.patch_size)  # (B, D, h, w)
            tokens = _tokens(whole, resized)  # (B, 1 + h * w, D)
            if norm and stage == last:
                tokens = self.layer_norm(tokens)
            patches = tokens[:, 1:]
            if reshape:
                patches = patches.transpose(1, 2).unflatten(2, resized.shape[-2:]).contiguous()  # (B, D, h, w)
            asked = [patches]
            if return_class_token:
                asked.append(tokens[:, 0])  # (B, D)
            if return_extra_tokens:
                asked.append(tokens[:, 1:1])  # (B, 0, D)
            features.append(patches if len(asked) == 1 else tuple(asked))
        return tuple(features)


def _tokens(pooled: Tensor, positions: Tensor) -> Tensor:
    """[mean over the map `pooled`, positions of the map `positions`], two (B, D, h, w) -> (B, 1 + h * w, D)."""
    mean = pooled.mean(dim=(2, 3), keepdim=True)  # (B, D, 1, 1)
    return torch.cat((mean.flatten(2), positions.flatten(2)), dim=2).transpose(1, 2)


class DINOv3ConvNextBackbone(BackboneMixin, DINOv3ConvNextEncoder):
    """
    DINOv3 ConvNeXt that returns the feature maps named by `config.out_features`: "stem" are the images, as in
    transformers, "stage1", ... one a stage. There is no final norm.
    """

    has_attentions = False
    _keys_to_ignore_on_load_unexpected = [r"^layer_norm\."]

    def __init__(self, config: DINOv3ConvNextConfig) -> None:
        super().__init__(config)
        self.num_features = [self.config.num_channels, *self.config.hidden_sizes]
        self.post_init()

    def set_num_channels(self, num_channels: int) -> None:
        super().set_num_channels(num_channels)
        self.num_features[0] = num_channels

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(B, C, H, W)`):
                Normalised images.
            output_hidden_states, return_dict (`bool`, *optional*):
                As in [`DINOv3ConvNextModel`].

        Returns:
            [`BackboneOutput`]: `feature_maps`, each (B, D, h, w); with `config.patch_size` all of them
            (B, D, H // patch_size, W // patch_size).
        """
        config = self.config
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return_dict = config.return_dict if return_dict is None else return_dict
        wanted = [index for index, name in enumerate(self.stage_names) if name in self.out_features]
        indices = range(config.num_stages + 1) if output_hidden_states else wanted
        maps = {0: pixel_values}  # index of the stage's name -> (B, D, h, w)
        stages = [index - 1 for index in indices if index > 0]
        if stages:
            maps |= {stage + 1: features for stage, features in self.encode(pixel_values, stages).items()}
        output = BackboneOutput(
            feature_maps=tuple(self.to_patch_grid(maps[index], pixel_values, config.patch_size) for index in wanted),
            hidden_states=tuple(maps.values()) if output_hidden_states else None,
        )
        return output if return_dict else output.to_tuple()


class DINOv3ConvNextNativeModel(DINOv3ConvNextModel):
    """[`DINOv3ConvNextModel`] as `AutoModel` finds it for `dinov3_convnext_native`."""

    config_class = DINOv3ConvNextNativeConfig


class DINOv3ConvNextNativeBackbone(DINOv3ConvNextBackbone):
    """[`DINOv3ConvNextBackbone`] as `AutoBackbone` finds it for `dinov3_convnext_native`."""

    config_class = DINOv3ConvNextNativeConfig
