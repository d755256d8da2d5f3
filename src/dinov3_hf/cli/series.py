"""Patch similarity by several models, or by the checkpoints of runs: computed one model after the other."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from dinov3_hf.cli.models import open_model
from dinov3_hf.cli.pictures import patch_map, picture_features
from dinov3_hf.cli.runs import is_run, spread, teachers_of_run
from dinov3_hf.evals.dense_health import dense_health
from dinov3_hf.training.evaluation import described
from dinov3_hf.viz.series import Panel, Series
from dinov3_hf.viz.similarity import cosine_maps


@dataclass(frozen=True)
class Member:
    """A model of a series: what it is called there, and where it is."""

    label: str
    source: str


def members(sources: Sequence[str], limit: int) -> tuple[dict[str, list[Member]], list[str]]:
    """The models that `sources` name, series by series, and what is wrong with those that are left out.

    Args:
        sources: models, which make up one series, or output folders of runs, each a series of its checkpoints.
        limit: checkpoints of a run to choose at most.

    Raises:
        FileNotFoundError: a run has no complete checkpoint.
        ValueError: `sources` are models as well as runs.
    """
    runs = [source for source in sources if is_run(source)]
    if not runs:
        return {"": [Member(source.removesuffix("/teacher"), source) for source in sources]}, []
    if len(runs) < len(sources):
        model = next(source for source in sources if source not in runs)
        raise ValueError(f"{model} is no run with checkpoints, and {runs[0]} is one; name models, or runs.")
    series, left_out = {}, []
    for run in runs:
        teachers, incomplete = teachers_of_run(Path(run))
        left_out += incomplete
        chosen = spread(teachers, limit)
        series[run] = [Member(f"step {teacher.step:,}", str(teacher.folder)) for teacher in chosen]
    return series, left_out


def similarity_series(
    sources: Sequence[str],
    pictures: Sequence[Image.Image],
    patch: tuple[int, int] | None,
    size: int | None,
    limit: int,
    device: str | None,
) -> tuple[list[Series], list[str]]:
    """Similarity of a patch of the first picture with all patches, and health of these pictures, model by model.

    Args:
        sources: see `members`.
        pictures: RGB, any sizes.
        patch: row and column in the grid of the first model, the middle one if None; models with other patches take
            the one in the same place.
        size: short side of the models' input in pixels; see `picture_features`.
        limit: checkpoints of a run to choose at most.
        device: see `open_model`.

    Returns:
        The series, and a line about each checkpoint that is left out.

    Raises:
        FileNotFoundError: there is no such model, or no complete checkpoint.
        ValueError: the patch is outside the grid, the size does not divide, or a model has no patches.
    """
    chosen, left_out = members(sources, limit)
    place: tuple[float, float] | None = None  # of the patch's middle, as shares of height and width
    series = []
    for name, models in chosen.items():
        panels = []
        for member in models:
            try:
                model, processor = open_model(member.source, device)
            except (OSError, ValueError) as error:
                if not name:  # asked for by its own name
                    raise
                left_out.append(f"{member.source} is left out: {' '.join(str(error).split())}")
                continue
            features = picture_features(model, processor, pictures, size)
            patches = [patch_map(of_picture) for of_picture in features]  # (h, w, D) each
            rows, columns, _ = patches[0].shape
            if place is None:
                row, column = patch or (rows // 2, columns // 2)
                place = ((row + 0.5) / rows, (column + 0.5) / columns)
            row, column = int(place[0] * rows), int(place[1] * columns)
            health = [dense_health(of_picture) for of_picture in features]
            means = {f"eval_{key}": float(np.mean([numbers[key] for numbers in health])) for key in health[0]}
            notes = tuple(f"{label} {value}" for label, value in described(means).items())
            panels.append(Panel(member.label, notes, cosine_maps(patches, row, column), (row, column)))
        if not panels:
            raise FileNotFoundError(f"no checkpoint of {name} can be opened; {left_out[-1]}")
        series.append(Series(name, panels))
    return series, left_out
