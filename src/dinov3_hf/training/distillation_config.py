"""Configuration of a distillation: one teacher, the images, and one or more students."""

import copy
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, get_type_hints

from dinov3_hf.data.crop_sizes import CropSizes
from dinov3_hf.data.multicrop import check_crop_size
from dinov3_hf.errors import ArgumentError, did_you_mean
from dinov3_hf.field_types import fit_mapping
from dinov3_hf.training.batch_arithmetic import micro_batch_size
from dinov3_hf.training.distillation_teacher import read_teacher
from dinov3_hf.training.recipe_config import changes_the_result, efficiency, orchestration, plain, with_peak
from dinov3_hf.training.schedules import Schedule
from dinov3_hf.training.ssl_config import SSLConfig
from dinov3_hf.training.student_config import StudentConfig
from dinov3_hf.yaml_text import dump_yaml

AUTO = "auto"
# What a student's block may say; all else is the run's.
OF_A_STUDENT = (
    *("backbone", "drop_path_group_size", "dino_head", "ibot_head", "dino_weight", "dino_global_ignore_diagonal"),
    *("ibot_weight", "koleo_weight", "koleo_group_size", "koleo_topk", "student_temperature"),
    *("cls_weight", "patch_weight", "feature_loss", "gram_weight_schedule", "local_loss_weight_schedule"),
    *("lr_schedule", "learning_rate", "lr_scaling", "weight_decay_schedule", "max_grad_norm"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "freeze_last_layer_steps", "layerwise_lr_decay"),
    *("patch_embed_lr_mult", "teacher_momentum_schedule", "gradient_checkpointing", "start_from"),
)
# Names of other things in a run's folder or in a checkpoint.
_TAKEN = ("state", "streams", "runs", "teacher", "students", "data", "memory", "schedule")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


