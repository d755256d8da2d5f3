"""Images in the rows of a table: parquet files and data sets of the Hub, through the `datasets` library.

Both become Arrow files in the library's cache (`HF_DATASETS_CACHE`), which are mapped into memory: every worker reads
the same pages, and opening them again costs nothing.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dinov3_hf.data.decoding import Content, encoded_array
from dinov3_hf.data.sources.base import (
    SPLIT_NAMES,
    ImageSource,
    NoSuchSplit,
    Split,
    digest,
    first_line,
    one_line,
    part_and_row,
)
from dinov3_hf.errors import did_you_mean

if TYPE_CHECKING:
    import datasets

# OWNER/NAME, OWNER/NAME:CONFIG, OWNER/NAME:CONFIG:SPLIT and OWNER/NAME::SPLIT
HUB_ID = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]*))?(:(?P<split>[\w.-]+))?", re.ASCII)
IMAGE_COLUMN = "image"
# Of columns that are no images by their type: encoded ones, or paths.
IMAGE_TYPES = ("binary", "large_binary", "string", "large_string")
LABEL_COLUMNS = ("label", "labels", "cls")


class ArrowImages(ImageSource):
    """The images of a data set whose rows have been read.

    Args:
        rows: the data set.
        image_column: holds encoded images, paths, or both, as `datasets.Image` stores them, or arrays.
        label_column: holds the classes; None for no labels.
        files: names and numbers of rows of the files that the rows come from, in order, for `name`.
        data: what the data set is called in messages.
    """

    def __init__(
        self,
        rows: "datasets.Dataset",
        image_column: str,
        label_column: str | None,
        files: Sequence[tuple[str, int]],
        data: str,
        num_channels: int,
    ):
        self.rows = rows  # not its column: a data set is handed to a worker by the name of its file
        self.image_column = image_column
        self.num_channels = num_channels
        self.dtype = value_type(rows.features[image_column])
        self.files = [name for name, _ in files]
        self.ends = np.cumsum([num_rows for _, num_rows in files])
        if label_column is not None:
            column = rows.data.column(label_column)
            self.labels, self.class_names = _labels(column.to_pylist(), rows.features[label_column], data)

    def __len__(self) -> int:
        return len(self.rows)

    def content(self, i: int) -> Content:
        value = cell(self.rows.data.column(self.image_column)[i].as_py(), self.dtype)
        return Path(value) if isinstance(value, str) else value or b""

    def name(self, i: int) -> str:
        file, row = part_and_row(self.ends, i)
        return f"{self.files[file]} row {row}"

    def fingerprint(self) -> dict[str, Any]:
        names = [f"{Path(name).name} {end}".encode() for name, end in zip(self.files, self.ends, strict=True)]
        return {"images": len(self), "names": digest(names)}


def cell(value: Any, dtype: str | None) -> bytes | str | None:
    """Return what a cell of an image column holds: the encoded image, or else the path of its file.

    Args:
        value: as the library gives it; an array becomes a .npy file.
        dtype: of arrays, see `value_type`.
    """
    if isinstance(value, dict):
        value = value["path"] if value["bytes"] is None else value["bytes"]
    if isinstance(value, list | np.ndarray):
        value = encoded_array(np.asarray(value, dtype=dtype))
    return value  # type: ignore[no-any-return]


def value_type(feature: Any) -> str | None:
    """Return the numpy name of the values of a column of arrays or nested lists; None for other columns."""
    load = import_datasets()
    if isinstance(feature, load.Array2D | load.Array3D | load.Array4D):
        return str(feature.dtype)
    while isinstance(feature, load.List | load.LargeList):
        feature = feature.feature
        if isinstance(feature, load.Value):
            return str(feature.dtype)
    return None


def open_parquet(
    files: Sequence[Path], data: str, labelled: bool, num_channels: int, column: str | None = None
) -> ArrowImages:
    """Open the rows of parquet files that have the same columns.

    Raises:
        ValueError: a file that is no parquet file or cut short, no image column, or no labels where some are needed.
    """
    load = import_datasets()
    import pyarrow.parquet

    num_rows = []
    for path in files:
        with one_line(f"{path} cannot be read as a parquet file", "copy it again or leave it out"):
            num_rows.append(pyarrow.parquet.read_metadata(path).num_rows)
    if sum(num_rows) == 0:
        raise ValueError(f"{data} has no rows; name another data set.")
    features = load.Features.from_arrow_schema(pyarrow.parquet.read_schema(files[0]))
    image_column = find_image_column(features, data, column)
    label_column = find_label_column(features, data) if labelled else None
    columns = [image_column, *([label_column] if label_column else [])]
    with one_line(f"{data} cannot be read", "its files must be whole and have the same columns"):
        rows = load.load_dataset(
            "parquet", data_files=[str(path.resolve()) for path in files], split="train", columns=columns
        )
    places = [(str(path), n) for path, n in zip(files, num_rows, strict=True)]
    return ArrowImages(rows, image_column, label_column, places, data, num_channels)


def open_rows(
    rows: "datasets.Dataset", data: str, labelled: bool, num_channels: int, column: str | None = None
) -> ArrowImages:
    """Open the rows of a data set of the Hub (see `hub_rows`).

    Raises:
        ValueError: no image column, or no labels where some are needed.
    """
    image_column = find_image_column(rows.features, data, column)
    label_column = find_label_column(rows.features, data) if labelled else None
    rows = rows.select_columns([image_column, *([label_column] if label_column else [])])
    return ArrowImages(rows, image_column, label_column, [(data, len(rows))], data, num_channels)


def hub_rows(
    data: str,
    repository: str,
    config: str | None,
    own_split: str | None,
    split: Split | None,
    streaming: bool = False,
) -> Any:
    """Return a data set of the Hub, from the library's cache where it has been downloaded before.

    Args:
        data: what the user wrote.
        repository: OWNER/NAME.
        config: of the data set; None for the only or default one.
        own_split: the split of the data set to take as if it were all; None for the one that `split` asks for.
        split: "train", "test" or None for everything.
        streaming: return an `IterableDataset` that downloads as it is read.

    Raises:
        NoSuchSplit: there is no such split.
        FileNotFoundError: there is no such data set, or the Hub cannot be reached.
        ValueError: the data set cannot be read.
    """
    load = import_datasets()
    if own_split is not None and split == "test":
        raise NoSuchSplit(f"{data} is one split of a data set and has no test images of its own.")
    names = [own_split] if own_split else ["all"] if split is None else SPLIT_NAMES[split]
    refusal: Exception | None = None
    for name in names:
        try:
            return load.load_dataset(repository, name=config, split=name, streaming=streaming)
        except ValueError as error:
            if "split" not in str(error).lower():
                raise ValueError(f"data set {data} of the Hub cannot be read ({first_line(error)}).") from error
            refusal = error
        except Exception as error:
            raise FileNotFoundError(
                f"there is no folder or file {data}, and as a data set of the Hub it fails: {first_line(error)}."
            ) from error
    raise NoSuchSplit(
        f"data set {data} of the Hub has no split {' or '.join(names)} ({first_line(refusal)}); name one: "
        f"{repository}:{config or ''}:SPLIT."
    )


def find_image_column(features: dict[str, Any], data: str, wanted: str | None = None) -> str:
    """Return the column of images: `wanted`, else `image`, else the only one whose type is an image.

    Raises:
        ValueError: there is none, or several, or it holds numbers.
    """
    load = import_datasets()
    if wanted is not None and wanted not in features:
        raise ValueError(f"{data} has no column {wanted}; {did_you_mean(wanted, features)}")
    named = wanted or (IMAGE_COLUMN if IMAGE_COLUMN in features else None)
    if named is not None:
        feature = features[named]
        if isinstance(feature, load.Value) and feature.dtype not in IMAGE_TYPES:
            raise ValueError(
                f"{data} has {feature.dtype} in its column {named}, not images or their paths; name another one as "
                "`column` in a data recipe."
            )
        return named
    columns = [name for name, feature in features.items() if isinstance(feature, load.Image)]
    if len(columns) == 1:
        return columns[0]
    found = f"several image columns ({', '.join(columns)})" if columns else "no image column"
    raise ValueError(
        f"{data} has {found}; its columns are {', '.join(features)}: name one as `column` in a data recipe."
    )


def find_label_column(features: dict[str, Any], data: str) -> str:
    """Return the column of class labels.

    Raises:
        ValueError: there is none.
    """
    for name in LABEL_COLUMNS:
        if name in features:
            return name
    raise ValueError(
        f"{data} has no labels; its columns are {', '.join(features)}, and a column {' or '.join(LABEL_COLUMNS)} is "
        "needed."
    )


def _labels(values: list[Any], feature: Any, data: str) -> tuple[np.ndarray, list[str]]:
    if any(value is None or value == -1 for value in values):
        raise ValueError(f"{data} has images without a label; name a split that is labelled.")
    if isinstance(feature, import_datasets().ClassLabel):
        return np.array(values, dtype=np.int64), list(feature.names)
    if not isinstance(values[0], int | str):
        raise ValueError(f"the labels of {data} are {values[0]!r} and the like; they must be whole numbers or words.")
    class_names, labels = np.unique(values, return_inverse=True)
    return labels.astype(np.int64), [str(name) for name in class_names]


def import_datasets() -> Any:
    """Return the `datasets` library, quiet: progress bars in a terminal only, no log lines below errors."""
    try:
        import datasets  # takes a second or two
        import huggingface_hub
    except ImportError as error:
        raise ImportError(
            "parquet files, the Hub and streams are read by datasets, which is not installed; "
            "run pip install 'dinov3-hf[train]'."
        ) from error
    datasets.logging.set_verbosity_error()
    huggingface_hub.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    return datasets
