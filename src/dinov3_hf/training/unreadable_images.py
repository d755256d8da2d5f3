"""The images that a run cannot read: counted, listed in its output folder, and too many of them an error."""

import json
import logging
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

REPORT = "unreadable_images.jsonl"
MIN_DRAWS = 1000  # fewer say little about a share of a few per cent


@dataclass
class ReportedImage:
    """A line of the report."""

    name: str
    reason: str
    times: int  # it was drawn


class UnreadableImages(TrainerCallback):
    """
    Keeps the list of unreadable images, and ends a run with too many of them.

    The list is a file with one JSON object a line, `{"name": ..., "reason": ..., "times": ...}`. An image is appended
    when it is met for the first time, so that the list survives whatever ends the run; how often it was drawn is
    brought up to date with each checkpoint. A run that is resumed goes on with the list that it finds.

    Args:
        folder: the output folder of the run.
        num_images: of the training set; None for a stream, whose number is not known.
        max_share: share of unreadable images above which the run ends, in [0, 1].
    """

    def __init__(self, folder: Path, num_images: int | None, max_share: float) -> None:
        self.path = folder / REPORT
        self.num_images = num_images
        self.max_share = max_share
        self.images: dict[str, ReportedImage] = {}
        self._num_draws = 0  # in this process, as is the next
        self._num_failures = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step > 0:
            self.images = _read(self.path)
            if state.is_world_process_zero:
                self._rewrite()  # without the half line of a run that was killed while it wrote
        elif state.is_world_process_zero:
            self.path.unlink(missing_ok=True)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._rewrite()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and self.images:
            self._rewrite()
            of_all = "" if self.num_images is None else f" of {self.num_images:,}"
            logger.warning("%d%s images could not be read, see %s", len(self.images), of_all, self.path)

    def count(self, num_samples: int, failures: list[tuple[str, str]], is_main: bool) -> None:
        """
        Take note of one step.

        Args:
            num_samples: images of all ranks that were read.
            failures: name and reason of those of all ranks that were not; each was replaced by another draw.
            is_main: whether this process writes the list.

        Raises:
            ValueError: too many images are unreadable.
        """
        self._num_draws += num_samples + len(failures)
        self._num_failures += len(failures)
        first_ever = not self.images
        new = []
        for name, reason in failures:
            if name in self.images:
                self.images[name].times += 1
            else:
                self.images[name] = ReportedImage(name, reason, 1)
                new.append(name)
        if new and is_main:
            self._append(new)
            if first_ever:
                name, reason = failures[0]
                logger.warning("%s cannot be read (%s); it is left out and listed in %s", name, reason, self.path)
        if failures:
            self._check()

    def _check(self) -> None:
        what = None
        if self.num_images is not None and len(self.images) > self.max_share * self.num_images:
            what = f"{len(self.images):,} of {self.num_images:,} images"
        # A large set need not be gone through first: three standard deviations above the share are no chance.
        draws = max(self._num_draws, MIN_DRAWS)
        deviation = math.sqrt(draws * self.max_share * (1 - self.max_share))
        if self._num_failures > self.max_share * draws + 3 * deviation:
            what = f"{self._num_failures:,} of the {self._num_draws:,} images drawn so far"
        if what is not None:
            raise ValueError(
                f"{what} cannot be read, more than max_unreadable_share {self.max_share:g} allows; repair or remove "
                f"those listed in {self.path} and delete the list, or raise max_unreadable_share."
            )

    def _append(self, names: list[str]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(_line(self.images[name]) for name in names)

    def _rewrite(self) -> None:
        if self.images:
            whole = self.path.with_suffix(".tmp")
            whole.write_text("".join(map(_line, self.images.values())), encoding="utf-8")
            whole.replace(self.path)


def _line(image: ReportedImage) -> str:
    return json.dumps(asdict(image)) + "\n"


def _read(path: Path) -> dict[str, ReportedImage]:
    if not path.is_file():
        return {}
    images = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            image = ReportedImage(**json.loads(line))
        except json.JSONDecodeError:
            continue
        images[image.name] = image
    return images