@dataclass
class DistillationConfig(StudentConfig):
    r"""
    Arguments of [`DistillationTrainer`]: those of [`SSLConfig`], the teacher, and the students.

    Fields that a student's block may have are, outside of the blocks, the defaults of all students; see
    `OF_A_STUDENT`. The others are the run's: all students see the same crops and the same masks of patches.
    `teacher_momentum_schedule` is the momentum of a student's moving average, which is what is saved.

    `student_args` has the arguments of each student by name, `split` the ranks of each.

    Inherited defaults that are changed, beside those of [`RecipeConfig`]: `output_dir="runs/distill"`,
    `teacher_temperature_schedule=0.07`, `freeze_last_layer_steps=0` (published ViT-L).
    """

    students: dict[str, Any] = field(
        default_factory=dict,
        metadata=changes_the_result(
            "The students by name, which is that of their folder in output_dir: {vits16: {backbone: {preset: "
            "vits16}}, ...}. A block may change the fields of network, heads, loss weights and optimizer."
        ),
    )
    student_ranks: dict[str, int] | str | None = field(
        default=None,
        metadata=efficiency(
            "Ranks that train each student, {vits16: 48, vitb16: 80}; auto, chosen from measured times; null, all "
            "ranks train all students in turn. The teacher runs on all ranks."
        ),
    )

    # --- changes the result: inherited, with another default ---
    teacher_temperature_schedule: Schedule = field(
        default_factory=lambda: Schedule.constant(0.07),
        metadata=changes_the_result("Temperature of the teacher's assignment, a schedule."),
    )
    freeze_last_layer_steps: float = field(
        default=0,
        metadata=changes_the_result(
            "First steps (or share of the run) in which the heads' last layers stay as they are."
        ),
    )
    output_dir: str | None = field(
        default="runs/distill",
        metadata=orchestration("Folder for checkpoints, logs and the students, each in a folder of its own name."),
    )

    BLOCKS: ClassVar[str | None] = "students"
    UNUSED_FIELDS: ClassVar[dict[str, str]] = {
        **StudentConfig.UNUSED_FIELDS,
        "start_from": "students start one by one: set students.NAME.start_from",
        "num_ranks": "set student_ranks: {NAME: 1, ...}",
    }

    def __post_init__(self) -> None:
        self.description = read_teacher(self.teacher)
        super().__post_init__()

    def model_width(self) -> int:
        return self.description.width

    def _check_networks(self) -> None:
        self._check_names()
        self._choose_objective()
        self._check_scale()
        self._choose_patch_size()
        self.description.check_crop(self.global_crop_size)
        self._check_grids()
        self._check_student_ranks()
        self.split: dict[str, int] | None = None  # ranks of each student; None where they take turns
        if isinstance(self.student_ranks, Mapping):
            self.split_ranks(self.student_ranks)
        else:
            self.student_args = {name: self._student(name, self._ranks_until_measured(name)) for name in self.students}
        if self.launched.engine in ("zero2", "zero3") and (len(self.students) > 1 or self.student_ranks is not None):
            raise ArgumentError(
                f"engine {self.launched.engine} trains one network, but there are {len(self.students)} students; set "
                "engine: fsdp2 or ddp, or distil them one by one."
            )

    def _check_names(self) -> None:
        if not self.students:
            raise ArgumentError(
                "there are no students; name at least one, such as students: {vits16: {backbone: {preset: vits16}}}."
            )
        for name, block in self.students.items():
            if (
                not isinstance(name, str)
                or not _NAME.fullmatch(name)
                or name in _TAKEN
                or name.startswith(("checkpoint-", "eval_"))
            ):
                raise ArgumentError(
                    f"student {name!r} cannot be called so, it would name a folder and log entries; use letters, "
                    f"digits, '_' and '-', and none of {', '.join(_TAKEN)}, checkpoint-N, eval_N."
                )
            twins = [other for other in self.students if str(other).lower() == name.lower() and other != name]
            if twins:
                raise ArgumentError(
                    f"students {name} and {twins[0]} have one folder on disks that ignore case; call one otherwise."
                )
            if block is not None and not isinstance(block, Mapping):
                raise ArgumentError(f"students.{name} is {block!r}; expected a mapping such as {{backbone: ...}}.")
            for key in block or {}:
                if key not in OF_A_STUDENT:
                    known = {f.name for f in dataclasses.fields(self)}
                    remedy = (
                        "it is the same for all students: set it beside students, not inside."
                        if key in known
                        else did_you_mean(key, OF_A_STUDENT)
                    )
                    raise ArgumentError(f"students.{name} cannot have {key!r}; {remedy}")

    def _choose_objective(self) -> None:
        heads = self.description.heads
        if self.objective == AUTO:
            self.objective = "prototypes" if heads else "features"
        if self.objective == "prototypes" and "dino_head" not in heads:
            raise ValueError(
                f"objective prototypes needs the heads of the teacher, but {self.description.source} has none "
                "(heads.safetensors), as released models have none; set objective: features."
            )

    def _choose_patch_size(self) -> None:
        from dinov3_hf.models.dinov3_pretraining.backbones import WITHOUT_MASK_TOKEN, patch_side

        backbones = {}
        for name in self.students:
            fields = self._fields_of(name)
            with _named(name):
                backbones[name] = self.backbone_of(fields)
        sides = {
            name: patch_side(backbone)
            for name, backbone in backbones.items()
            if backbone.model_type not in WITHOUT_MASK_TOKEN
        }
        for name, side in sides.items():
            first = next(iter(sides))
            if side != sides[first]:
                raise ValueError(
                    f"students {first} and {name} have patches of {sides[first]} and {side} pixels, but all predict "
                    "the same patches of the teacher; give both the same backbone.patch_size."
                )
        chosen = next(iter(sides.values()), None)
        if self.patch_size is None:
            self.patch_size = chosen or self.description.patch_size or 16
        elif chosen is not None and chosen != self.patch_size:
            raise ValueError(
                f"patch_size is {self.patch_size}, but the patches of student {next(iter(sides))} have {chosen} "
                "pixels; leave patch_size out."
            )
        if self.patch_size < 1:
            raise ValueError(f"patch_size {self.patch_size} is no number of pixels; use 1 or more, or null.")

    def _check_scale(self) -> None:
        scale = self.teacher_to_student_scale
        if not 0 < scale < math.inf:
            raise ValueError(f"teacher_to_student_scale {scale:g} is no factor above 0; use 1 for equal crops.")
        for name in ("global_crop_size", "local_crop_size"):
            size = self.__dict__[name]
            if not (size / scale).is_integer():
                raise ValueError(
                    f"{name} {size} at teacher_to_student_scale {scale:g} is {size / scale:g} pixels for a student; "
                    "choose sizes that come out whole."
                )

    def _check_grids(self) -> None:
        theirs, ours = self.description.patch_size, self.patch_size
        assert ours is not None
        check_crop_size(
            "the students' global_crop_size", int(self.global_crop_size / self.teacher_to_student_scale), ours
        )
        if theirs is None or theirs == ours:
            return  # a feature map goes to any grid; equal patches differ in resolution at most
        if self.global_crop_size // theirs != self.mask_grid(self.crop_size_mix().sizes[0]):
            raise ValueError(
                f"the teacher has patches of {theirs} pixels, the students of {ours}; set teacher_to_student_scale: "
                f"{theirs / ours:g}, at which both have the same grid, or take students with patches of {theirs}."
            )

    def _check_student_ranks(self) -> None:
        ranks = self.student_ranks
        if ranks is None:
            return
        if isinstance(ranks, str):
            if ranks != AUTO:
                raise ArgumentError(f"student_ranks is {ranks!r}; expected null, auto or a mapping of names.")
        else:
            if ranks.keys() != self.students.keys():
                named = ", ".join(f"{name}: 1" for name in self.students)
                raise ArgumentError(f"student_ranks must name each student once: {{{named}}}.")
            for name, count in ranks.items():
                if type(count) is not int or count < 1:  # true is no number
                    raise ArgumentError(f"student_ranks.{name} is {count!r}; expected an integer of 1 or more.")
        if self.world_size < len(self.students):
            raise ValueError(
                f"{len(self.students)} students need as many ranks or more, but this run has {self.world_size}; start "
                f"at least {len(self.students)} processes, or set student_ranks: null to train them in turn."
            )

    def _ranks_until_measured(self, name: str) -> int | None:
        """With auto the smallest number that a student can have; 1 where it can have none, which says why."""
        if self.student_ranks is None:
            return None
        return next((count for count in range(1, self.world_size + 1) if self.can_have(name, count)), 1)

    def split_ranks(self, ranks: Mapping[str, int]) -> None:
        """
        Give each student its ranks, before a trainer is made.

        Raises:
            ValueError: they are not all ranks, or the batch does not divide.
        """
        if sum(ranks.values()) != self.world_size:
            raise ValueError(
                f"student_ranks {dump_yaml(dict(ranks), inline=True)} are {sum(ranks.values())} ranks, but "
                f"{self.world_size} have been started; change one, or set student_ranks: auto."
            )
        self.split = {name: ranks[name] for name in self.students}
        self.student_args = {name: self._student(name, count) for name, count in self.split.items()}

    def can_have(self, name: str, num_ranks: int) -> bool:
        """Whether a student's images can be dealt to so many ranks, in micro-batches and groups as the recipe says."""
        try:
            self._student(name, num_ranks)
        except ValueError:
            return False
        return True

    def _student(self, name: str, num_ranks: int | None) -> StudentConfig:
        wanted = self._given["per_device_train_batch_size"]
        with _named(name):
            if num_ranks is None:
                size = self.per_device_train_batch_size
            else:
                size = micro_batch_size(self.global_batch_size, num_ranks, wanted)
            fields = {**self._fields_of(name), "num_ranks": num_ranks, "per_device_train_batch_size": size}
            return StudentConfig(**fields)

    def _fields_of(self, name: str) -> dict[str, Any]:
        block = self._block(name)
        fields = {f.name: copy.deepcopy(self._given[f.name]) for f in dataclasses.fields(StudentConfig) if f.init}
        if "lr_schedule" in block:
            fields["learning_rate"] = None  # the shorthand of the run's
        scale = self.teacher_to_student_scale
        return {
            **fields,
            **block,
            "objective": self.objective,
            "patch_size": self.patch_size,
            "global_crop_size": int(self.global_crop_size / scale),
            "local_crop_size": int(self.local_crop_size / scale),
            "precision": "bf16" if self.bf16 else "fp32",
            "eval_data": self.eval_data,
            "output_dir": f"{self.output_dir}/{name}",
            "run_name": name,
        }

    def _block(self, name: str) -> dict[str, Any]:
        annotations = get_type_hints(StudentConfig)
        return fit_mapping(
            f"students.{name}", self.students[name] or {}, {key: annotations[key] for key in OF_A_STUDENT}
        )

    @property
    def wants_patches(self) -> bool:
        """Whether a student compares all patches with the teacher's."""
        features = self.objective == "features" and any(args.patch_weight > 0 for args in self.student_args.values())
        return features or self.gram_teacher is not None

    @property
    def mask_free(self) -> bool:
        return self.objective == "features" or all(args.mask_free for args in self.student_args.values())

    def mask_grid(self, sizes: CropSizes) -> int:
        assert self.patch_size is not None
        return int(sizes.global_crop_size / self.teacher_to_student_scale) // self.patch_size

    @classmethod
    def result_fields(cls, recipe: Mapping[str, Any]) -> dict[str, Any]:
        of_the_run = {
            f.name: plain(recipe.get(f.name, f.default))
            for f in dataclasses.fields(cls)
            if f.name in ("teacher", "objective", "patch_size", "teacher_to_student_scale")
        }
        students = {}
        for name, block in (recipe.get("students") or {}).items():
            own = {**recipe, **(block or {})}
            values = SSLConfig.result_fields(own)
            if own.get("learning_rate") is not None:  # of the block: the run's has gone into its lr_schedule
                schedule = Schedule.parse(values["lr_schedule"], "lr_schedule")
                values["lr_schedule"] = plain(with_peak(schedule, own["learning_rate"]))
            students[name] = {key: value for key, value in values.items() if key in OF_A_STUDENT}
            students[name].pop("start_from")  # what it gave is in every checkpoint
            students[name] |= {
                f.name: plain(own.get(f.name, f.default))
                for f in dataclasses.fields(StudentConfig)
                if f.name in ("cls_weight", "patch_weight", "feature_loss")
            }
        shared = {key: value for key, value in SSLConfig.result_fields(recipe).items() if key not in OF_A_STUDENT}
        return {**shared, **of_the_run, "students": students}


@contextmanager
def _named(student: str) -> Iterator[None]:
    """Lets errors begin with the name of the student."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        kind = next(kind for kind in (ArgumentError, ValueError, FileNotFoundError) if isinstance(error, kind))
        raise kind(f"student {student}: {error}") from error
