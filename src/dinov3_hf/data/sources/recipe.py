"""Data recipes: a YAML file that names sources of images, their weights, and the images of an evaluation.

streaming: false
sources:
  - {data: imagenet/train, weight: 0.1, alone: true}
  - {data: "web/shard-{0000..0999}.tar", weight: 0.9}
train: labelled/train
test: labelled/val
"""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from dinov3_hf.data.sources.arrow import HUB_ID
from dinov3_hf.data.sources.stream import SHUFFLE_BUFFER, STREAM_PREFIX
from dinov3_hf.errors import ArgumentError, did_you_mean
from dinov3_hf.yaml_text import parse_yaml

RECIPE_SUFFIXES = (".yaml", ".yml")
TYPE_NAMES = {str: "text", bool: "true or false", int: "a whole number", float: "a number", list: "a list"}


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
        shuffle_buffer: images of a stream that are shuffled among themselves.
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


ENTRY_TYPES: dict[str, type] = {
    "data": str,
    "weight": float,
    "alone": bool,
    "split": str,
    "config": str,
    "column": str,
}
RECIPE_TYPES: dict[str, type] = {"streaming": bool, "shuffle_buffer": int, "sources": list}


def read_data_recipe(path: Path) -> DataRecipe:
    """Read a data recipe; relative paths in it start from its folder.

    Raises:
        FileNotFoundError: there is no such file.
        ArgumentError: it is not such a recipe; the message names the entry.
        ValueError: a weight or a buffer that is not positive.
    """
    where = f"data recipe {path}"
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no {where}; name a YAML file that exists.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentError(f"{where} cannot be read ({error}); it must be a YAML file.") from None
    values = parse_yaml(text, where)
    if not isinstance(values, Mapping):
        raise ArgumentError(f"{where} is not a mapping; write `sources:` and a list of `- data: FOLDER`.")
    _check_names(values, [field.name for field in fields(DataRecipe)], where)
    recipe: dict[str, Any] = {
        name: _fit(values[name], expected, f"{name} in {where}")
        for name, expected in RECIPE_TYPES.items()
        if name in values
    }
    recipe["sources"] = tuple(
        _entry(entry, f"source {number} in {where}", path.parent, of_mixture=True)
        for number, entry in enumerate(recipe.get("sources", []), 1)
    )
    for name in ("train", "test"):
        if name in values:
            recipe[name] = _entry(values[name], f"{name} in {where}", path.parent, of_mixture=False)
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
    known = [name for name in ENTRY_TYPES if of_mixture or name not in ("weight", "alone")]
    _check_names(value, known, where)
    required = [field.name for field in fields(Entry) if field.default is MISSING]
    for name in required:
        if name not in value:
            raise ArgumentError(f"{where} has no {name}; write `{name}: FOLDER`.")
    fitted = {name: _fit(entry, ENTRY_TYPES[name], f"{name} of {where}") for name, entry in value.items()}
    return Entry(**fitted | {"data": _resolve(fitted["data"], folder)})


def _resolve(data: str, folder: Path) -> str:
    """`data` with a relative path started from `folder`; names that are no paths stay as they are."""
    if data.startswith(STREAM_PREFIX):
        return STREAM_PREFIX + _resolve(data.removeprefix(STREAM_PREFIX), folder)
    if data == "digits" or "://" in data or data.startswith("~") or Path(data).is_absolute():
        return data
    if HUB_ID.fullmatch(data) and not (folder / data).parent.is_dir():
        return data
    return str(folder / data)


def _check_names(values: Mapping[str, Any], known: list[str], where: str) -> None:
    for name in values:
        if name not in known:
            raise ArgumentError(f"{where} has a field {name!r}, which does not exist; {did_you_mean(name, known)}")


def _fit(value: Any, expected: type, where: str) -> Any:
    if expected is float and type(value) is int:
        return float(value)
    if type(value) is not expected:
        raise ArgumentError(f"{where} is {value!r}; expected {TYPE_NAMES[expected]}.")
    return value
