"""`load_images`: the one door through which every command and script reads images."""

import os
import re
from pathlib import Path

from dinov3_hf.data.decoding import MODES
from dinov3_hf.data.sources.arrow import open_hub, open_parquet
from dinov3_hf.data.sources.base import IMAGE_SUFFIXES, SPLIT_NAMES, ImageSource, Split
from dinov3_hf.data.sources.digits import DigitImages
from dinov3_hf.data.sources.files import (
    PACKED_SUFFIXES,
    files_below,
    files_of_split,
    is_pattern,
    matching_files,
    split_folder,
)
from dinov3_hf.data.sources.folder import FolderImages
from dinov3_hf.errors import did_you_mean

# OWNER/NAME, OWNER/NAME:CONFIG, OWNER/NAME:CONFIG:SPLIT and OWNER/NAME::SPLIT
HUB_ID = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]*))?(:(?P<split>[\w.-]+))?", re.ASCII)


def load_images(
    source: str | os.PathLike[str],
    split: Split | None = None,
    labelled: bool = False,
    num_channels: int = 3,
    column: str | None = None,
) -> ImageSource:
    """Open a set of images.

    Args:
        source: "digits" (see `DigitImages`); a folder of images in any layout (see `FolderImages`) or of parquet
            files; parquet files, one or a pattern (`shards/*.parquet`, `shard-{000..012}.parquet`); a data set of the
            Hub, OWNER/NAME[:CONFIG[:SPLIT]], where there is no folder of that name.
        split: "train" or "test"; None takes everything. In a folder a split is the sub-folder of that name ("val" and
            "validation" also serve as "test"); a folder without a sub-folder "train" is all "train". Of files, the
            words in their names tell the same.
        labelled: whether `labels` and `class_names` are needed: of a folder the sub-folders, of a table the column
            label, labels or cls.
        num_channels: 3 for RGB, 1 for grey.
        column: of the images in a table; by default `image`, or the only one of that type.

    Raises:
        FileNotFoundError: no such data set, folder, file or split, or no images in it.
        ValueError: unknown split, no labels, files of several kinds, no image column, a broken file, `num_channels`
            other than 1 and 3.
    """
    if num_channels not in MODES:
        raise ValueError(f"images can be read with 1 or 3 channels, not {num_channels}.")
    if split not in (None, *SPLIT_NAMES):
        raise ValueError(f"unknown split {split!r}; use {' or '.join(SPLIT_NAMES)}.")
    if source == "digits":
        return DigitImages(split, num_channels)
    data = str(source)
    path = Path(data).expanduser()
    if path.is_dir():
        root = split_folder(path, split)
        packed = [root / name for name in files_below(root, PACKED_SUFFIXES)]
        if not packed or files_below(root, IMAGE_SUFFIXES):
            return FolderImages(root, labelled, num_channels)
        files = files_of_split(packed, split, data) if root == path else packed
    elif path.exists() or is_pattern(data):
        files = files_of_split([path] if path.exists() else matching_files(data), split, data)
    elif (hub_id := HUB_ID.fullmatch(data)) and not path.parent.is_dir():
        return open_hub(
            data,
            hub_id["repository"],
            hub_id["config"] or None,
            hub_id["split"],
            split,
            labelled,
            num_channels,
            column,
        )
    else:
        raise FileNotFoundError(_nothing_there(data, path))
    return _open_files(files, data, labelled, num_channels, column)


def _open_files(files: list[Path], data: str, labelled: bool, num_channels: int, column: str | None) -> ImageSource:
    kinds = sorted({path.suffix.lower() for path in files})
    if kinds == [".parquet"]:
        return open_parquet(files, data, labelled, num_channels, column)
    if len(kinds) > 1:
        raise ValueError(f"{data} has files of several kinds ({', '.join(kinds)}); name those of one kind.")
    raise ValueError(
        f"{data} is a file; name the folder that holds the images, or {' or '.join(PACKED_SUFFIXES)} files."
    )


def _nothing_there(data: str, path: Path) -> str:
    if len(path.parts) > 1:
        return f"there is no folder {data}; name one that holds images, or use digits."
    known = ["digits", *(entry.name for entry in Path().iterdir() if entry.is_dir())]
    remedy = did_you_mean(data, known, otherwise="use digits or the path of a folder of images.")
    return f"{data} is neither a folder nor a known data set; {remedy}"
