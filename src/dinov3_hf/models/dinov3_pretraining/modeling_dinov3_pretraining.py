"""Student, EMA teacher, heads and Gram teacher in one module: the self-supervised step of DINOv3 (arXiv 2508.10104,
sections 3 and 4).

Letters: B images of the batch, G = 2 global and n local crops of each, C channels, D width, N patches of a global
crop, M masked patches of the batch, K prototypes of the DINO head, K' of the iBOT head. Crops are stacked crop-major:
all images' first crop, then all images' second crop.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
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
from dinov3_hf.models.dinov3_pretraining.gram_anchor import gram_anchor_loss, resize_patches
from dinov3_hf.models.dinov3_pretraining.prototype_head import PrototypeHead
from dinov3_hf.models.remote_code import RemoteCodeMixin
from dinov3_hf.objectives.dino import dino_loss
from dinov3_hf.objectives.ibot import ibot_loss
from dinov3_hf.objectives.koleo import koleo_loss
from dinov3_hf.objectives.prototype_usage import prototype_entropy
from dinov3_hf.objectives.sinkhorn import sinkhorn_knopp


@dataclass
class TeacherLogits:
    """What the teacher's heads say before Sinkhorn-Knopp."""

    cls: Tensor  # (G, B, K)
    masked: Tensor | None  # (M, K'); None without L_iBOT
    patches: Tensor | None  # (G*B, N, D) normalised; None unless this teacher is the Gram teacher too


@dataclass
class TeacherTargets:
    """What the student has to predict; no gradient."""

    cls_probs: Tensor  # (G, B, K) float32
    masked_probs: Tensor | None  # (M, K') float32
    patches: Tensor | None  # (G*B, N, D)
    prototype_entropy: dict[str, Tensor]  # head name -> () in [0, 1]


@dataclass
class StudentPredictions:
    """What the student says of masked global crops and of local crops."""

    cls: Tensor  # (G, B, D) normalised CLS tokens of the global crops
    global_logits: Tensor  # (G, B, K)
    local_logits: Tensor  # (n, B, K)
    masked_logits: Tensor | None  # (M, K')
    patches: Tensor  # (G*B, N, D) normalised patch tokens of the masked global crops


