"""Student, EMA teacher, heads and Gram teacher in one module: the self-supervised step of DINOv3 (arXiv 2508.10104,
sections 3 and 4).

Letters: B images of the batch, G = 2 global and n local crops of each, C channels, D width, N patches of a global
crop, M masked patches of the batch, K prototypes of the DINO head, K' of the iBOT head. Crops are stacked crop-major:
all images' first crop, then all images' second crop.
"""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dinov3_hf.models.dinov3_pretraining.backbones import build_backbone, patch_grid
from dinov3_hf.models.dinov3_pretraining.configuration_dinov3_pretraining import (
    NUM_GLOBAL_CROPS,
    DINOv3PreTrainingConfig,
)
from dinov3_hf.models.dinov3_pretraining.gram_anchor import gram_anchor_loss, resize_patches
from dinov3_hf.models.dinov3_pretraining.student_step import (
    DINOv3PreTrainingOutput,
    DINOv3StudentModel,
    SSLNetwork,
    masked_logits,
)
from dinov3_hf.models.dinov3_pretraining.teacher_targets import (
    TeacherLogits,
    TeacherTargets,
    balanced_targets,
    balanced_targets_of_step,
)


class DINOv3ForPreTraining(DINOv3StudentModel):
    """
    DINOv3's self-supervised objective: a student is trained to predict what its own moving average, the teacher, says
    of other crops (L_DINO) and of masked patches (L_iBOT), while KoLeo spreads its features. In later stages it also
    keeps the patch similarities of an earlier network, the Gram teacher (L_Gram).

    The teacher starts as a copy of the student, receives no gradient, is always in eval mode, and follows the student
    through `dinov3_hf.training.ema.update_ema` after each optimizer step. A Gram teacher of its own, a backbone
    without heads, starts as a copy of the teacher's, receives no gradient, is always in eval mode, and stays as it is
    until `refresh_gram_teacher`. It may be bfloat16 while the rest is float32.
    """

    def __init__(self, config: DINOv3PreTrainingConfig) -> None:
        super().__init__(config)
        self.student = SSLNetwork(config)
        self.teacher = SSLNetwork(config)
        separate = config.gram_teacher == "separate"
        self.gram_teacher = build_backbone(config.backbone_config) if separate else None
        self._no_split_modules = list(self.student.backbone._no_split_modules)
        self.post_init()
        self.teacher.load_state_dict(self.student.state_dict())
        self.refresh_gram_teacher()
        self._freeze()  # train() may come after the first targets

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        """As [`PreTrainedModel.from_pretrained`]; a Gram teacher that the folder lacks is a copy of the teacher."""
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        model, info = loaded
        if any(key.startswith("gram_teacher.") for key in info["missing_keys"]):
            model.refresh_gram_teacher()
        return loaded if output_loading_info else model

    def frozen_networks(self) -> list[nn.Module]:
        return [network for network in (self.teacher, self.gram_teacher) if network is not None]

    @torch.no_grad()
    def refresh_gram_teacher(self) -> None:
        """Copy the teacher's backbone into the Gram teacher, in the Gram teacher's dtype."""
        if self.gram_teacher is not None:
            for ours, teachers in zip(self.gram_teacher.parameters(), self.teacher.backbone.parameters(), strict=True):
                ours.copy_(teachers)

    def forward(
        self,
        global_crops: Tensor,
        local_crops: Tensor,
        mask: Tensor | None,
        mask_indices: Tensor | None,
        mask_weight: Tensor | None,
        teacher_temperature: float,
        local_loss_weight: float = 1.0,
        gram_crops: Tensor | None = None,
        gram_weight: float = 0.0,
        target: TeacherTargets | None = None,
        draws: Any = None,
    ) -> DINOv3PreTrainingOutput:
        """
        L = w_dino (s_l w_l L_DINO,local + s_g L_DINO,global) + w_ibot L_iBOT + G w_koleo L_DKoleo + w_gram L_Gram,

        the paper's L_Pre, and L_Ref of its section 4, where s_l and s_g are the shares of local and global (student
        crop, teacher crop) pairs.

        Args:
            global_crops: (G*B, C, H, W) normalised crops, crop-major.
            local_crops: (n*B, C, h, w) normalised crops, crop-major; n may be 0.
            mask: (G*B, N) bool, True where the student sees the mask token instead of the patch. It and the next two
                may be None without L_iBOT.
            mask_indices: (M,) int64, the True positions of the flattened mask.
            mask_weight: (M,) float, for each masked patch 1 / (masked patches of its crop).
            teacher_temperature: temperature of the teacher's Sinkhorn-Knopp.
            local_loss_weight: w_l, for schedules that fade the local term out.
            gram_crops: (G*B, C, g, g) what a separate Gram teacher sees, by default the global crops. Its features are
                resized to the student's grid.
            gram_weight: w_gram, the same in every process; at 0 the term is not computed.
            target: the teacher's answer when it is known already (gradient accumulation balances it over all
                micro-batches of a step); by default the teacher is run on `global_crops`.
            draws: random numbers of the student's backbone, as its `forward` takes them; by default it draws its own.

        Raises:
            ValueError: no mask for a term that needs it, or `gram_weight` without a Gram teacher.
        """
        self._check_step(mask, gram_weight)
        if target is None:
            target = self.teacher_targets(self.teacher_logits(global_crops, mask_indices), teacher_temperature)
        student = self.student_predictions(global_crops, local_crops, mask, mask_indices, draws)

        losses = self.prototype_losses(student, target, mask_weight)
        if gram_weight > 0:
            anchor = self.gram_targets(target, global_crops, gram_crops)
            losses["gram"] = gram_anchor_loss(student.patches, anchor, mask, self.config)
        weights = self.loss_weights(len(student.local_logits), local_loss_weight, gram_weight)
        return self.weighted(losses, weights, target.prototype_entropy)

    def _check_step(self, mask: Tensor | None, gram_weight: float) -> None:
        config = self.config
        if mask is None and (config.ibot_weight > 0 or (gram_weight > 0 and config.gram_tokens != "all")):
            raise ValueError("there is no mask, but L_iBOT or gram_tokens asks for one; give mask, or ibot_weight: 0.")
        if gram_weight > 0 and config.gram_teacher is None:
            raise ValueError(
                f"gram_weight is {gram_weight:g}, but there is no Gram teacher; set gram_teacher: separate, or ema."
            )

    @torch.no_grad()
    def teacher_logits(self, global_crops: Tensor, mask_indices: Tensor | None) -> TeacherLogits:
        """The teacher on whole global crops: (G*B, C, H, W), (M,) -> CLS logits and logits at the masked patches."""
        tokens = self.teacher.backbone(global_crops)
        cls_logits = self.teacher.dino_head(tokens.pooler_output)  # (G*B, K)
        patches = self.patch_tokens(tokens, global_crops)  # (G*B, N, D)
        return TeacherLogits(
            cls=cls_logits.unflatten(0, (NUM_GLOBAL_CROPS, -1)),
            masked=masked_logits(self.teacher, patches, mask_indices),
            patches=patches if self.config.gram_teacher == "ema" else None,
        )

    def teacher_targets(self, logits: TeacherLogits, temperature: float) -> TeacherTargets:
        """Balanced targets: Sinkhorn-Knopp on both global crops together, and on the masked patches."""
        return balanced_targets(logits, temperature, self.config.sinkhorn_iterations)

    def teacher_targets_of_step(self, logits: list[TeacherLogits], temperature: float) -> list[TeacherTargets]:
        """Targets of several micro-batches, balanced over all of them together, as if they were one batch."""
        return balanced_targets_of_step(logits, temperature, self.config.sinkhorn_iterations)

    @torch.no_grad()
    def gram_targets(self, target: TeacherTargets, global_crops: Tensor, gram_crops: Tensor | None) -> Tensor:
        """The patches whose similarities the student is to keep, on its own grid: (G*B, N, D) normalised tokens."""
        if self.gram_teacher is None:
            assert target.patches is not None  # gram_teacher is "ema", as the step has checked
            return target.patches
        crops = global_crops if gram_crops is None else gram_crops
        # One of bfloat16 is in the compute dtype already; autocast would only raise what is between its matrices.
        in_float32 = self.gram_teacher.dtype == torch.float32
        with nullcontext() if in_float32 else torch.autocast(crops.device.type, enabled=False):
            patches = self.patch_tokens(self.gram_teacher(crops), crops)  # (G*B, N', D)
        config = self.config
        grid, student_grid = (patch_grid(x, config.backbone_config) for x in (crops, global_crops))
        return resize_patches(patches, grid, student_grid, config.gram_antialias)
