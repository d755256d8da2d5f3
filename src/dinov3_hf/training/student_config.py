"""Configuration of one student of a distillation: the fields of a recipe, changed by the student's block."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from dinov3_hf.data.crop_sizes import CropSizes
from dinov3_hf.errors import ArgumentError
from dinov3_hf.models.same_network import network_differences
from dinov3_hf.training.distillation_teacher import read_teacher
from dinov3_hf.training.model_source import locate_model
from dinov3_hf.training.recipe_config import UNUSED_FIELDS, changes_the_result
from dinov3_hf.training.resume import starts_afresh
from dinov3_hf.training.ssl_config import SSLConfig
from dinov3_hf.training.teacher_networks import network_config

if TYPE_CHECKING:
    from dinov3_hf.models.dinov3_pretraining.configuration_dinov3_distillation import DINOv3DistillationConfig

TEACHER = "teacher"  # value of gram_teacher
HEADS = {"dino_head": "DINO", "ibot_head": "iBOT"}
_NO_PUSH = "several models come out: dinov3-hf push OUTPUT_DIR/STUDENT OWNER/NAME uploads one"
_ONE_GRAM_TEACHER = "the Gram teacher is the teacher, on the teacher's crops: set gram_teacher: teacher"


@dataclass
class StudentConfig(SSLConfig):
    r"""
    What a student of [`DistillationConfig`] is trained by, which has it in `student_args`.

    Inherited defaults that are changed: `dino_head` and `ibot_head` are the teacher's where entries are left out, but
    for the width that they start from.
    """

    # --- changes the result: teacher ---
    teacher: str | None = field(
        default=None,
        metadata=changes_the_result(
            "The trained model to learn from, which stays as it is: a run, a teacher/, any model folder, or OWNER/NAME"
            " on the Hub; a DINOv3 ViT or ConvNeXt, or another model of transformers or timm."
        ),
    )
    objective: Literal["auto", "prototypes", "features"] = field(
        default="auto",
        metadata=changes_the_result(
            "What to predict: prototypes, the assignments of the teacher's heads, as published; features, its CLS and "
            "patch tokens, by a learned projection; auto is prototypes where the teacher has heads."
        ),
    )
    cls_weight: float = field(
        default=1.0,
        metadata=changes_the_result("Weight of the CLS terms of objective features, global and local together."),
    )
    patch_weight: float = field(
        default=1.0,
        metadata=changes_the_result("Weight of the patch term of objective features."),
    )
    feature_loss: Literal["cosine", "smooth_l1"] = field(
        default="cosine",
        metadata=changes_the_result(
            "Distance of objective features: 1 - cosine, or smooth_l1 to the teacher's tokens brought to mean 0 and "
            "variance 1 each."
        ),
    )
    gram_teacher: str | None = field(
        default=None,
        metadata=changes_the_result("Whose patch similarities the students keep: null for no L_Gram, or teacher."),
    )
    patch_size: int | None = field(
        default=None,
        metadata=changes_the_result(
            "Side in pixels of the cells in which patches are compared; a ConvNeXt's features are resized to them. "
            "Null: the patches of the ViT students, else the teacher's, else 16."
        ),
    )
    teacher_to_student_scale: float = field(
        default=1.0,
        metadata=changes_the_result(
            "How many times larger the teacher sees the crops than the students: global_crop_size and local_crop_size "
            "are the teacher's."
        ),
    )
    start_from: str | None = field(
        default=None,
        metadata=changes_the_result(
            "In the block of a student: the model that its weights come from, with heads where they are of the same "
            "shape: a run, a model folder, or OWNER/NAME on the Hub; null is random weights."
        ),
    )

    # --- efficiency ---
    num_ranks: int | None = None  # that train this student; None is all

    UNUSED_FIELDS: ClassVar[dict[str, str]] = {
        **UNUSED_FIELDS,
        "start_with": "a student starts with the weights of a model: set start_from in its block",
        "ddp_bucket_cap_mb": "students have torch's own buckets: leave it out",
        "crop_sizes": "set global_crop_size and local_crop_size",
        "gram_crop_size": _ONE_GRAM_TEACHER,
        "gram_refresh_steps": _ONE_GRAM_TEACHER,
        "gram_first_refresh_step": _ONE_GRAM_TEACHER,
        "gram_max_refreshes": _ONE_GRAM_TEACHER,
        **dict.fromkeys(("push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo", "hub_revision"), _NO_PUSH),
    }

    @property
    def world_size(self) -> int:
        """Ranks that train this student."""
        total: int = super().world_size
        return total if self.num_ranks is None else self.num_ranks

    def _check_networks(self) -> None:
        if self.objective == "features":
            self.ibot_weight = 0.0  # there are no assignments of patches
        for name in ("cls_weight", "patch_weight"):
            if self.__dict__[name] < 0:
                raise ValueError(f"{name} {self.__dict__[name]:g} is negative; use 0 to leave the term out.")
        super()._check_networks()
        self._check_start()
        num_channels = self.backbone_config().num_channels
        if num_channels != read_teacher(self.teacher).num_channels:
            raise ValueError(
                f"the student takes images of {num_channels} channels, the teacher of "
                f"{read_teacher(self.teacher).num_channels}; set backbone.num_channels to the latter."
            )

    def _check_start(self) -> None:
        if self.start_from is None or not starts_afresh(
            self.resume_from_checkpoint, Path(self.output_dir or ".").parent
        ):
            return
        there = network_config(read_teacher(locate_model(self.start_from, "start_from")).source)
        differences = network_differences(self.backbone_config(), there)
        listed = ", ".join(f"{name} is {theirs!r} there and {ours!r} here" for name, ours, theirs in differences)
        if listed:
            raise ValueError(
                f"start_from {self.start_from} is another network than the student: {listed}; give the student its "
                "backbone, or leave start_from out."
            )

    def _complete_heads(self) -> None:
        given = {head: dict(self.__dict__[head]) for head in HEADS}
        teachers = read_teacher(self.teacher).heads if self.objective == "prototypes" else {}
        for head, entries in given.items():
            setattr(self, head, {**teachers.get(head, {}), **entries})
        super()._complete_heads()
        if teachers and self.ibot_weight > 0 and "ibot_head" not in teachers:
            raise ValueError(
                f"ibot_weight is {self.ibot_weight:g}, but teacher {self.teacher} has no iBOT head, whose assignments "
                "would be predicted; set ibot_weight: 0."
            )
        for head, theirs in teachers.items():
            wanted = self.__dict__[head]["num_prototypes"]
            if wanted != theirs["num_prototypes"]:
                raise ValueError(
                    f"{head}.num_prototypes is {wanted}, but the {HEADS[head]} head of teacher {self.teacher} has "
                    f"{theirs['num_prototypes']}, whose assignments are to be predicted; leave it out."
                )

    def _check_gram_choices(self) -> None:
        if self.gram_teacher not in (None, TEACHER):
            raise ArgumentError(f"gram_teacher {self.gram_teacher}: in distillation it is null or {TEACHER}.")
        super()._check_gram_choices()

    def pretraining_config(self) -> "DINOv3DistillationConfig":
        """The configuration of [`DINOv3ForDistillation`]."""
        from dinov3_hf.models.dinov3_pretraining.configuration_dinov3_distillation import DINOv3DistillationConfig

        return self._with_attention(DINOv3DistillationConfig(**self._objective_fields()))

    def _objective_fields(self) -> dict[str, Any]:
        return {
            **super()._objective_fields(),
            "gram_teacher": None if self.gram_teacher is None else "separate",
            "objective": self.objective,
            "teacher_width": read_teacher(self.teacher).width,
            "feature_loss": self.feature_loss,
            "cls_weight": self.cls_weight,
            "patch_weight": self.patch_weight,
            "patch_size": self.patch_size,
        }

    def mask_grid(self, sizes: CropSizes) -> int:
        assert self.patch_size is not None  # DistillationConfig has given it
        return sizes.global_crop_size // self.patch_size

    def recipe_alone(self) -> dict[str, Any]:
        """The fields that change the result, of a [`DistillationConfig`] that trains this student and no other."""
        fields = self.result_fields(self.recipe())
        for head in HEADS:
            if self.objective == "prototypes":
                fields[head] = self.__dict__[head]
            else:
                del fields[head]
        for name in ("global_crop_size", "local_crop_size"):
            fields[name] = int(fields[name] * self.teacher_to_student_scale)
        start_from = fields.pop("start_from")
        fields = {name: value for name, value in fields.items() if name not in self.UNUSED_FIELDS}
        return {**fields, "students": {self.run_name: {} if start_from is None else {"start_from": start_from}}}
