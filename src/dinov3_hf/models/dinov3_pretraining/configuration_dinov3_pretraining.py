"""Configuration of the self-supervised objective: one backbone, two prototype heads, the weights of the loss terms."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from dinov3_hf.models.dinov3_pretraining.backbones import backbone_config_from_dict, check_masks
from dinov3_hf.models.remote_code import RemoteCodeConfigMixin

NUM_GLOBAL_CROPS = 2
PROTOTYPE_HEAD_DEFAULTS: dict[str, Any] = {
    "num_prototypes": 65536,
    "bottleneck_dim": 256,
    "hidden_dim": 2048,
    "num_layers": 3,
    "mlp_bias": True,
}
GRAM_CHOICES: dict[str, tuple[str | None, ...]] = {
    "gram_teacher": (None, "separate", "ema"),
    "gram_negatives": ("keep", "remove", "remove_teacher"),
    "gram_tokens": ("all", "masked", "unmasked"),
}


@strict
class DINOv3PreTrainingConfig(RemoteCodeConfigMixin, PreTrainedConfig):
    r"""
    Configuration of [`DINOv3ForPreTraining`]. The defaults are the published ViT-L/16 ImageNet-1k recipe.

    Args:
        backbone_config (`dict` or `PreTrainedConfig`, *optional*):
            Configuration of the backbone, the same for all networks. A `dict` may leave out `model_type`, which then
            is `dinov3_vit`. A family without a mask token takes part without L_iBOT.
        dino_head, ibot_head (`dict`, *optional*):
            Prototype heads on the CLS token and on the masked patches: `num_prototypes`, `bottleneck_dim`,
            `hidden_dim`, `num_layers`, `mlp_bias`.
        dino_weight (`float`, *optional*, defaults to 1.0):
            Weight of L_DINO (local and global crops together).
        dino_global_ignore_diagonal (`bool`, *optional*, defaults to `True`):
            Leave out the pairs in which student and teacher see the same global crop.
        ibot_weight (`float`, *optional*, defaults to 1.0):
            Weight of L_iBOT. At 0 there is no such term, no iBOT head, and no mask is needed.
        koleo_weight (`float`, *optional*, defaults to 0.1):
            Weight of L_DKoleo for each of the two global crops.
        koleo_group_size (`int`, *optional*):
            Images among which a nearest neighbour is looked for: contiguous groups of the global batch. `None` is the
            whole global batch. The published recipes use the batch of one GPU (16 to 64 images).
        koleo_topk (`int`, *optional*, defaults to 1):
            Nearest neighbours that each image is pushed away from.
        student_temperature (`float`, *optional*, defaults to 0.1):
            Temperature of the student's softmax.
        sinkhorn_iterations (`int`, *optional*, defaults to 3):
            Iterations of Sinkhorn-Knopp on the teacher's logits; 0 is a plain softmax.
        gram_teacher (`str`, *optional*):
            Whose patch similarities L_Gram holds the student to: `"separate"`, a third network, which begins as a copy
            of the teacher's backbone and then stays as it is; `"ema"`, the teacher. `None` is no Gram anchoring.
        gram_normalize (`bool`, *optional*, defaults to `True`):
            Compare cosines of patches; otherwise dot products.
        gram_per_image (`bool`, *optional*, defaults to `True`):
            Compare patches of the same crop only.
        gram_group_size (`int`, *optional*):
            Without `gram_per_image`: images whose patches, of both global crops, are compared together; contiguous
            groups of the batch that one forward sees. `None` is that whole batch.
        gram_negatives (`str`, *optional*, defaults to `"keep"`):
            What happens to negative similarities: `"keep"`, `"remove"` (they become 0), `"remove_teacher"` (only the
            Gram teacher's do).
        gram_tokens (`str`, *optional*, defaults to `"all"`):
            Patches that are compared: `"all"`, or without `gram_per_image` those `"masked"` or `"unmasked"` for the
            student.
        gram_antialias (`bool`, *optional*, defaults to `False`):
            Low-pass the Gram teacher's features when they are resized to a coarser grid.
    """

    model_type = "dinov3_pretraining"
    remote_code_module = "modeling_dinov3_pretraining"
    remote_code_classes = {"AutoConfig": "DINOv3PreTrainingConfig", "AutoModelForPreTraining": "DINOv3ForPreTraining"}
    sub_configs = {"backbone_config": AutoConfig}  # the choice of attention reaches the backbone

    backbone_config: dict[str, Any] | PreTrainedConfig | None = None
    dino_head: dict[str, Any] | None = None
    ibot_head: dict[str, Any] | None = None
    dino_weight: float | int = 1.0
    dino_global_ignore_diagonal: bool = True
    ibot_weight: float | int = 1.0
    koleo_weight: float | int = 0.1
    koleo_group_size: int | None = None
    koleo_topk: int = 1
    student_temperature: float = 0.1
    sinkhorn_iterations: int = 3
    gram_teacher: str | None = None
    gram_normalize: bool = True
    gram_per_image: bool = True
    gram_group_size: int | None = None
    gram_negatives: str = "keep"
    gram_tokens: str = "all"
    gram_antialias: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self.backbone_config = backbone_config_from_dict(self.backbone_config)
        self._check_objective()
        self.dino_head = _complete_head("dino_head", self.dino_head)
        self.ibot_head = _complete_head("ibot_head", self.ibot_head)
        super().__post_init__(**kwargs)

    def _check_objective(self) -> None:
        self._check_gram()
        check_masks(self.backbone_config, self.ibot_weight, self.gram_tokens)

    def _check_gram(self) -> None:
        for name, choices in GRAM_CHOICES.items():
            if self.__dict__[name] not in choices:
                known = ", ".join("null" if choice is None else choice for choice in choices)
                raise ValueError(f"{name} {self.__dict__[name]!r} is unknown; choose one of {known}.")
        if self.gram_per_image and (self.gram_tokens != "all" or self.gram_group_size is not None):
            raise ValueError(
                f"gram_tokens {self.gram_tokens!r} and gram_group_size {self.gram_group_size} are for patches of "
                "several crops; set gram_per_image: false, or leave both out."
            )
        if self.gram_group_size is not None and self.gram_group_size < 1:
            raise ValueError(f"gram_group_size {self.gram_group_size} is no number of images; give 1 or more.")


def _complete_head(name: str, given: dict[str, Any] | None) -> dict[str, Any]:
    unknown = sorted(set(given or {}) - set(PROTOTYPE_HEAD_DEFAULTS))
    if unknown:
        raise ValueError(f"{name} has no field {unknown[0]!r}; its fields are {', '.join(PROTOTYPE_HEAD_DEFAULTS)}.")
    return {**PROTOTYPE_HEAD_DEFAULTS, **(given or {})}
