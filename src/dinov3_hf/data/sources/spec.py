"""`load_images`: the one door through which every command and script reads images."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dinov3_hf.data.sources.arrow import HUB_ID, hub_rows, open_parquet, open_rows
from dinov3_hf.data.sources.base import IMAGE_SUFFIXES, SPLIT_NAMES, ImageSource, NoSuchSplit, Split
from dinov3_hf.data.sources.digits import DigitImages
from dinov3_hf.data.sources.files import (
    PACKED_SUFFIXES,
    expand_braces,
    files_below,
    files_of_split,
    is_pattern,
    matching_files,
    split_folder,
)
from dinov3_hf.data.sources.folder import FolderImages
from dinov3_hf.data.sources.mixture import Mixture, Part
from dinov3_hf.data.sources.recipe import RECIPE_SUFFIXES, DataRecipe, Entry, read_data_recipe
from dinov3_hf.data.sources.shards import Shard, parquet_shards, row_shards, tar_shards
from dinov3_hf.data.sources.stream import SHUFFLE_BUFFER, STREAM_PREFIX, ImageStream
from dinov3_hf.data.sources.tars import TarImages
from dinov3_hf.errors import did_you_mean


def load_images(
    source: str | os.PathLike[str], split: Split | None = None, labelled: bool = False, num_channels: int = 3
) -> ImageSource:
    """Open a set of images.

    Args:
        source: "digits"; a folder of images in any layout, or of parquet or tar files; one such file or a pattern
            (`shards/*.parquet`, `shard-{000..012}.tar`); a data set of the Hub, OWNER/NAME[:CONFIG[:SPLIT]], where
            there is no folder of that name; any of these but folders of images behind `stream:`, also at a remote
            address; or a data recipe, a YAML file of several sources.
        split: "train" or "test"; None takes everything. In a folder a split is the sub-folder of that name ("val" and
            "validation" also serve as "test"); a folder without a sub-folder "train" is all "train". Of files, the
            words in their names tell the same.
        labelled: whether `labels` and `class_names` are needed: of a folder the sub-folders, of a table the column
            label, labels or cls, of a tar file the `.cls` members.
        num_channels: 3 for RGB and 1 for grey, to which images are converted; any other number is that of the images.

    Raises:
        FileNotFoundError: no such data set, folder, file or split (`NoSuchSplit`), or no images in it.
        ValueError: unknown split, no labels, files of several kinds, no image column, a broken file, images with
            another number of channels.
        ArgumentError: a data recipe that cannot be parsed.
    """
    if num_channels < 1:
        raise ValueError(f"num_channels {num_channels} is no number of channels; use 3 for RGB, 1 for grey.")
    if split not in (None, *SPLIT_NAMES):
        raise ValueError(f"unknown split {split!r}; use {' or '.join(SPLIT_NAMES)}.")
    data = str(source)
    if Path(data).suffix.lower() in RECIPE_SUFFIXES and not data.startswith(STREAM_PREFIX):
        return _open_recipe(read_data_recipe(Path(data).expanduser()), data, split, labelled, num_channels)
    return _opened(_Opener(data, split, labelled, num_channels))


def _opened(opener: "_Opener") -> ImageSource:
    source = opener.open()
    source.check_channels()  # rather than when a run has begun
    return source


def _open_recipe(recipe: DataRecipe, data: str, split: Split | None, labelled: bool, num_channels: int) -> ImageSource:
    def open_entry(entry: Entry, split: Split | None) -> ImageSource:
        opener = _Opener(entry.data, split, labelled, num_channels, entry.split, entry.config, entry.column)
        streamed = recipe.streams(entry) and not labelled
        return _opened(replace(opener, shuffle_buffer=recipe.shuffle_buffer if streamed else None))

    if recipe.train is not None and (labelled or not recipe.sources) and split != "test":
        return open_entry(recipe.train, "train")
    if recipe.test is not None and split == "test":
        try:
            return open_entry(recipe.test, "test")
        except NoSuchSplit:  # it may be all that the entry names
            return open_entry(recipe.test, None)
    if not recipe.sources or (split == "test" and recipe.train is not None):
        raise NoSuchSplit(
            f"data recipe {data} has no {split or 'sources of'} images; add an entry `{split or 'sources'}`."
        )
    opened = [open_entry(entry, split) for entry in recipe.sources]
    weights = [entry.weight or len(source) for entry, source in zip(recipe.sources, opened, strict=True)]
    return Mixture(
        [
            Part(source, weight, entry.alone)
            for entry, source, weight in zip(recipe.sources, opened, weights, strict=True)
        ]
    )


@dataclass(frozen=True)
class _Opener:
    """What is to be opened, and how; `own_split`, `config` and `column` are of an entry of a data recipe."""

    data: str
    split: Split | None
    labelled: bool
    num_channels: int
    own_split: str | None = None
    config: str | None = None
    column: str | None = None
    shuffle_buffer: int | None = None  # not None: streamed

    def open(self) -> ImageSource:
        data = self.data
        if data.startswith(STREAM_PREFIX):
            buffer = self.shuffle_buffer or SHUFFLE_BUFFER
            return replace(self, data=data.removeprefix(STREAM_PREFIX), shuffle_buffer=buffer).open()
        if self.labelled and self.shuffle_buffer is not None:
            raise ValueError(f"{data} is a stream, which cannot be evaluated on; leave out {STREAM_PREFIX}.")
        if self.own_split is not None and self.split == "test":
            raise NoSuchSplit(f"{data} is taken as its split {self.own_split} and has no test images of its own.")
        path = Path(data).expanduser()
        if "://" in data:
            return self._open_remote()
        if data == "digits":
            self._refuse_streaming("digits are in memory")
            return DigitImages(self._digits_split(), self.num_channels)
        if path.is_dir():
            return self._open_folder(path)
        if path.exists() or is_pattern(data):
            files = [path] if path.exists() else matching_files(data)
            return self._open_files(files_of_split(files, self.split, self.own_split, data))
        if (hub_id := HUB_ID.fullmatch(data)) and not path.parent.is_dir():
            return self._open_hub(hub_id["repository"], hub_id["config"] or self.config, hub_id["split"])
        raise FileNotFoundError(_nothing_there(data, path))

    def _digits_split(self) -> Split | None:
        if self.own_split is None:
            return self.split
        for split in SPLIT_NAMES:
            if split == self.own_split:
                return split
        raise NoSuchSplit(f"digits have no split {self.own_split}; use {' or '.join(SPLIT_NAMES)}.")

    def _open_folder(self, folder: Path) -> ImageSource:
        packed = [folder / name for name in files_below(folder, PACKED_SUFFIXES)]
        if packed and files_below(folder, IMAGE_SUFFIXES):
            packed = []  # a folder of images that has such files too
        if self.own_split is not None and (folder / self.own_split).is_dir():
            return replace(self, data=str(folder / self.own_split), own_split=None, split=None).open()
        has_split_folders = any((folder / name).is_dir() for names in SPLIT_NAMES.values() for name in names)
        if packed and not has_split_folders:
            return self._open_files(files_of_split(packed, self.split, self.own_split, self.data))
        if self.own_split is not None:
            raise NoSuchSplit(f"folder {folder} has no split {self.own_split}: no sub-folder of that name.")
        root = split_folder(folder, self.split)
        if packed:
            return self._open_files([path for path in packed if path.is_relative_to(root)])
        self._refuse_streaming(f"{folder} is a folder of images, which are read one by one anyway")
        return FolderImages(root, self.labelled, self.num_channels)

    def _open_files(self, files: list[Path]) -> ImageSource:
        kinds = sorted({path.suffix.lower() for path in files})
        if not set(kinds) <= set(PACKED_SUFFIXES):
            raise ValueError(
                f"{self.data} is a file; name the folder that holds the images, or files of the kind "
                f"{' or '.join(PACKED_SUFFIXES)}."
            )
        if len(kinds) > 1:
            raise ValueError(f"{self.data} has files of several kinds ({', '.join(kinds)}); name those of one kind.")
        if self.shuffle_buffer is not None:
            return self._stream_files(kinds[0], [str(path) for path in files])
        if kinds == [".parquet"]:
            return open_parquet(files, self.data, self.labelled, self.num_channels, self.column)
        return TarImages(files, self.data, self.labelled, self.num_channels)

    def _open_remote(self) -> ImageSource:
        if self.shuffle_buffer is None:
            raise ValueError(f"{self.data} is not on this machine; write {STREAM_PREFIX}{self.data}, or download it.")
        suffix = Path(self.data).suffix.lower()
        if suffix not in PACKED_SUFFIXES:
            raise ValueError(f"{self.data} cannot be streamed; its files must end in {' or '.join(PACKED_SUFFIXES)}.")
        return self._stream_files(suffix, expand_braces(self.data))

    def _open_hub(self, repository: str, config: str | None, own_split: str | None) -> ImageSource:
        own_split = own_split or self.own_split
        if self.shuffle_buffer is not None:
            rows = hub_rows(self.data, repository, config, own_split, self.split, streaming=True)
            return self._stream(row_shards(rows, self.data, self.column))
        rows = hub_rows(self.data, repository, config, own_split, self.split)
        return open_rows(rows, self.data, self.labelled, self.num_channels, self.column)

    def _stream_files(self, suffix: str, files: list[str]) -> ImageStream:
        if suffix == ".tar":
            return self._stream(tar_shards(files, self.data))
        return self._stream(parquet_shards(files, self.data, self.column))

    def _stream(self, shards: Sequence[Shard]) -> ImageStream:
        assert self.shuffle_buffer is not None
        return ImageStream(shards, self.data, self.num_channels, self.shuffle_buffer)

    def _refuse_streaming(self, reason: str) -> None:
        if self.shuffle_buffer is not None:
            raise ValueError(f"{reason}; leave out {STREAM_PREFIX} or `streaming`.")


def _nothing_there(data: str, path: Path) -> str:
    if len(path.parts) > 1:
        return f"there is no folder or file {data}; name images that exist, or use digits."
    known = ["digits", *(entry.name for entry in Path().iterdir() if entry.is_dir())]
    remedy = did_you_mean(data, known, otherwise="use digits or the path of a folder of images.")
    return f"{data} is neither a folder nor a known data set; {remedy}"
