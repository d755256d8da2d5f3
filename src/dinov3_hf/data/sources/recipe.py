"""Data recipes: a YAML file that names sources of images, their weights, and the images of an evaluation.

streaming: false
sources:
  - {data: imagenet/train, weight: 0.1, alone: true}
  - {data: "web/shard-{0000..0999}.tar", weight: 0.9}
train: labelled/train
test: labelled/val
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from dinov3_hf.data.sources.arrow import HUB_ID
from dinov3_hf.data.sources.stream import SHUFFLE_BUFFER, STREAM_PREFIX
from dinov3_hf.errors import ArgumentError, did_you_mean
from dinov3_hf.field_types import describe, fit_to_annotation
from dinov3_hf.yaml_text import read_yaml_mapping

RECIPE_SUFFIXES = (".yaml", ".yml")
OF_MIXTURE = ("weight", "alone")  # fields that mean something beside other sources only


@dataclass(frozen=True)
class Entry:
    """A source of images.

    Attributes:
        data: what `--train_data` takes.
        weight: share of the images of the run, relative to the other sources; None for the number of its images.
        alone: whether its images come in global batches of their own.
        split: of the data; None for the one that is asked for.
        config: of a data set of the Hub.
        column: of the images in a table.
    """

    data: str
    weight: float | None = None
    alone: bool = False
    split: str | None = None
    config: str | None = None
    column: str | None = None


@dataclass(frozen=True)
class DataRecipe:
    """The fields of a data recipe.

    Attributes:
        streaming: whether the sources are read from front to back.
        shuffle_buffer: images of a stream that wait to be shuffled, over all its lanes.
        sources: to train on.
        train: labelled images to compare with in an evaluation.
        test: labelled images to classify in an evaluation.
    """

    streaming: bool = False
    shuffle_buffer: int = SHUFFLE_BUFFER
    sources: tuple[Entry, ...] = ()
    train: Entry | None = None
    test: Entry | None = None

    def streams(self, entry: Entry) -> bool:
        """Whether `entry` is read from front to back."""
        return self.streaming or entry.data.startswith(STREAM_PREFIX)


def read_data_recipe(path: Path) -> DataRecipe:
    """Read a data recipe; relative paths in it start from its folder.

    Raises:
        FileNotFoundError: there is no such file.
        ArgumentError: it is not such a recipe; the message names the entry.
        ValueError: a weight or a buffer that is not positive.
    """
    where = f"data recipe {path}"
    if not path.is_file():
        raise FileNotFoundError(f"there is no {where}; name a YAML file that exists.")
    values = read_yaml_mapping(
        path, where, otherwise="it must be a YAML file", form="write `sources:` and a list of `- data: FOLDER`"
    )
    recipe = _fit(values, {**get_type_hints(DataRecipe), "sources": list, "train": Any, "test": Any}, where, " in ")
    recipe["sources"] = tuple(
        _entry(entry, f"source {number} in {where}", path.parent, of_mixture=True)
        for number, entry in enumerate(recipe.get("sources", []), 1)
    )
    for name in ("train", "test"):
        if name in recipe:
            recipe[name] = _entry(recipe[name], f"{name} in {where}", path.parent, of_mixture=False)
    _check(DataRecipe(**recipe), where)
    return DataRecipe(**recipe)


def _check(recipe: DataRecipe, where: str) -> None:
    if not recipe.sources and recipe.train is None:
        raise ArgumentError(f"{where} names no images; write `sources:` and a list of `- data: FOLDER`.")
    if recipe.shuffle_buffer < 1:
        raise ValueError(f"shuffle_buffer {recipe.shuffle_buffer} in {where} is not positive; use 1 for no shuffling.")
    given = [entry.weight for entry in recipe.sources if entry.weight is not None]
    # How many images a stream has is not known.
    needed = bool(given) or (len(recipe.sources) > 1 and any(map(recipe.streams, recipe.sources)))
    if needed and len(given) < len(recipe.sources):
        raise ArgumentError(f"{where} has sources without a weight; give one to each.")
    for weight in given:
        if not 0 < weight < float("inf"):
            raise ValueError(f"weight {weight} in {where} is not positive; leave a source out rather than weigh it 0.")


def _entry(value: Any, where: str, folder: Path, of_mixture: bool) -> Entry:
    if isinstance(value, str):
        value = {"data": value}
    if not isinstance(value, Mapping):
        raise ArgumentError(f"{where} is {value!r}; write `data: FOLDER`.")
    known = {name: hint for name, hint in get_type_hints(Entry).items() if of_mixture or name not in OF_MIXTURE}
    entry = _fit(value, known, where, " of ")
    if "data" not in entry:
        raise ArgumentError(f"{where} has no data; write `data: FOLDER`.")
    return Entry(**entry | {"data": _resolve(entry["data"], folder)})


def _resolve(data: str, folder: Path) -> str:
    """`data` with a relative path started from `folder`; names that are no paths stay as they are."""
    if data.startswith(STREAM_PREFIX):
        return STREAM_PREFIX + _resolve(data.removeprefix(STREAM_PREFIX), folder)
    if data == "digits" or "://" in data or data.startswith("~") or Path(data).is_absolute():
        return data
    if HUB_ID.fullmatch(data) and not (folder / data).parent.is_dir():
        return data
    return str(folder / data)


def _fit(values: Mapping[str, Any], annotations: Mapping[str, Any], where: str, of: str) -> dict[str, Any]:
    """`values` with each of the type that `annotations` give it."""
    fitted = {}
    for name, value in values.items():
        if name not in annotations:
            raise ArgumentError(
                f"{where} has a field {name!r}, which does not exist; {did_you_mean(name, annotations)}"
            )
        try:
            fitted[name] = fit_to_annotation(value, annotations[name])
        except TypeError:
            raise ArgumentError(f"{name}{of}{where} is {value!r}; expected {describe(annotations[name])}.") from None
    return fitted
