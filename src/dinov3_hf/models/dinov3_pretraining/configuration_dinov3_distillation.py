"""Configuration of a student of distillation: its backbone, what it predicts of a fixed teacher, weights of terms."""

from huggingface_hub.dataclasses import strict

from dinov3_hf.models.dinov3_pretraining.backbones import WITHOUT_MASK_TOKEN
from dinov3_hf.models.dinov3_pretraining.configuration_dinov3_pretraining import DINOv3PreTrainingConfig

DISTILLATION_CHOICES: dict[str, tuple[str, ...]] = {
    "objective": ("prototypes", "features"),
    "feature_loss": ("cosine", "smooth_l1"),
}


@strict
class DINOv3DistillationConfig(DINOv3PreTrainingConfig):
    r"""
    Configuration of [`DINOv3ForDistillation`]: fields of [`DINOv3PreTrainingConfig`], of which these are read
    differently, and a few more.

    `backbone_config` and the heads are the student's; the teacher stands outside. `dino_head` and `ibot_head` have the
    teacher's numbers of prototypes and any other sizes. The student sees whole crops, so a backbone without a mask
    token has L_iBOT too. With the objective `features` there are no heads, and the weights of L_DINO and L_iBOT are
    not read. `gram_teacher: separate` is the teacher of the distillation; there is no `ema`.

    Args:
        objective (`str`, *optional*, defaults to `"prototypes"`):
            What the student predicts: `"prototypes"`, the assignments of a teacher that has heads; `"features"`, the
            CLS and patch tokens of any teacher, by a linear projection.
        teacher_width (`int`, *optional*):
            Width of the teacher's tokens, for `features`.
        feature_loss (`str`, *optional*, defaults to `"cosine"`):
            Distance of `features`: `"cosine"`; `"smooth_l1"`, to the teacher's tokens after a norm without parameters.
        cls_weight (`float`, *optional*, defaults to 1.0):
            Weight of the CLS tokens of global and local crops together, for `features`.
        patch_weight (`float`, *optional*, defaults to 1.0):
            Weight of the patches, for `features`. At 0 there is no such term and no projection of patches.
        patch_size (`int`, *optional*, defaults to 16):
            Pixels of the student's crops between two patch tokens: a ViT's own; the last feature map of a ConvNeXt is
            resized to this grid.
    """

    model_type = "dinov3_distillation"
    remote_code_module = "modeling_dinov3_distillation"
    remote_code_classes = {
        "AutoConfig": "DINOv3DistillationConfig",
        "AutoModelForPreTraining": "DINOv3ForDistillation",
    }

    objective: str = "prototypes"
    teacher_width: int | None = None
    feature_loss: str = "cosine"
    cls_weight: float | int = 1.0
    patch_weight: float | int = 1.0
    patch_size: int = 16

    def _check_objective(self) -> None:
        self._check_gram()
        for name, choices in DISTILLATION_CHOICES.items():
            if self.__dict__[name] not in choices:
                raise ValueError(f"{name} {self.__dict__[name]!r} is unknown; choose one of {', '.join(choices)}.")
        if self.gram_teacher == "ema":
            raise ValueError(
                "gram_teacher 'ema' is for pre-training; in distillation L_Gram compares with the teacher, which is "
                "gram_teacher: separate."
            )
        if self.objective == "features":
            self._check_features()
        backbone = self.backbone_config
        if backbone.model_type not in WITHOUT_MASK_TOKEN and backbone.patch_size != self.patch_size:
            raise ValueError(
                f"the student's patch_size {backbone.patch_size} is not the {self.patch_size} pixels of the grid that "
                f"all students share; set patch_size: {self.patch_size} in its backbone."
            )
        if self.patch_size < 1:
            raise ValueError(f"patch_size {self.patch_size} is no number of pixels; give 1 or more.")

    def _check_features(self) -> None:
        if self.teacher_width is None or self.teacher_width < 1:
            raise ValueError(
                f"teacher_width is {self.teacher_width}, but objective: features predicts the teacher's tokens; give "
                "their width."
            )
        for name in ("cls_weight", "patch_weight"):
            if self.__dict__[name] < 0:
                raise ValueError(f"{name} {self.__dict__[name]} is negative; give 0 or more.")
        if self.cls_weight == 0 and self.patch_weight == 0:
            raise ValueError("cls_weight and patch_weight are both 0: nothing would be learned; set one of them.")