@dataclass
class DINOv3PreTrainingOutput(ModelOutput):
    """
    Args:
        loss (`torch.FloatTensor` of shape `()`):
            Weighted sum of the loss terms.
        losses (`dict[str, torch.FloatTensor]`):
            The unweighted terms `dino_global`, `dino_local` (when there are local crops), `ibot` (when it has a
            weight), `koleo`, `gram` (when it has a weight).
        prototype_entropy (`dict[str, torch.FloatTensor]`):
            For each head, `dino` and `ibot`, how evenly the teacher uses its prototypes: 1 evenly, 0 all samples on
            one.
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


class DINOv3ForPreTraining(RemoteCodeMixin, PreTrainedModel):
    """
    DINOv3's self-supervised objective: a student is trained to predict what its own moving average, the teacher, says
    of other crops (L_DINO) and of masked patches (L_iBOT), while KoLeo spreads its features. In later stages it also
    keeps the patch similarities of an earlier network, the Gram teacher (L_Gram).

    The teacher starts as a copy of the student, receives no gradient, is always in eval mode, and follows the student
    through `dinov3_hf.training.ema.update_ema` after each optimizer step. A Gram teacher of its own, a backbone
    without heads, starts as a copy of the teacher's, receives no gradient, is always in eval mode, and stays as it is
    until `refresh_gram_teacher`. It may be bfloat16 while the rest is float32.
    """

    config_class = DINOv3PreTrainingConfig
    base_model_prefix = "student"
    main_input_name = "global_crops"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

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
        self._freeze_teachers()  # train() may come after the first targets

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

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, mean=0.0, std=0.02, a=-2.0, b=2.0)
            if module.bias is not None:
                init.zeros_(module.bias)

    def train(self, mode: bool = True) -> "DINOv3ForPreTraining":
        super().train(mode)
        self._freeze_teachers()  # from_pretrained, which ends with eval(), makes parameters anew
        return self

    def _freeze_teachers(self) -> None:
        for network in (self.teacher, self.gram_teacher):
            if network is not None:
                network.eval()  # targets never see drop path or RoPE augmentation
                network.requires_grad_(False)

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

        config = self.config
        temperature = config.student_temperature
        losses = {
            "dino_global": dino_loss(
                student.global_logits, target.cls_probs, temperature, config.dino_global_ignore_diagonal
            )
        }
        if student.masked_logits is not None:
            losses["ibot"] = ibot_loss(
                student.masked_logits, target.masked_probs, mask_weight, len(global_crops), temperature
            )
        losses["koleo"] = torch.stack(
            [koleo_loss(crop, config.koleo_group_size, config.koleo_topk) for crop in student.cls]
        ).mean()
        if len(student.local_logits) > 0:
            losses["dino_local"] = dino_loss(student.local_logits, target.cls_probs, temperature)
        if gram_weight > 0:
            anchor = self.gram_targets(target, global_crops, gram_crops)
            losses["gram"] = gram_anchor_loss(student.patches, anchor, mask, config)

        weights = self.loss_weights(len(student.local_logits), local_loss_weight, gram_weight)
        loss = sum(weights[name] * value for name, value in losses.items())
        return DINOv3PreTrainingOutput(
            loss=loss,
            losses={name: value.detach() for name, value in losses.items()},
            prototype_entropy=target.prototype_entropy,
        )

    def _check_step(self, mask: Tensor | None, gram_weight: float) -> None:
        config = self.config
        if mask is None and (config.ibot_weight > 0 or (gram_weight > 0 and config.gram_tokens != "all")):
            raise ValueError("there is no mask, but L_iBOT or gram_tokens asks for one; give mask, or ibot_weight: 0.")
        if gram_weight > 0 and config.gram_teacher is None:
            raise ValueError(
                f"gram_weight is {gram_weight:g}, but there is no Gram teacher; set gram_teacher: separate, or ema."
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

    @torch.no_grad()
    def teacher_logits(self, global_crops: Tensor, mask_indices: Tensor | None) -> TeacherLogits:
        """The teacher on whole global crops: (G*B, C, H, W), (M,) -> CLS logits and logits at the masked patches."""
        tokens = self.teacher.backbone(global_crops)
        cls_logits = self.teacher.dino_head(tokens.pooler_output)  # (G*B, K)
        patches = self._patches(tokens, global_crops)  # (G*B, N, D)
        return TeacherLogits(
            cls=cls_logits.unflatten(0, (NUM_GLOBAL_CROPS, -1)),
            masked=_masked_logits(self.teacher, patches, mask_indices),
            patches=patches if self.config.gram_teacher == "ema" else None,
        )

    @torch.no_grad()
    def teacher_targets(self, logits: TeacherLogits, temperature: float) -> TeacherTargets:
        """Balanced targets: Sinkhorn-Knopp on both global crops together, and on the masked patches."""
        iterations = self.config.sinkhorn_iterations
        cls_logits = logits.cls.flatten(0, 1)  # (G*B, K)
        targets = TeacherTargets(
            cls_probs=sinkhorn_knopp(cls_logits, temperature, iterations).unflatten(0, logits.cls.shape[:2]),
            masked_probs=None,
            patches=logits.patches,
            prototype_entropy={"dino": prototype_entropy(cls_logits)},
        )
        if logits.masked is not None:
            targets.masked_probs = sinkhorn_knopp(logits.masked, temperature, iterations)
            targets.prototype_entropy["ibot"] = prototype_entropy(logits.masked)
        return targets

    @torch.no_grad()
    def teacher_targets_of_step(self, logits: list[TeacherLogits], temperature: float) -> list[TeacherTargets]:
        """Targets of several micro-batches, balanced over all of them together, as if they were one batch."""
        masked_logits = [part.masked for part in logits if part.masked is not None]
        whole = self.teacher_targets(
            TeacherLogits(
                cls=torch.cat([part.cls for part in logits], dim=1),
                masked=torch.cat(masked_logits) if masked_logits else None,
                patches=None,  # nothing is balanced over them
            ),
            temperature,
        )
        cls_probs = whole.cls_probs.split([part.cls.shape[1] for part in logits], dim=1)
        masked_probs: Any = [None] * len(logits)
        if whole.masked_probs is not None:
            masked_probs = whole.masked_probs.split([len(part) for part in masked_logits])
        return [
            TeacherTargets(cls, masked, part.patches, whole.prototype_entropy)
            for cls, masked, part in zip(cls_probs, masked_probs, logits, strict=True)
        ]

    def student_predictions(
        self,
        global_crops: Tensor,
        local_crops: Tensor,
        mask: Tensor | None,
        mask_indices: Tensor | None,
        draws: Any = None,
    ) -> StudentPredictions:
        """The student on masked global crops and on local crops, in one packed forward."""
        crops, masks = [global_crops], [mask]
        if len(local_crops) > 0:
            crops, masks = [global_crops, local_crops], [mask, None]
        tokens = self.student.backbone(crops, bool_masked_pos=masks, draws=draws)

        cls = torch.cat([group.pooler_output for group in tokens])  # ((G+n)*B, D)
        logits = self.student.dino_head(cls)  # ((G+n)*B, K)
        num_global = len(global_crops)
        batch_size = num_global // NUM_GLOBAL_CROPS
        patches = self._patches(tokens[0], global_crops)  # (G*B, N, D)
        return StudentPredictions(
            cls=cls[:num_global].unflatten(0, (NUM_GLOBAL_CROPS, batch_size)),
            global_logits=logits[:num_global].unflatten(0, (NUM_GLOBAL_CROPS, batch_size)),
            local_logits=logits[num_global:].unflatten(0, (-1, batch_size)),
            masked_logits=_masked_logits(self.student, patches, mask_indices),
            patches=patches,
        )

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
            patches = self._patches(self.gram_teacher(crops), crops)  # (G*B, N', D)
        config = self.config
        grid, student_grid = (patch_grid(x, config.backbone_config) for x in (crops, global_crops))
        return resize_patches(patches, grid, student_grid, config.gram_antialias)

    def _patches(self, tokens: Any, crops: Tensor) -> Tensor:
        """The patch tokens (I, N, D) among a backbone's tokens of crops (I, C, H, W)."""
        height, width = patch_grid(crops, self.config.backbone_config)
        patches: Tensor = tokens.last_hidden_state[:, -height * width :]
        return patches


def _masked_logits(network: SSLNetwork, patches: Tensor, mask_indices: Tensor | None) -> Tensor | None:
    """(G*B, N, D), (M,) -> (M, K'), or None for a network without an iBOT head."""
    if network.ibot_head is None:
        return None
    logits: Tensor = network.ibot_head(patches.flatten(0, 1)[mask_indices])
    return logits
