"""Student, EMA teacher and heads in one module: the self-supervised step of DINOv3 (section 3 of arXiv 2508.10104).

Letters: B images of the batch, G = 2 global and n local crops of each, D width, N patches of a global crop,
M masked patches of the batch, K prototypes of the DINO head, K' of the iBOT head. Crops are stacked crop-major: all
images' first crop, then all images' second crop.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from dinov3_hf.models.dinov3_pretraining.backbones import build_backbone
from dinov3_hf.models.dinov3_pretraining.configuration_dinov3_pretraining import DINOv3PreTrainingConfig
from dinov3_hf.models.dinov3_pretraining.prototype_head import PrototypeHead
from dinov3_hf.models.remote_code import RemoteCodeMixin
from dinov3_hf.objectives.dino import dino_loss
from dinov3_hf.objectives.ibot import ibot_loss
from dinov3_hf.objectives.koleo import koleo_loss
from dinov3_hf.objectives.prototype_usage import prototype_entropy
from dinov3_hf.objectives.sinkhorn import sinkhorn_knopp

NUM_GLOBAL_CROPS = 2


@dataclass
class TeacherLogits:
    """What the teacher's heads say before Sinkhorn-Knopp."""

    cls: Tensor  # (G, B, K)
    masked: Tensor  # (M, K')


@dataclass
class TeacherTargets:
    """What the student has to predict; no gradient."""

    cls_probs: Tensor  # (G, B, K) float32
    masked_probs: Tensor  # (M, K') float32
    prototype_entropy: dict[str, Tensor]  # head name -> () in [0, 1]


@dataclass
class StudentPredictions:
    """What the student says of masked global crops and of local crops."""

    cls: Tensor  # (G, B, D) normalised CLS tokens of the global crops
    global_logits: Tensor  # (G, B, K)
    local_logits: Tensor  # (n, B, K)
    masked_logits: Tensor  # (M, K')


@dataclass
class DINOv3PreTrainingOutput(ModelOutput):
    """
    Args:
        loss (`torch.FloatTensor` of shape `()`):
            Weighted sum of the loss terms.
        losses (`dict[str, torch.FloatTensor]`):
            The unweighted terms `dino_global`, `dino_local` (when there are local crops), `ibot`, `koleo`.
        prototype_entropy (`dict[str, torch.FloatTensor]`):
            For `dino` and `ibot`, how evenly the teacher uses its prototypes: 1 evenly, 0 all samples on one.
    """

    loss: Tensor | None = None
    losses: dict[str, Tensor] | None = None
    prototype_entropy: dict[str, Tensor] | None = None


class SSLNetwork(nn.Module):
    """A backbone with its two prototype heads; student and teacher are one each."""

    def __init__(self, config: DINOv3PreTrainingConfig) -> None:
        super().__init__()
        self.backbone = build_backbone(config.backbone_config)
        width = config.backbone_config.hidden_size
        self.dino_head = PrototypeHead(width, **config.dino_head)
        self.ibot_head = PrototypeHead(width, **config.ibot_head)


