"""Gram anchoring as a recipe says it (DINOv3, arXiv 2508.10104, section 4)."""

from dataclasses import dataclass, field
from typing import Literal

from dinov3_hf.errors import ArgumentError
from dinov3_hf.training.batch_arithmetic import check_gram_groups
from dinov3_hf.training.recipe_config import RecipeConfig, changes_the_result
from dinov3_hf.training.schedules import Schedule, resolve_steps

EMA, COPY = "ema", "copy"  # values of gram_teacher; any other names a model
# Fields of a Gram teacher that is neither absent nor the EMA teacher -> how they are left out.
_OF_A_TEACHER_OF_ITS_OWN = {
    "gram_crop_size": "null",
    "gram_refresh_steps": "null",
    "gram_first_refresh_step": "0",
    "gram_max_refreshes": "null",
}


@dataclass
class GramConfig(RecipeConfig):
    """Fields of the Gram teacher and of L_Gram; see [`SSLConfig`]."""

    gram_teacher: str | None = field(
        default=None,
        metadata=changes_the_result(
            "Whose patch similarities the student keeps: null for no Gram anchoring; copy, of the EMA teacher at "
            "gram_start_step; ema, the EMA teacher itself; or a trained model: a run, a checkpoint-N, a model folder."
        ),
    )
    gram_start_step: float = field(
        default=0,
        metadata=changes_the_result("Step (or share of the run) from which L_Gram counts, and at which copy copies."),
    )
    gram_weight_schedule: Schedule = field(
        default_factory=lambda: Schedule.constant(2.0),
        metadata=changes_the_result("Weight of L_Gram, a schedule."),
    )
    gram_crop_size: int | None = field(
        default=None,
        metadata=changes_the_result(
            "Side in pixels of the Gram teacher's own crops, the global crops' windows without distortions; its "
            "features are resized to the student's patches. Null: it sees the EMA teacher's crops."
        ),
    )
    gram_refresh_steps: float | None = field(
        default=None,
        metadata=changes_the_result(
            "Steps (or share of the run) between two refreshes of the Gram teacher by the EMA teacher; null for none."
        ),
    )
    gram_first_refresh_step: float = field(
        default=0,
        metadata=changes_the_result("Steps (or share of the run) before the first refresh, at least."),
    )
    gram_max_refreshes: int | None = field(
        default=None,
        metadata=changes_the_result("Number of refreshes at most; null for no limit."),
    )
    gram_normalize: bool = field(
        default=True,
        metadata=changes_the_result("Compare cosines of patches; false compares their dot products."),
    )
    gram_per_image: bool = field(
        default=True,
        metadata=changes_the_result("Compare the patches of a crop with one another only."),
    )
    gram_group_size: int | None = field(
        default=None,
        metadata=changes_the_result(
            "With gram_per_image false, images whose patches are compared together: consecutive groups of the global "
            "batch; null is all of it."
        ),
    )
    gram_negatives: Literal["keep", "remove", "remove_teacher"] = field(
        default="keep",
        metadata=changes_the_result("Negative similarities: keep, remove (become 0), remove_teacher (its alone do)."),
    )
    gram_tokens: Literal["all", "masked", "unmasked"] = field(
        default="all",
        metadata=changes_the_result("Which of the student's patches take part; all, unless gram_per_image is false."),
    )
    gram_antialias: bool = field(
        default=False,
        metadata=changes_the_result("Low-pass the Gram teacher's features when they are resized to a coarser grid."),
    )

    def check_gram(self) -> None:
        """Refuse Gram fields that contradict one another, or the length of the run.

        Raises:
            ArgumentError: a field that another one makes meaningless.
            ValueError: a number out of range, or a step beyond the run.
        """
        self._check_gram_choices()
        self._check_gram_steps()
        weight = self.gram_weight_schedule
        if min(weight.start, weight.peak, weight.end) < 0:
            raise ValueError(f"gram_weight_schedule {weight.to_plain()} is negative; use weights of 0 or more.")
        self.check_gram_batch(self.train_batch_size)

    def check_gram_batch(self, micro_batch: int) -> None:
        """Refuse groups of L_Gram that do not tile `micro_batch` images of one forward pass on one rank.

        Raises:
            ValueError: they do not.
        """
        group_size = None if self.gram_per_image else (self.gram_group_size or self.global_batch_size)
        check_gram_groups(group_size, micro_batch, self.global_batch_size)

    def _check_gram_choices(self) -> None:
        if self.gram_teacher in (None, EMA):
            idle = [name for name, unset in _OF_A_TEACHER_OF_ITS_OWN.items() if self.__dict__[name] not in (None, 0)]
            if idle:
                unset = ", ".join(f"{name}: {_OF_A_TEACHER_OF_ITS_OWN[name]}" for name in idle)
                raise ArgumentError(
                    f"{' and '.join(idle)} need a Gram teacher of its own, but gram_teacher is "
                    f"{self.gram_teacher or 'null'}; set gram_teacher: copy, or set {unset}."
                )
        if self.gram_refresh_steps is None and (self.gram_max_refreshes is not None or self.gram_first_refresh_step):
            raise ArgumentError(
                "gram_first_refresh_step and gram_max_refreshes need gram_refresh_steps; set it, or leave them out."
            )
        if self.gram_tokens != "all" and self.gram_per_image:
            raise ArgumentError(
                f"gram_tokens {self.gram_tokens} leaves crops of different numbers of patches; set gram_per_image: "
                "false, or gram_tokens: all."
            )
        if self.gram_group_size is not None and self.gram_per_image:
            raise ArgumentError(
                f"gram_group_size {self.gram_group_size} needs gram_per_image: false; set it, or leave "
                "gram_group_size out."
            )

    def _check_gram_steps(self) -> None:
        for name in ("gram_start_step", "gram_first_refresh_step", "gram_refresh_steps"):
            steps = self.__dict__[name]
            if steps is None:
                continue
            if steps < 0 or (name == "gram_refresh_steps" and steps == 0):
                what = "negative" if steps < 0 else "not positive"
                raise ValueError(f"{name} {steps:g} is {what}; use a number of steps, or a share of the run.")
            if resolve_steps(steps, self.max_steps) >= self.max_steps:
                raise ValueError(
                    f"{name} {steps:g} is beyond the run (max_steps {self.max_steps}); use a smaller number, or a "
                    "share of the run such as 0.05."
                )
        if self.gram_max_refreshes is not None and self.gram_max_refreshes < 0:
            raise ValueError(f"gram_max_refreshes {self.gram_max_refreshes} is negative; use 0 for none.")
