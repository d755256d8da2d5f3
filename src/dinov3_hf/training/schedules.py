"""Schedules: the value of a hyper-parameter as a pure function of the optimizer step.

Every value is computed on its own in float64, in constant time: nothing is tabulated, so a run of a million steps
costs nothing to set up and a resumed run needs no state but its step number.

    s  step, counted from 0: the value at s is the one that optimizer step s uses
    T  max_steps
    w  warm-up steps
    n  cosine steps

The two families of published recipes:

`style="dinov3"` (the `schedules` section of the published files): the warm-up excludes its end point and the cosine
includes both of its ends, so its first value is exactly `peak` and its last exactly `end`.

    start + (peak - start) s / w                              0 <= s < w
    end + (peak - end) (1 + cos(pi (s - w) / (n - 1))) / 2    w <= s < w + n      n = T - w unless given
    end                                                       afterwards

`style="dinov2"` (recipes without that section): the warm-up includes its end point, so the peak is used twice, and the
cosine stops one point short of `end`.

    start + (peak - start) s / (w - 1)                        0 <= s < w
    end + (peak - end) (1 + cos(pi (s - w) / n)) / 2          w <= s < T          n = T - w
    end                                                       T <= s
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dinov3_hf.errors import ArgumentError, did_you_mean

ScheduleStyle = Literal["dinov3", "dinov2"]
LRScaling = Literal["sqrt_wrt_1024", "none"]


def warmup_cosine(
    step: int,
    *,
    start: float,
    peak: float,
    end: float,
    warmup_steps: int,
    max_steps: int,
    cosine_steps: int | None = None,
) -> float:
    """Value at `step` of the `dinov3` style: linear warm-up, cosine with both ends included, then constant.

    Args:
        step: the optimizer step, counted from 0; steps beyond the run have the value `end`.
        start: value at step 0 of the warm-up; unused when `warmup_steps` is 0.
        peak: first value of the cosine.
        end: last value of the cosine, and every value after it.
        warmup_steps: length of the warm-up; the value `peak` follows it.
        max_steps: length of the run.
        cosine_steps: length of the cosine, 0 allowed; by default the rest of the run.
    """
    if step < warmup_steps:
        return start + (peak - start) * (step / warmup_steps)
    num_cosine = max_steps - warmup_steps if cosine_steps is None else cosine_steps
    position = step - warmup_steps
    if position >= num_cosine:
        return end
    if num_cosine == 1:
        return peak
    return end + (peak - end) * _half_cosine(position, num_cosine - 1)


def warmup_cosine_dinov2(
    step: int,
    *,
    start: float,
    peak: float,
    end: float,
    warmup_steps: int,
    max_steps: int,
    freeze_steps: int = 0,
    truncation: float = 0.0,
) -> float:
    """Value at `step` of the `dinov2` style: `freeze_steps` zeros, warm-up that includes its end point, cosine.

    With `truncation` x > 0 the cosine is drawn over int(n (1 + x)) points, both ends included, of which the first n
    are kept and stretched so that they run from exactly `peak` to exactly `end`: the slow tail is cut off.

    Args:
        step: the optimizer step, counted from 0; steps beyond the run have the value `end`.
        start: first value of the warm-up.
        peak: last value of the warm-up and first of the cosine.
        end: the value that the cosine approaches, and the value beyond the run.
        warmup_steps: length of the warm-up, after the frozen steps.
        max_steps: length of the run.
        freeze_steps: number of zeros before the warm-up.
        truncation: share of the cosine that is drawn beyond the end of the run and cut off.
    """
    if step >= max_steps:
        return end
    if step < freeze_steps:
        return 0.0
    position = step - freeze_steps
    if position < warmup_steps:
        return start if warmup_steps == 1 else start + (peak - start) * (position / (warmup_steps - 1))
    position -= warmup_steps
    num_cosine = max_steps - warmup_steps - freeze_steps
    if not truncation:
        return end + (peak - end) * _half_cosine(position, num_cosine)
    if num_cosine == 1:
        return peak
    last_point = int(num_cosine * (1 + truncation)) - 1
    last_kept = _half_cosine(num_cosine - 1, last_point)
    return end + (peak - end) * (_half_cosine(position, last_point) - last_kept) / (1 - last_kept)


def _half_cosine(position: int, length: int) -> float:
    """Falls from 1 at `position` 0 to 0 at `position` `length`."""
    return (1 + math.cos(math.pi * position / length)) / 2


def resolve_steps(duration: int | float, max_steps: int) -> int:
    """A duration in steps: a float in (0, 1) is a share of `max_steps`, rounded to the nearest step."""
    return round(duration * max_steps) if 0 < duration < 1 else int(duration)


def lr_scale_factor(rule: LRScaling, global_batch_size: int) -> float:
    """Factor of the learning rate for a batch over all ranks and accumulated micro-batches.

    `sqrt_wrt_1024` is 4 sqrt(batch / 1024), the rule of every published recipe; `none` is 1.
    """
    match rule:
        case "sqrt_wrt_1024":
            return 4 * math.sqrt(global_batch_size / 1024)
        case "none":
            return 1.0


@dataclass(frozen=True)
class Schedule:
    """One hyper-parameter over the run: linear warm-up from `start` to `peak`, cosine to `end`, then constant.

    Durations are a number of steps (integer) or a share of the run (float between 0 and 1), so that one recipe
    serves runs of different lengths.

    Args:
        start: value at the beginning of the warm-up.
        peak: value at the end of the warm-up, where the cosine begins.
        end: value at the end of the cosine; kept afterwards.
        warmup_steps: length of the warm-up.
        cosine_steps: length of the cosine; the rest of the run by default (`dinov3` style only).
        style: which end points belong to the warm-up and to the cosine; see the head of this file.
        truncation: cuts off the slow tail of the cosine (`dinov2` style only); see [`warmup_cosine_dinov2`].
    """

    start: float
    peak: float
    end: float
    warmup_steps: int | float = 0
    cosine_steps: int | float | None = None
    style: ScheduleStyle = "dinov3"
    truncation: float = 0.0

    def __post_init__(self) -> None:
        if self.style not in ("dinov3", "dinov2"):
            raise ArgumentError(f"schedule style {self.style!r} is unknown; use dinov3 or dinov2.")
        for name, duration in (("warmup_steps", self.warmup_steps), ("cosine_steps", self.cosine_steps)):
            if duration is not None and (duration < 0 or (duration > 1 and duration != int(duration))):
                raise ArgumentError(
                    f"schedule {name} {duration} is no duration; use a number of steps, or a share of the run "
                    "between 0 and 1."
                )
        if self.style == "dinov2" and self.cosine_steps is not None:
            raise ArgumentError("schedule cosine_steps needs style dinov3; remove cosine_steps or the style.")
        if self.truncation and self.style == "dinov3":
            raise ArgumentError("schedule truncation needs style dinov2; remove truncation or set style: dinov2.")
        if self.truncation < 0:
            raise ArgumentError(f"schedule truncation {self.truncation} is negative; use 0 or more.")

    @classmethod
    def constant(cls, value: float) -> "Schedule":
        """The same value at every step."""
        return cls(start=value, peak=value, end=value)

    @classmethod
    def parse(cls, value: Any, name: str = "schedule") -> "Schedule":
        """A schedule from what a recipe says: a number (constant), or a mapping of the fields of this class.

        `peak` is required; `end` is `peak` unless given; `start` is required with a warm-up.

        Args:
            value: number, mapping, or a `Schedule` (returned as it is).
            name: what the value is called in messages.

        Raises:
            ArgumentError: unknown or missing key, or a value of the wrong type.
        """
        if isinstance(value, Schedule):
            return value
        if _is_number(value):
            return cls.constant(float(value))
        if not isinstance(value, Mapping):
            raise ArgumentError(
                f"{name} is {value!r}; expected a number, or a mapping such as {{start: 0, peak: 1e-3, end: 1e-6, "
                "warmup_steps: 0.1}."
            )
        keys = [field.name for field in fields(cls)]
        for key, entry in value.items():
            if key not in keys:
                raise ArgumentError(f"{name} has no entry {key!r}; {did_you_mean(key, keys)}")
            if key != "style" and not _is_number(entry) and not (key == "cosine_steps" and entry is None):
                raise ArgumentError(f"{name}.{key} is {entry!r}; expected a number.")
        if "peak" not in value:
            raise ArgumentError(f"{name} has no peak; add peak: VALUE (end is the same unless given).")
        if value.get("warmup_steps", 0) and "start" not in value:
            raise ArgumentError(f"{name} has a warm-up but no start; add start: VALUE.")
        durations = {
            key: int(entry) if entry == int(entry) else entry
            for key in ("warmup_steps", "cosine_steps")
            if (entry := value.get(key)) is not None
        }
        try:
            return cls(
                start=float(value.get("start", value["peak"])),
                peak=float(value["peak"]),
                end=float(value.get("end", value["peak"])),
                style=value.get("style", "dinov3"),
                truncation=float(value.get("truncation", 0.0)),
                **durations,
            )
        except ArgumentError as error:
            raise ArgumentError(f"{name}: {error}") from None

    def to_plain(self) -> float | dict[str, Any]:
        """What `parse` reads back as this schedule: a number when constant, else a mapping of plain values."""
        if self == Schedule.constant(self.peak):
            return self.peak
        plain: dict[str, Any] = {"start": self.start, "peak": self.peak, "end": self.end}
        for field in fields(self)[3:]:
            value = self.__dict__[field.name]
            if value != field.default:
                plain[field.name] = value
        return plain

    def check(self, max_steps: int, name: str = "schedule") -> None:
        """Refuses a schedule that does not fit into a run of `max_steps`.

        Raises:
            ValueError: the warm-up, or warm-up and cosine together, are longer than the run.
        """
        warmup_steps = resolve_steps(self.warmup_steps, max_steps)
        if warmup_steps > max_steps:
            raise ValueError(
                f"{name}.warmup_steps {warmup_steps} is longer than the run (max_steps {max_steps}); use fewer, or a "
                "share of the run such as 0.1."
            )
        cosine_steps = 0 if self.cosine_steps is None else resolve_steps(self.cosine_steps, max_steps)
        if warmup_steps + cosine_steps > max_steps:
            raise ValueError(
                f"{name}: warmup_steps {warmup_steps} + cosine_steps {cosine_steps} are longer than the run "
                f"(max_steps {max_steps}); use cosine_steps of at most {max_steps - warmup_steps}, or leave it out."
            )

    def at(self, step: int, max_steps: int) -> float:
        """The value that optimizer step `step` (from 0) of a run of `max_steps` uses."""
        warmup_steps = resolve_steps(self.warmup_steps, max_steps)
        if self.style == "dinov2":
            return warmup_cosine_dinov2(
                step,
                start=self.start,
                peak=self.peak,
                end=self.end,
                warmup_steps=warmup_steps,
                max_steps=max_steps,
                truncation=self.truncation,
            )
        return warmup_cosine(
            step,
            start=self.start,
            peak=self.peak,
            end=self.end,
            warmup_steps=warmup_steps,
            max_steps=max_steps,
            cosine_steps=None if self.cosine_steps is None else resolve_steps(self.cosine_steps, max_steps),
        )

    def as_array(self, max_steps: int) -> NDArray[np.float64]:
        """All values of a run of `max_steps`, float64 `(max_steps,)`: for figures and tests."""
        return np.array([self.at(step, max_steps) for step in range(max_steps)], dtype=np.float64)

    def scaled(self, factor: float) -> "Schedule":
        """This schedule under a learning-rate scaling rule.

        `peak` and `end` are multiplied, `start` is not; in the `dinov2` style only `peak` is (as published: there
        `end` is the absolute minimum of the learning rate).
        """
        end = self.end if self.style == "dinov2" else self.end * factor
        return Schedule(
            start=self.start,
            peak=self.peak * factor,
            end=end,
            warmup_steps=self.warmup_steps,
            cosine_steps=self.cosine_steps,
            style=self.style,
            truncation=self.truncation,
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(frozen=True)
class TrainingSchedules:
    """Everything that a training step reads from the schedules, under the names by which it is logged.

    Args:
        max_steps: length of the run.
        lr: learning rate, with the scaling rule already applied.
        weight_decay: AdamW's weight decay.
        teacher_momentum: momentum of the teacher's exponential moving average.
        teacher_temperature: temperature of the teacher's Sinkhorn-Knopp assignment.
        local_loss_weight: factor of the DINO term between local and global crops.
        freeze_last_layer_steps: number of first steps in which the heads' last layers have learning rate 0.
        gram_weight: weight of L_Gram; None in a run without a Gram teacher.
        gram_start_step: first step in which L_Gram counts.
        head_steps: number of first steps in which the backbone has learning rate 0, for fresh heads to learn.
        ramp_steps: number of steps, after those, in which the backbone's learning rate rises from 0.
        backbone_lr_mult: what the backbone's learning rate then is, as a share of that of the rest.
    """

    max_steps: int
    lr: Schedule
    weight_decay: Schedule
    teacher_momentum: Schedule
    teacher_temperature: Schedule
    local_loss_weight: Schedule
    freeze_last_layer_steps: int = 0
    gram_weight: Schedule | None = None
    gram_start_step: int = 0
    head_steps: int = 0
    ramp_steps: int = 0
    backbone_lr_mult: float = 1.0

    @property
    def backbone_waits(self) -> bool:
        """Whether the backbone has a learning rate of its own."""
        return self.head_steps + self.ramp_steps > 0 or self.backbone_lr_mult != 1

    def at(self, step: int) -> dict[str, float]:
        """Values of optimizer step `step`: `lr`, `last_layer_lr`, `weight_decay`, `teacher_momentum`,
        `teacher_temperature`, `local_loss_weight`; `gram_weight` where there is a Gram teacher; `backbone_lr` where
        the backbone waits for its heads.

        The last layers are frozen by their learning rate, not by their gradients: AdamW's moments go on, its decoupled
        weight decay (learning rate x weight decay) stops with the rate. The schedule of the rate is not shifted. So is
        the backbone.
        """
        lr = self.lr.at(step, self.max_steps)
        values = {
            "lr": lr,
            "last_layer_lr": 0.0 if step < self.freeze_last_layer_steps else lr,
            "weight_decay": self.weight_decay.at(step, self.max_steps),
            "teacher_momentum": self.teacher_momentum.at(step, self.max_steps),
            "teacher_temperature": self.teacher_temperature.at(step, self.max_steps),
            "local_loss_weight": self.local_loss_weight.at(step, self.max_steps),
        }
        if self.gram_weight is not None:
            counts = step >= self.gram_start_step
            values["gram_weight"] = self.gram_weight.at(step, self.max_steps) if counts else 0.0
        if self.backbone_waits:
            values["backbone_lr"] = lr * self._backbone_share(step)
        return values

    def _backbone_share(self, step: int) -> float:
        """0 while the backbone waits, then a line that excludes its end point, `backbone_lr_mult`."""
        if step < self.head_steps:
            return 0.0
        ramp = min(1.0, (step - self.head_steps) / self.ramp_steps) if self.ramp_steps else 1.0
        return ramp * self.backbone_lr_mult
