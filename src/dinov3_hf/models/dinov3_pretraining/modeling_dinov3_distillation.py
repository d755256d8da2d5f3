"""A student and its moving average in one module: a step of distillation from a fixed teacher, which stands outside
(DINOv3, arXiv 2508.10104, section 5.2).

Letters: B images of the batch, G = 2 global and n local crops of each, C channels, D width of the student, D_t of the
teacher, N patches of a global crop, M masked patches of the batch, K prototypes of the DINO head, K' of the iBOT head.
Crops are stacked crop-major: all images' first crop, then all images' second crop.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dinov3_hf.models.dinov3_pretraining.backbones import WITHOUT_MASK_TOKEN, build_backbone
from dinov3_hf.models.dinov3_pretraining.configuration_dinov3_distillation import DINOv3DistillationConfig
from dinov3_hf.models.dinov3_pretraining.configuration_dinov3_pretraining import NUM_GLOBAL_CROPS
from dinov3_hf.models.dinov3_pretraining.gram_anchor import gram_anchor_loss
from dinov3_hf.models.dinov3_pretraining.student_step import (
    DINOv3PreTrainingOutput,
    DINOv3StudentModel,
    SSLNetwork,
)
from dinov3_hf.models.dinov3_pretraining.teacher_targets import TeacherTargets
from dinov3_hf.objectives.features import feature_loss


@dataclass
class FeaturePredictions:
    """What the student says of the teacher's tokens."""

    cls: Tensor  # (G, B, D) normalised CLS tokens of the global crops
    global_features: Tensor  # (G, B, D_t)
    local_features: Tensor  # (n, B, D_t)
    patch_features: Tensor | None  # (G*B, N, D_t); None without a weight
    patches: Tensor  # (G*B, N, D) normalised patch tokens of the global crops


class FeatureNetwork(nn.Module):
    """
    A backbone with linear projections to the width of a teacher. Its children are `backbone`, `cls_projection` and,
    where patches have a weight, `patch_projection`.
    """

    def __init__(self, config: DINOv3DistillationConfig) -> None:
        super().__init__()
        self.backbone = build_backbone(config.backbone_config)
        width = config.backbone_config.hidden_size
        self.cls_projection = nn.Linear(width, config.teacher_width)
        self.patch_projection = nn.Linear(width, config.teacher_width) if config.patch_weight > 0 else None


def student_network(config: DINOv3DistillationConfig) -> SSLNetwork | FeatureNetwork:
    """What a student, and its moving average, consists of."""
    return SSLNetwork(config) if config.objective == "prototypes" else FeatureNetwork(config)


