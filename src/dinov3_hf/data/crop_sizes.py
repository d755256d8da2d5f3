"""Crop sizes of a run that mixes resolutions: drawn once for each optimizer step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset

from dinov3_hf.data.sampler import SampleKey
from dinov3_hf.data.seeding import Stream, random_generator
from dinov3_hf.errors import ArgumentError
from dinov3_hf.field_types import fit_mapping

PROBABILITY_TOLERANCE = 1e-6

ENTRY_TYPES: dict[str, Any] = {
    "global": int,
    "local": int,
    "gram": int | None,
    "probability": float,
    "per_device_train_batch_size": int | None,
}
REQUIRED_ENTRIES = ("global", "local", "probability")


@dataclass(frozen=True)
class CropSizes:
    """Sides of the crops of one optimizer step in pixels, and how often they are drawn.

    Args:
        global_crop_size: of the two global crops.
        local_crop_size: of the local crops.
        gram_crop_size: of the Gram teacher's crops; None for no such crops.
        probability: share of the steps that have these sizes.
        per_device_train_batch_size: images of one forward pass on one rank at these sizes; None for as many as the
            loader gives.
    """

    global_crop_size: int
    local_crop_size: int
    gram_crop_size: int | None = None
    probability: float = 1.0
    per_device_train_batch_size: int | None = None


@dataclass(frozen=True)
class CropSizeMix:
    """The sizes that a run mixes. What a step has is a function of `seed` and the step alone: ranks, worker
    processes, accumulation and a restart leave it as it was.

    Args:
        sizes: at least one; the probabilities sum to 1.
        seed: of the run.
    """

    sizes: tuple[CropSizes, ...]
    seed: int

    def index_at(self, step: int) -> int:
        """Which of `sizes` the optimizer step (from 0) has."""
        if len(self.sizes) == 1:
            return 0
        probabilities = [sizes.probability for sizes in self.sizes]
        total = sum(probabilities)
        rng = random_generator(self.seed, Stream.CROP_SIZES, step)
        return int(rng.choice(len(self.sizes), p=[probability / total for probability in probabilities]))

    def at(self, step: int) -> CropSizes:
        """The sizes of the optimizer step (from 0)."""
        return self.sizes[self.index_at(step)]


def parse_crop_sizes(name: str, entries: Sequence[Mapping[str, Any]]) -> tuple[CropSizes, ...]:
    """Read the field `name` of a recipe: a list of `{global, local, gram, probability, per_device_train_batch_size}`.

    `gram` and `per_device_train_batch_size` may be left out.

    Raises:
        ArgumentError: an entry that is missing, does not exist or has the wrong type.
        ValueError: probabilities that are not positive or do not sum to 1.
    """
    if not entries:
        raise ValueError(f"{name} is an empty list; give at least one entry, or null for one size.")
    parsed = tuple(_parse_entry(f"{name}.{i}", entry) for i, entry in enumerate(entries))
    total = sum(sizes.probability for sizes in parsed)
    if abs(total - 1) > PROBABILITY_TOLERANCE:
        raise ValueError(f"the probabilities of {name} sum to {total:g}; they must sum to 1.")
    return parsed


def sizes_of_entries(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What of a recipe's entries changes the result, in one spelling."""
    return [
        {name: entry.get(name) for name in ENTRY_TYPES if name != "per_device_train_batch_size"} for entry in entries
    ]


def _parse_entry(name: str, entry: Any) -> CropSizes:
    if not isinstance(entry, Mapping):
        raise ArgumentError(f"{name} is {entry!r}; expected a mapping such as {{global: 512, local: 112}}.")
    fitted = fit_mapping(name, entry, ENTRY_TYPES)
    for key in REQUIRED_ENTRIES:
        if key not in fitted:
            raise ArgumentError(f"{name} has no {key}; an entry needs {', '.join(REQUIRED_ENTRIES)}.")
    if not 0 < fitted["probability"] <= 1:
        raise ValueError(
            f"{name}.probability {fitted['probability']:g} is no share of the steps; use a number above 0, at most 1."
        )
    return CropSizes(
        global_crop_size=fitted["global"],
        local_crop_size=fitted["local"],
        gram_crop_size=fitted.get("gram"),
        probability=fitted["probability"],
        per_device_train_batch_size=fitted.get("per_device_train_batch_size"),
    )


class MixedSizes(Dataset[dict[str, Any]]):
    """Samples of data sets that differ in their crop sizes, for keys as `StreamSampler` yields them: all samples of
    an optimizer step come from the same one, so that they can be stacked.

    Args:
        datasets: one for each of `mix.sizes`.
        mix: draws which of them a step has.
        batch_size: images of a step, over all ranks and micro-batches.
    """

    def __init__(self, datasets: Sequence[Dataset[dict[str, Any]]], mix: CropSizeMix, batch_size: int):
        self.datasets = datasets
        self.mix = mix
        self.batch_size = batch_size

    def __getitem__(self, key: SampleKey) -> dict[str, Any]:
        return self.datasets[self.mix.index_at(key.position // self.batch_size)][key]
