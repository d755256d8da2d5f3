"""The student's side of a step, which pre-training and distillation share.

Letters: B images of the batch, G = 2 global and n local crops of each, C channels, D width, N patches of a global
crop, M masked patches of the batch, K prototypes of the DINO head, K' of the iBOT head. Crops are stacked crop-major:
all images' first crop, then all images' second crop.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from dinov3_hf.models.dinov3_pretraining.backbones import build_backbone, patch_grid
from dinov3_hf.models.dinov3_pretraining.configuration_dinov3_pretraining import (
    NUM_GLOBAL_CROPS,
    DINOv3PreTrainingConfig,
)
from dinov3_hf.models.dinov3_pretraining.prototype_head import PrototypeHead
from dinov3_hf.models.dinov3_pretraining.teacher_targets import TeacherTargets
from dinov3_hf.models.remote_code import RemoteCodeMixin
from dinov3_hf.objectives.dino import dino_loss
from dinov3_hf.objectives.ibot import ibot_loss
from dinov3_hf.objectives.koleo import koleo_loss


@dataclass
class StudentPredictions:
    """What the student says of global crops, masked in pre-training, and of local crops."""

    cls: Tensor  # (G, B, D) normalised CLS tokens of the global crops
    global_logits: Tensor  # (G, B, K)
    local_logits: Tensor  # (n, B, K)
    masked_logits: Tensor | None  # (M, K')
    patches: Tensor  # (G*B, N, D) normalised patch tokens of the global crops


@dataclass
class DINOv3PreTrainingOutput(ModelOutput):
    """
    Args:
        loss (`torch.FloatTensor` of shape `()`):
            Weighted sum of the loss terms.
        losses (`dict[str, torch.FloatTensor]`):
            The unweighted terms: `dino_global`, `dino_local` (when there are local crops), `ibot` (when it has a
            weight), `koleo`, `gram` (when it has a weight); where a teacher's features are the targets `cls`,
            `cls_local`, `patches` in the place of the first three.
        prototype_entropy (`dict[str, torch.FloatTensor]`):
            For each head, `dino` and `ibot`, how evenly the teacher uses its prototypes: 1 evenly, 0 all samples on
            one. Empty where features are the targets.
    """

    loss: Tensor | None = None
    losses: dict[str, Tensor] | None = None
    prototype_entropy: dict[str, Tensor] | None = None


class SSLNetwork(nn.Module):
    """
    A backbone with its prototype heads; student and teacher are one each. Its children are `backbone`, `dino_head`
    and, where L_iBOT has a weight, `ibot_head`.
    """

    def __init__(self, config: DINOv3PreTrainingConfig) -> None:
        super().__init__()
        self.backbone = build_backbone(config.backbone_config)
        width = config.backbone_config.hidden_size
        self.dino_head = PrototypeHead(width, **config.dino_head)
        self.ibot_head = PrototypeHead(width, **config.ibot_head) if config.ibot_weight > 0 else None


class DINOv3StudentModel(RemoteCodeMixin, PreTrainedModel):
    """A `student`, which learns, beside networks that do not: those of `frozen_networks`."""

    config_class = DINOv3PreTrainingConfig
    base_model_prefix = "student"
    main_input_name = "global_crops"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    student: Any

    def frozen_networks(self) -> list[nn.Module]:
        """Networks without a gradient and always in eval mode."""
        raise NotImplementedError

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, mean=0.0, std=0.02, a=-2.0, b=2.0)
            if module.bias is not None:
                init.zeros_(module.bias)

    def train(self, mode: bool = True) -> "DINOv3StudentModel":
        super().train(mode)
        self._freeze()  # from_pretrained, which ends with eval(), makes parameters anew
        return self

    def _freeze(self) -> None:
        for network in self.frozen_networks():
            network.eval()  # targets never see drop path or RoPE augmentation
            network.requires_grad_(False)

    def student_predictions(
        self,
        global_crops: Tensor,
        local_crops: Tensor,
        mask: Tensor | None,
        mask_indices: Tensor | None,
        draws: Any = None,
    ) -> StudentPredictions:
        """The student on masked global crops and on local crops, in one packed forward."""
        tokens = self.student_tokens(global_crops, local_crops, mask, draws)
        cls = torch.cat([group.pooler_output for group in tokens])  # ((G+n)*B, D)
        logits = self.student.dino_head(cls)  # ((G+n)*B, K)
        num_global = len(global_crops)
        batch_size = num_global // NUM_GLOBAL_CROPS
        patches = self.patch_tokens(tokens[0], global_crops)  # (G*B, N, D)
        return StudentPredictions(
            cls=cls[:num_global].unflatten(0, (NUM_GLOBAL_CROPS, batch_size)),
            global_logits=logits[:num_global].unflatten(0, (NUM_GLOBAL_CROPS, batch_size)),
            local_logits=logits[num_global:].unflatten(0, (-1, batch_size)),
            masked_logits=masked_logits(self.student, patches, mask_indices),
            patches=patches,
        )

    def student_tokens(self, global_crops: Tensor, local_crops: Tensor, mask: Tensor | None, draws: Any) -> list[Any]:
        """The backbone's outputs for the global crops and, if there are any, the local crops."""
        crops, masks = [global_crops], [mask]
        if len(local_crops) > 0:
            crops, masks = [global_crops, local_crops], [mask, None]
        tokens: list[Any] = self.student.backbone(crops, bool_masked_pos=masks, draws=draws)
        return tokens

    def prototype_losses(
        self, student: StudentPredictions, target: TeacherTargets, mask_weight: Tensor | None
    ) -> dict[str, Tensor]:
        """Unweighted terms of L_Pre (DINOv3, equation 1), each () float32."""
        config = self.config
        temperature = config.student_temperature
        losses = {
            "dino_global": dino_loss(
                student.global_logits, target.cls_probs, temperature, config.dino_global_ignore_diagonal
            )
        }
        if student.masked_logits is not None:
            num_crops = len(student.patches)
            losses["ibot"] = ibot_loss(student.masked_logits, target.masked_probs, mask_weight, num_crops, temperature)
        losses["koleo"] = self.koleo(student.cls)
        if len(student.local_logits) > 0:
            losses["dino_local"] = dino_loss(student.local_logits, target.cls_probs, temperature)
        return losses

    def koleo(self, cls: Tensor) -> Tensor:
        """L_DKoleo of the student's CLS tokens (G, B, D), the mean over the crops."""
        config = self.config
        return torch.stack([koleo_loss(crop, config.koleo_group_size, config.koleo_topk) for crop in cls]).mean()

    def weighted(
        self, losses: dict[str, Tensor], weights: dict[str, float], entropy: dict[str, Tensor]
    ) -> DINOv3PreTrainingOutput:
        """The output of a step."""
        return DINOv3PreTrainingOutput(
            loss=sum(weights[name] * value for name, value in losses.items()),
            losses={name: value.detach() for name, value in losses.items()},
            prototype_entropy=entropy,
        )

    def loss_weights(
        self, num_local_crops: int, local_loss_weight: float, gram_weight: float = 0.0
    ) -> dict[str, float]:
        """Factor of each loss term; the two DINO terms share `dino_weight` by their numbers of crop pairs."""
        config = self.config
        g = NUM_GLOBAL_CROPS
        global_pairs = g * (g - 1) if config.dino_global_ignore_diagonal else g * g
        local_pairs = num_local_crops * g
        pairs = global_pairs + local_pairs
        return {
            "dino_global": config.dino_weight * global_pairs / pairs,
            "dino_local": config.dino_weight * local_pairs / pairs * local_loss_weight,
            "ibot": config.ibot_weight,
            "koleo": config.koleo_weight * g,  # the published weight counts once a crop, the term is their mean
            "gram": gram_weight,
        }

    def patch_grid(self, crops: Tensor) -> tuple[int, int]:
        """Rows and columns of the student's patch tokens of crops (..., H, W)."""
        return patch_grid(crops, self.config.backbone_config)

    def patch_tokens(self, tokens: Any, crops: Tensor) -> Tensor:
        """The patch tokens (I, N, D) among a backbone's tokens of crops (I, C, H, W)."""
        height, width = self.patch_grid(crops)
        patches: Tensor = tokens.last_hidden_state[:, -height * width :]
        return patches


def masked_logits(network: SSLNetwork, patches: Tensor, mask_indices: Tensor | None) -> Tensor | None:
    """(G*B, N, D), (M,) -> (M, K'), or None for a network without an iBOT head."""
    if network.ibot_head is None:
        return None
    logits: Tensor = network.ibot_head(patches.flatten(0, 1)[mask_indices])
    return logits