class DINOv3ForDistillation(DINOv3StudentModel):
    """
    Distillation: a student is trained to predict what a fixed teacher says of the same image, by prototypes as in
    pre-training (the objective of the published students) or by features (any teacher).

    The student sees whole crops. Its moving average `ema` is what is kept of a run: it starts as a copy of the
    student, receives no gradient, is always in eval mode, and follows the student through
    `dinov3_hf.training.ema.update_ema` after each optimizer step. The teacher is no part of this module, so that one
    forward of it serves several students; `distillation_targets` turns what it says into the `target` of the step.
    """

    config_class = DINOv3DistillationConfig

    def __init__(self, config: DINOv3DistillationConfig) -> None:
        super().__init__(config)
        self.student = student_network(config)
        self.ema = student_network(config)
        self._no_split_modules = list(self.student.backbone._no_split_modules)
        self.post_init()
        self.ema.load_state_dict(self.student.state_dict())
        self._freeze()

    def frozen_networks(self) -> list[nn.Module]:
        return [self.ema]

    def forward(
        self,
        global_crops: Tensor,
        local_crops: Tensor,
        target: TeacherTargets,
        mask_indices: Tensor | None = None,
        mask_weight: Tensor | None = None,
        local_loss_weight: float = 1.0,
        gram_weight: float = 0.0,
        draws: Any = None,
    ) -> DINOv3PreTrainingOutput:
        """
        Prototypes: as in pre-training,

        L = w_dino (s_l w_l L_DINO,local + s_g L_DINO,global) + w_ibot L_iBOT + G w_koleo L_DKoleo + w_gram L_Gram.

        Features:

        L = w_cls (s_l w_l L_cls,local + s_g L_cls) + w_patch L_patches + G w_koleo L_DKoleo + w_gram L_Gram,

        where L_cls compares the same global crops, L_cls,local every local crop with both global crops of its image.
        s_l and s_g are the shares of local and global (student crop, teacher crop) pairs.

        Args:
            global_crops: (G*B, C, H, W) normalised crops, crop-major.
            local_crops: (n*B, C, h, w) normalised crops, crop-major; n may be 0.
            target: of the same global crops; it has what the terms of this student compare with.
            mask_indices: (M,) int64, the patches of L_iBOT as positions in (G*B, N) flattened. It and the next may be
                None without L_iBOT.
            mask_weight: (M,) float, for each masked patch 1 / (masked patches of its crop).
            local_loss_weight: w_l, for schedules that fade the local term out.
            gram_weight: w_gram, the same in every process; at 0 the term is not computed.
            draws: random numbers of the student's backbone, as its `forward` takes them; by default it draws its own.

        Raises:
            ValueError: the target lacks what a term compares with or does not fit the student, no masked patches for a
                term that needs them, or `gram_weight` without a Gram teacher.
        """
        config = self.config
        self._check_step(target, mask_indices, gram_weight)
        student: Any
        if config.objective == "prototypes":
            student = self.student_predictions(global_crops, local_crops, None, mask_indices, draws)
            losses = self.prototype_losses(student, target, mask_weight)
        else:
            student = self.feature_predictions(global_crops, local_crops, draws)
            losses = self.feature_losses(student, target)
        if gram_weight > 0:
            mask = None if config.gram_tokens == "all" else _mask_at(mask_indices, student.patches)
            losses["gram"] = gram_anchor_loss(student.patches, target.patches, mask, config)
        num_local_crops = NUM_GLOBAL_CROPS * len(local_crops) // len(global_crops)
        weights = self.loss_weights(num_local_crops, local_loss_weight, gram_weight)
        return self.weighted(losses, weights, target.prototype_entropy)

    def feature_predictions(self, global_crops: Tensor, local_crops: Tensor, draws: Any = None) -> FeaturePredictions:
        """The student and its projections on global and local crops, in one packed forward."""
        tokens = self.student_tokens(global_crops, local_crops, None, draws)
        cls = torch.cat([group.pooler_output for group in tokens])  # ((G+n)*B, D)
        features = self.student.cls_projection(cls)  # ((G+n)*B, D_t)
        num_global = len(global_crops)
        batch_size = num_global // NUM_GLOBAL_CROPS
        patches = self.patch_tokens(tokens[0], global_crops)  # (G*B, N, D)
        projection = self.student.patch_projection
        return FeaturePredictions(
            cls=cls[:num_global].unflatten(0, (NUM_GLOBAL_CROPS, batch_size)),
            global_features=features[:num_global].unflatten(0, (NUM_GLOBAL_CROPS, batch_size)),
            local_features=features[num_global:].unflatten(0, (-1, batch_size)),
            patch_features=None if projection is None else projection(patches),
            patches=patches,
        )

    def feature_losses(self, student: FeaturePredictions, target: TeacherTargets) -> dict[str, Tensor]:
        """Unweighted terms of feature distillation, each () float32."""
        assert target.cls is not None  # as the step has checked
        distance = self.config.feature_loss
        losses = {"cls": feature_loss(student.global_features, target.cls, distance)}
        if student.patch_features is not None:
            losses["patches"] = feature_loss(student.patch_features, target.patches, distance)
        losses["koleo"] = self.koleo(student.cls)
        if len(student.local_features) > 0:
            pairs = (-1, NUM_GLOBAL_CROPS, -1, -1)  # (n, G, B, D_t): every local crop with both global crops
            local = student.local_features[:, None].expand(pairs)
            losses["cls_local"] = feature_loss(local, target.cls.expand_as(local), distance)
        return losses

    def loss_weights(
        self, num_local_crops: int, local_loss_weight: float, gram_weight: float = 0.0
    ) -> dict[str, float]:
        """Factor of each loss term; the two CLS terms share one weight by their numbers of crop pairs."""
        weights = super().loss_weights(num_local_crops, local_loss_weight, gram_weight)
        if self.config.objective == "prototypes":
            return weights
        local_share = num_local_crops / (1 + num_local_crops)  # 2 n pairs beside those of equal global crops, 2
        return {
            "cls": self.config.cls_weight * (1 - local_share),
            "cls_local": self.config.cls_weight * local_share * local_loss_weight,
            "patches": self.config.patch_weight,
            "koleo": weights["koleo"],
            "gram": weights["gram"],
        }

    def student_tokens(self, global_crops: Tensor, local_crops: Tensor, mask: Tensor | None, draws: Any) -> list[Any]:
        """As in pre-training, with the patches of any backbone on the grid of `config.patch_size`."""
        if self.config.backbone_config.model_type not in WITHOUT_MASK_TOKEN:
            return super().student_tokens(global_crops, local_crops, mask, draws)
        crops = [global_crops, local_crops] if len(local_crops) > 0 else [global_crops]
        tokens: list[Any] = self.student.backbone(crops, draws=draws, patch_size=self.config.patch_size)
        return tokens

    def patch_grid(self, crops: Tensor) -> tuple[int, int]:
        height, width = crops.shape[-2:]
        return height // self.config.patch_size, width // self.config.patch_size

    def _check_step(self, target: TeacherTargets, mask_indices: Tensor | None, gram_weight: float) -> None:
        config = self.config
        wants_mask = config.objective == "prototypes" and config.ibot_weight > 0
        if mask_indices is None and (wants_mask or (gram_weight > 0 and config.gram_tokens != "all")):
            raise ValueError(
                "there are no masked patches, but L_iBOT or gram_tokens asks for them; give mask_indices, or "
                "ibot_weight: 0."
            )
        if gram_weight > 0 and config.gram_teacher is None:
            raise ValueError(
                f"gram_weight is {gram_weight:g}, but gram_teacher is not set; set gram_teacher: separate."
            )
        if config.objective == "features":
            targets = {"cls": target.cls}
        else:
            targets = {"cls_probs": target.cls_probs} | ({"masked_probs": target.masked_probs} if wants_mask else {})
        if gram_weight > 0 or (config.objective == "features" and config.patch_weight > 0):
            targets["patches"] = target.patches
        missing = [name for name, value in targets.items() if value is None]
        if missing:
            raise ValueError(
                f"the target has no {missing[0]}, which objective {config.objective!r} and the weights of its terms "
                "ask for; make it with the same objective and terms."
            )


def _mask_at(mask_indices: Tensor, patches: Tensor) -> Tensor:
    """(M,) positions -> (G*B, N) bool."""
    mask = torch.zeros(patches.shape[:2], dtype=torch.bool, device=patches.device)
    mask.view(-1)[mask_indices] = True
    return mask
