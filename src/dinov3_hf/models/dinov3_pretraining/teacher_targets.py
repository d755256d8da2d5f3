"""From the logits of a teacher's heads to what a student has to predict.

Letters: B images of the batch, G = 2 global crops of each, N patches of a crop, M masked patches of the batch, D width
of the teacher, K prototypes of the DINO head, K' of the iBOT head. Crops are stacked crop-major: all images' first
crop, then all images' second crop.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from dinov3_hf.objectives.prototype_usage import prototype_entropy
from dinov3_hf.objectives.sinkhorn import sinkhorn_knopp


@dataclass
class TeacherLogits:
    """What the teacher's heads say before Sinkhorn-Knopp."""

    cls: Tensor  # (G, B, K)
    masked: Tensor | None  # (M, K'); None without L_iBOT
    patches: Tensor | None  # (G*B, N, D) normalised; None unless L_Gram compares with this teacher


@dataclass
class TeacherTargets:
    """What the student has to predict; no gradient."""

    cls_probs: Tensor | None  # (G, B, K) float32; None where features are the targets
    masked_probs: Tensor | None  # (M, K') float32
    patches: Tensor | None  # (G*B, N, D)
    prototype_entropy: dict[str, Tensor] = field(default_factory=dict)  # head name -> () in [0, 1]
    cls: Tensor | None = None  # (G, B, D) CLS tokens; None where prototypes are the targets


@torch.no_grad()
def balanced_targets(logits: TeacherLogits, temperature: float, sinkhorn_iterations: int) -> TeacherTargets:
    """Sinkhorn-Knopp on both global crops together, and on the masked patches; over all processes."""
    cls_logits = logits.cls.flatten(0, 1)  # (G*B, K)
    probs = sinkhorn_knopp(cls_logits, temperature, sinkhorn_iterations)
    targets = TeacherTargets(
        cls_probs=probs.unflatten(0, logits.cls.shape[:2]),
        masked_probs=None,
        patches=logits.patches,
        prototype_entropy={"dino": prototype_entropy(cls_logits)},
    )
    if logits.masked is not None:
        targets.masked_probs = sinkhorn_knopp(logits.masked, temperature, sinkhorn_iterations)
        targets.prototype_entropy["ibot"] = prototype_entropy(logits.masked)
    return targets


@torch.no_grad()
def balanced_targets_of_step(
    logits: list[TeacherLogits], temperature: float, sinkhorn_iterations: int
) -> list[TeacherTargets]:
    """Targets of several micro-batches, balanced over all of them together, as if they were one batch."""
    masked_logits = [part.masked for part in logits if part.masked is not None]
    whole = balanced_targets(
        TeacherLogits(
            cls=torch.cat([part.cls for part in logits], dim=1),
            masked=torch.cat(masked_logits) if masked_logits else None,
            patches=None,  # nothing is balanced over them
        ),
        temperature,
        sinkhorn_iterations,
    )
    assert whole.cls_probs is not None  # of prototypes there always are
    cls_probs = whole.cls_probs.split([part.cls.shape[1] for part in logits], dim=1)
    masked_probs: list[Tensor | None] = [None] * len(logits)
    if whole.masked_probs is not None:
        masked_probs = list(whole.masked_probs.split([len(part) for part in masked_logits]))
    return [
        TeacherTargets(cls, masked, part.patches, whole.prototype_entropy)
        for cls, masked, part in zip(cls_probs, masked_probs, logits, strict=True)
    ]