class DINOv3ForPreTraining(RemoteCodeMixin, PreTrainedModel):
    """
    DINOv3's self-supervised objective: a student is trained to predict what its own moving average, the teacher, says
    of other crops (L_DINO) and of masked patches (L_iBOT), while KoLeo spreads its features.

    The teacher starts as a copy of the student, receives no gradient, is always in eval mode, and follows the student
    through `dinov3_hf.training.ema.update_ema` after each optimizer step.
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
        self.teacher.requires_grad_(False)
        self._no_split_modules = list(self.student.backbone._no_split_modules)
        self.post_init()
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.eval()  # train() may come after the first targets

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, mean=0.0, std=0.02, a=-2.0, b=2.0)
            if module.bias is not None:
                init.zeros_(module.bias)

    def train(self, mode: bool = True) -> "DINOv3ForPreTraining":
        super().train(mode)
        self.teacher.eval()  # targets never see drop path or RoPE augmentation
        self.teacher.requires_grad_(False)  # from_pretrained, which ends with eval(), makes parameters anew
        return self

    def forward(
        self,
        global_crops: Tensor,
        local_crops: Tensor,
        mask: Tensor,
        mask_indices: Tensor,
        mask_weight: Tensor,
        teacher_temperature: float,
        local_loss_weight: float = 1.0,
        target: TeacherTargets | None = None,
    ) -> DINOv3PreTrainingOutput:
        """
        L = w_dino (s_l w_l L_DINO,local + s_g L_DINO,global) + w_ibot L_iBOT + G w_koleo L_DKoleo,

        the paper's L_Pre, where s_l and s_g are the shares of local and global (student crop, teacher crop) pairs.

        Args:
            global_crops: (G*B, C, H, W) normalised crops, crop-major.
            local_crops: (n*B, C, h, w) normalised crops, crop-major; n may be 0.
            mask: (G*B, N) bool, True where the student sees the mask token instead of the patch.
            mask_indices: (M,) int64, the True positions of the flattened mask.
            mask_weight: (M,) float, for each masked patch 1 / (masked patches of its crop).
            teacher_temperature: temperature of the teacher's Sinkhorn-Knopp.
            local_loss_weight: w_l, for schedules that fade the local term out.
            target: the teacher's answer when it is known already (gradient accumulation balances it over all
                micro-batches of a step); by default the teacher is run on `global_crops`.
        """
        if target is None:
            target = self.teacher_targets(self.teacher_logits(global_crops, mask_indices), teacher_temperature)
        student = self.student_predictions(global_crops, local_crops, mask, mask_indices)

        config = self.config
        temperature = config.student_temperature
        losses = {
            "dino_global": dino_loss(
                student.global_logits, target.cls_probs, temperature, config.dino_global_ignore_diagonal
            ),
            "ibot": ibot_loss(student.masked_logits, target.masked_probs, mask_weight, len(global_crops), temperature),
            "koleo": torch.stack(
                [koleo_loss(crop, config.koleo_group_size, config.koleo_topk) for crop in student.cls]
            ).mean(),
        }
        if len(student.local_logits) > 0:
            losses["dino_local"] = dino_loss(student.local_logits, target.cls_probs, temperature)

        weights = self.loss_weights(len(student.local_logits), local_loss_weight)
        loss = sum(weights[name] * value for name, value in losses.items())
        return DINOv3PreTrainingOutput(
            loss=loss,
            losses={name: value.detach() for name, value in losses.items()},
            prototype_entropy=target.prototype_entropy,
        )

    def loss_weights(self, num_local_crops: int, local_loss_weight: float) -> dict[str, float]:
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
        }

    @torch.no_grad()
    def teacher_logits(self, global_crops: Tensor, mask_indices: Tensor) -> TeacherLogits:
        """The teacher on whole global crops: (G*B, C, H, W), (M,) -> CLS logits and logits at the masked patches."""
        tokens = self.teacher.backbone(global_crops)
        cls_logits = self.teacher.dino_head(tokens.pooler_output)  # (G*B, K)
        num_patches = _num_patches(global_crops, self.config.backbone_config.patch_size)
        patches = tokens.last_hidden_state[:, -num_patches:].flatten(0, 1)  # (G*B*N, D)
        return TeacherLogits(
            cls=cls_logits.unflatten(0, (NUM_GLOBAL_CROPS, -1)),
            masked=self.teacher.ibot_head(patches[mask_indices]),
        )

    @torch.no_grad()
    def teacher_targets(self, logits: TeacherLogits, temperature: float) -> TeacherTargets:
        """Balanced targets: Sinkhorn-Knopp on both global crops together, and on the masked patches."""
        iterations = self.config.sinkhorn_iterations
        cls_logits = logits.cls.flatten(0, 1)  # (G*B, K)
        return TeacherTargets(
            cls_probs=sinkhorn_knopp(cls_logits, temperature, iterations).unflatten(0, logits.cls.shape[:2]),
            masked_probs=sinkhorn_knopp(logits.masked, temperature, iterations),
            prototype_entropy={"dino": prototype_entropy(cls_logits), "ibot": prototype_entropy(logits.masked)},
        )

    @torch.no_grad()
    def teacher_targets_of_step(self, logits: list[TeacherLogits], temperature: float) -> list[TeacherTargets]:
        """Targets of several micro-batches, balanced over all of them together, as if they were one batch."""
        images = [part.cls.shape[1] for part in logits]
        patches = [len(part.masked) for part in logits]
        whole = self.teacher_targets(
            TeacherLogits(
                torch.cat([part.cls for part in logits], dim=1), torch.cat([part.masked for part in logits])
            ),
            temperature,
        )
        parts = zip(whole.cls_probs.split(images, dim=1), whole.masked_probs.split(patches), strict=True)
        return [TeacherTargets(cls, masked, whole.prototype_entropy) for cls, masked in parts]

    def student_predictions(
        self, global_crops: Tensor, local_crops: Tensor, mask: Tensor, mask_indices: Tensor
    ) -> StudentPredictions:
        """The student on masked global crops and on local crops, in one packed forward."""
        crops, masks = [global_crops], [mask]
        if len(local_crops) > 0:
            crops, masks = [global_crops, local_crops], [mask, None]
        tokens = self.student.backbone(crops, bool_masked_pos=masks)

        cls = torch.cat([group.pooler_output for group in tokens])  # ((G+n)*B, D)
        logits = self.student.dino_head(cls)  # ((G+n)*B, K)
        num_global = len(global_crops)
        batch_size = num_global // NUM_GLOBAL_CROPS
        patches = tokens[0].last_hidden_state[:, -mask.shape[1] :].flatten(0, 1)  # (G*B*N, D)
        return StudentPredictions(
            cls=cls[:num_global].unflatten(0, (NUM_GLOBAL_CROPS, batch_size)),
            global_logits=logits[:num_global].unflatten(0, (NUM_GLOBAL_CROPS, batch_size)),
            local_logits=logits[num_global:].unflatten(0, (-1, batch_size)),
            masked_logits=self.student.ibot_head(patches[mask_indices]),
        )


def _num_patches(crops: Tensor, patch_size: Any) -> int:
    height, width = crops.shape[-2:]
    return (height // patch_size) * (width // patch_size)
