"""dino.txt (arXiv 2412.16334): a text tower learns to describe what a frozen DINOv3 backbone sees.

Two blocks on top of the backbone and the text tower are trained so that an image and its caption have similar
embeddings. The embedding of an image is [CLS, mean of the patches]; the second half of a text's embedding can thus be
compared with every single patch.

Legend: B images or texts, C channels, H x W pixels, P patches, N tokens of an image (CLS, registers, patches), T
tokens of a text, D width of a tower, D' width of the vision head's tokens, E width of the shared space, L blocks of
the vision head, K images that go through a branch.
"""

import os
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput, can_return_tuple

from dinov3_hf.models.dinotxt.configuration_dinotxt import DinoTxtConfig, DinoTxtTextConfig, DinoTxtVisionConfig
from dinov3_hf.models.dinotxt.layers import BlockShape, DinoTxtLayer
from dinov3_hf.models.dinov3_pretraining.backbones import build_backbone
from dinov3_hf.models.dinov3_vit.layers import DINOv3ViTLayerScale, num_kept
from dinov3_hf.models.remote_code import RemoteCodeMixin
from dinov3_hf.objectives.contrastive import contrastive_loss
from dinov3_hf.objectives.gram import gram_loss

# Where files are, among the arguments of `from_pretrained`.
_WHERE = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "subfolder")


@dataclass
class DinoTxtVisionOutput(BaseModelOutputWithPooling):
    """
    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(B, N, D')`):
            Tokens of the head: CLS, registers, patches. The patches are aligned with texts.
        pooler_output (`torch.FloatTensor` of shape `(B, E)`):
            Embeddings of the images, not normalised.
        backbone_tokens (`torch.FloatTensor` of shape `(B, N, D)`):
            What the frozen backbone gave to the head.
    """

    backbone_tokens: Tensor | None = None


@dataclass
class DinoTxtOutput(ModelOutput):
    """
    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*):
            The contrastive loss, plus `gram_weight` times the Gram loss.
        losses (`dict[str, torch.FloatTensor]`, *optional*):
            The terms without their weights: `contrastive` and, when it has a weight, `gram`.
        logits_per_image (`torch.FloatTensor` of shape `(images, texts)`):
            Cosine of each image with each text, times the logit scale.
        logits_per_text (`torch.FloatTensor` of shape `(texts, images)`):
            The same, transposed.
        text_embeds, image_embeds (`torch.FloatTensor` of shape `(B, E)`):
            Normalised embeddings.
    """

    loss: Tensor | None = None
    losses: dict[str, Tensor] | None = None
    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    text_embeds: Tensor | None = None
    image_embeds: Tensor | None = None


class DinoTxtPreTrainedModel(RemoteCodeMixin, PreTrainedModel):
    """What the three models have in common."""

    config_class = DinoTxtConfig
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["DinoTxtLayer", "DINOv3ViTEmbeddings", "DINOv3ViTLayer", "DINOv3ConvNextLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, DINOv3ViTLayerScale):
            init.constant_(module.lambda1, module.initial_value)

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Save as [`PreTrainedModel.save_pretrained`] does."""
        # Our parameters already have the names of the file. Some versions of transformers would revert to all names
        # of the model what they do to those of a DINOv3 backbone, and save `text_layer` for `text_model.layer`.
        kwargs.setdefault("save_original_format", False)
        super().save_pretrained(save_directory, *args, **kwargs)


class DinoTxtTextModel(DinoTxtPreTrainedModel):
    """
    The text tower: a causal transformer, and a linear map of one token's features to the shared space.

    There is no padding mask: what stands after the end of a text cannot be seen from there.
    """

    config_class = DinoTxtTextConfig
    base_model_prefix = "text_model"
    main_input_name = "input_ids"
    input_modalities = ("text",)
    _keys_to_ignore_on_load_unexpected = [r"^vision_model\.", r"^logit_scale$"]

    def __init__(self, config: DinoTxtTextConfig) -> None:
        super().__init__(config)
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Parameter(torch.empty(config.max_position_embeddings, config.hidden_size))
        shape = _text_block(config)
        self.layer = nn.ModuleList([DinoTxtLayer(shape, config) for _ in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        head_shape = _text_head_block(config)
        self.head_layer = nn.ModuleList([DinoTxtLayer(head_shape, config) for _ in range(config.num_head_layers)])
        has_head = config.num_head_layers > 0
        self.head_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if has_head else nn.Identity()
        self.projection = _projection(config.hidden_size, config.projection_dim)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As CLIP's text tower (arXiv 2103.00020, published code)."""
        super()._init_weights(module)
        width, std = self.config.hidden_size, self.config.initializer_range
        layers = (*self.layer, *self.head_layer)
        if isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=std)
        elif module is self:
            init.normal_(self.position_embedding, std=std / 2)
        elif isinstance(module, nn.Linear):
            inside = any(module is layer.mlp.up_proj for layer in layers)
            back = any(module is layer.mlp.down_proj for layer in layers)
            if inside:
                init.normal_(module.weight, std=(2 * width) ** -0.5)
            elif back or any(module is layer.attention.o_proj for layer in layers):
                init.normal_(module.weight, std=(2 * width * self.config.num_hidden_layers) ** -0.5)
            else:
                init.normal_(module.weight, std=width**-0.5)
            if inside or back:
                bound = module.in_features**-0.5
                init.uniform_(module.bias, -bound, bound)
            elif module.bias is not None:
                init.zeros_(module.bias)

    def get_input_embeddings(self) -> nn.Module:
        return self.token_embedding

    @can_return_tuple
    def forward(self, input_ids: Tensor, output_hidden_states: bool | None = None) -> BaseModelOutputWithPooling:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(B, T)`):
                Start, text, end, and padding on the right; T is at most `config.max_position_embeddings`.
            output_hidden_states (`bool`, *optional*):
                Also return the embeddings, and the output of every block of the tower before its final norm.

        Returns:
            [`BaseModelOutputWithPooling`]: `last_hidden_state` (B, T, D), normalised tokens before the linear map;
            `pooler_output` (B, E), embeddings of the texts, not normalised.
        """
        config = self.config
        if input_ids.ndim != 2 or not 0 < input_ids.shape[1] <= config.max_position_embeddings:
            raise ValueError(
                f"input_ids of shape {tuple(input_ids.shape)} are not (texts, 1 to {config.max_position_embeddings} "
                "tokens); let the processor truncate long texts."
            )
        if config.pooling == "last":
            missing = config.max_position_embeddings - input_ids.shape[1]
            input_ids = F.pad(
                input_ids, (0, missing), value=config.pad_token_id
            )  # the last token is that of the context
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        tokens = self.token_embedding(input_ids) + self.position_embedding[: input_ids.shape[1]]  # (B, T, D)
        hidden_states = [tokens]
        for layer in self.layer:
            tokens = layer(tokens)
            hidden_states.append(tokens)
        tokens = self.norm(tokens)
        for layer in self.head_layer:
            tokens = layer(tokens)
        tokens = self.head_norm(tokens)  # (B, T, D)
        positions = input_ids.argmax(dim=1) if config.pooling == "argmax" else torch.full_like(input_ids[:, 0], -1)
        pooled = tokens[torch.arange(len(tokens), device=tokens.device), positions]  # (B, D)
        return BaseModelOutputWithPooling(
            last_hidden_state=tokens,
            pooler_output=self.projection(pooled),
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
        )


class DinoTxtVisionModel(DinoTxtPreTrainedModel):
    """
    A DINOv3 backbone, and blocks on top of it that see all of its tokens.

    The backbone has no gradient and stays in eval mode; the blocks are trained.
    """

    config_class = DinoTxtVisionConfig
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)

    def __init__(self, config: DinoTxtVisionConfig) -> None:
        super().__init__(config)
        self.backbone = build_backbone(config.backbone_config)
        shape = BlockShape(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_attention_heads=config.num_attention_heads,
            layer_norm_eps=config.layer_norm_eps,
            hidden_act="silu",
            use_gated_mlp=True,
            layerscale_value=config.layerscale_value,
        )
        self.layer = nn.ModuleList([DinoTxtLayer(shape, config) for _ in range(config.num_head_layers)])
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.projection = _projection(config.hidden_size, config.projection_dim)
        self.post_init()
        self._freeze()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, mean=0.0, std=0.02, a=-2.0, b=2.0)
            if module.bias is not None:
                init.zeros_(module.bias)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """
        Load as [`PreTrainedModel.from_pretrained`] does; out of the folder of a whole [`DinoTxtModel`], this tower.

        The whole model is then loaded first: some versions of transformers lose the backbone where they take the
        tower's names out of it.
        """
        where = {name: kwargs[name] for name in _WHERE if name in kwargs}
        fields, _ = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, **where)
        if fields.get("model_type") != DinoTxtConfig.model_type:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        loaded: Any = DinoTxtModel.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        if kwargs.get("output_loading_info", False):
            return loaded[0].vision_model, loaded[1]
        return loaded.vision_model

    def train(self, mode: bool = True) -> "DinoTxtVisionModel":
        super().train(mode)
        self._freeze()  # from_pretrained, which ends with eval(), makes parameters anew
        return self

    def _freeze(self) -> None:
        self.backbone.eval()
        self.backbone.requires_grad_(False)

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    @torch.no_grad()
    def get_backbone_tokens(self, pixel_values: Tensor) -> Tensor:
        """What the frozen backbone makes of images (B, C, H, W): normalised tokens (B, N, D), without a gradient."""
        tokens: Tensor = self.backbone(pixel_values).last_hidden_state
        return tokens

    def patch_tokens(self, tokens: Tensor) -> Tensor:
        """The patches among the tokens of images: (B, N, D) -> (B, P, D)."""
        return tokens[:, self.config.num_prefix_tokens :]

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        backbone_tokens: Tensor | None = None,
        kept_images: Tensor | None = None,
    ) -> DinoTxtVisionOutput:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(B, C, H, W)`, *optional*):
                Normalised images.
            backbone_tokens (`torch.Tensor` of shape `(B, N, D)`, *optional*):
                `get_backbone_tokens` of the images, where they are known already.
            kept_images (`torch.LongTensor` of shape `(L, 2, K)`, *optional*):
                In training with stochastic depth: the images that go through the attention and the FFN of each block.
                By default they are drawn. Not read in eval mode.

        Returns:
            [`DinoTxtVisionOutput`].
        """
        if (pixel_values is None) == (backbone_tokens is None):
            raise ValueError("give either pixel_values or backbone_tokens.")
        if backbone_tokens is None:
            backbone_tokens = self.get_backbone_tokens(pixel_values)
        kept = self._kept_images(backbone_tokens, kept_images)
        tokens = backbone_tokens
        for layer, kept_of_layer in zip(self.layer, kept, strict=True):
            tokens = layer(tokens, kept_of_layer)
        tokens = self.projection(self.norm(tokens))  # (B, N, D')
        parts = []
        if self.config.use_class_token:
            parts.append(tokens[:, 0])
        if self.config.use_patch_tokens:
            parts.append(self.patch_tokens(tokens).mean(dim=1))
        return DinoTxtVisionOutput(
            last_hidden_state=tokens,
            pooler_output=torch.cat(parts, dim=-1),  # (B, E)
            backbone_tokens=backbone_tokens,
        )

    def _kept_images(self, tokens: Tensor, given: Tensor | None) -> list[Tensor | None]:
        """Stochastic depth: for each block (2, K), or None where all images go through it."""
        rate = self.config.drop_path_rate
        if not self.training or rate == 0:
            return [None] * len(self.layer)
        if given is not None:
            return list(given.unbind())
        count = num_kept(len(tokens), rate)
        # Drawn before the first block runs: recomputing a block for its gradient repeats it exactly.
        return [
            torch.stack([torch.randperm(len(tokens), device=tokens.device)[:count] for _ in range(2)])
            for _ in self.layer
        ]


class DinoTxtModel(DinoTxtPreTrainedModel):
    """Both towers, and the factor of their similarities."""

    config_class = DinoTxtConfig
    base_model_prefix = "dinotxt"
    main_input_name = "input_ids"

    def __init__(self, config: DinoTxtConfig) -> None:
        super().__init__(config)
        self.text_model = DinoTxtTextModel(config.text_config)
        self.vision_model = DinoTxtVisionModel(config.vision_config)
        self.logit_scale = nn.Parameter(torch.empty(1))  # logarithm
        self.post_init()
        self.vision_model._freeze()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            init.constant_(self.logit_scale, self.config.logit_scale_init_value)

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.get_input_embeddings()

    @can_return_tuple
    def get_text_features(
        self, input_ids: Tensor, output_hidden_states: bool | None = None
    ) -> BaseModelOutputWithPooling:
        """[`DinoTxtTextModel`] of texts (B, T); `pooler_output` (B, E) are embeddings, not normalised."""
        return self.text_model(input_ids, output_hidden_states, return_dict=True)

    @can_return_tuple
    def get_image_features(self, pixel_values: Tensor) -> DinoTxtVisionOutput:
        """[`DinoTxtVisionModel`] of images (B, C, H, W); `pooler_output` (B, E) are embeddings, not normalised."""
        return self.vision_model(pixel_values, return_dict=True)

    def get_patch_features(self, pixel_values: Tensor) -> Tensor:
        """
        Features of patches that can be compared with texts, by their cosine with `text_features_of_patches`.

        They come from the head; the backbone's own patches are not aligned with text.

        Args:
            pixel_values: (B, C, H, W).

        Returns:
            (B, P, D'), row by row of the patch grid, not normalised.
        """
        output = self.vision_model(pixel_values, return_dict=True)
        return self.vision_model.patch_tokens(output.last_hidden_state)

    def text_features_of_patches(self, text_features: Tensor) -> Tensor:
        """
        The part of texts' embeddings that patches are compared with: (B, E) -> (B, D').

        Raises:
            ValueError: Patches take no part in an image's embedding.
        """
        config = self.config.vision_config
        if not config.use_patch_tokens:
            raise ValueError("patches are not aligned with text: the model was made with use_patch_tokens=False.")
        return text_features[..., -config.token_dim :]

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        backbone_tokens: Tensor | None = None,
        return_loss: bool = False,
        gram_weight: float = 0.0,
        kept_images: Tensor | None = None,
    ) -> DinoTxtOutput:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(texts, T)`):
                As in [`DinoTxtTextModel`].
            pixel_values, backbone_tokens, kept_images (`torch.Tensor`, *optional*):
                As in [`DinoTxtVisionModel`].
            return_loss (`bool`, *optional*, defaults to `False`):
                Also compute the loss; text i then belongs to image i. Its negatives are those of all processes.
            gram_weight (`float`, *optional*, defaults to 0.0):
                Weight of the Gram loss, which keeps the similarities of the head's patches at those of the backbone's
                patches. At 0 it is not computed.

        Returns:
            [`DinoTxtOutput`].
        """
        text = self.text_model(input_ids, return_dict=True)
        image = self.vision_model(pixel_values, backbone_tokens, kept_images, return_dict=True)
        text_embeds = F.normalize(text.pooler_output, dim=-1)  # (texts, E)
        image_embeds = F.normalize(image.pooler_output, dim=-1)  # (images, E)
        scale = self.logit_scale.exp()
        loss = losses = None
        if return_loss:
            losses = {"contrastive": contrastive_loss(image_embeds, text_embeds, scale)}
            loss = losses["contrastive"]
            if gram_weight > 0:
                head, backbone = (
                    self.vision_model.patch_tokens(tokens)
                    for tokens in (image.last_hidden_state, image.backbone_tokens)
                )
                losses["gram"] = gram_loss(head, backbone)
                loss = loss + gram_weight * losses["gram"]
        logits_per_text = text_embeds @ image_embeds.T * scale.to(text_embeds.dtype)  # (texts, images)
        return DinoTxtOutput(
            loss=loss,
            losses=losses,
            logits_per_image=logits_per_text.T,
            logits_per_text=logits_per_text,
            text_embeds=text_embeds,
            image_embeds=image_embeds,
        )


def _text_block(config: DinoTxtTextConfig) -> BlockShape:
    return BlockShape(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        layer_norm_eps=config.layer_norm_eps,
        hidden_act=config.hidden_act,
        layerscale_value=config.layerscale_value,
        is_causal=config.is_causal,
    )


def _text_head_block(config: DinoTxtTextConfig) -> BlockShape:
    return replace(
        _text_block(config),
        intermediate_size=config.head_intermediate_size,
        layerscale_value=None,
        is_causal=config.head_is_causal,
    )


def _projection(width: int, projection_dim: int | None) -> nn.Module:
    return nn.Identity() if projection_dim is None else nn.Linear(width, projection_dim, bias=False)
