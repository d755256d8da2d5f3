"""Which files are meant: folders, patterns, braces, and the splits that file names tell."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from dinov3_hf.data.sources.base import SPLIT_NAMES, NoSuchSplit, Split

PACKED_SUFFIXES = (".parquet", ".tar")
SPLIT_WORDS = [word for words in SPLIT_NAMES.values() for word in words]


def files_below(root: Path, suffixes: tuple[str, ...]) -> list[str]:
    """Return the paths of the files below `root` that end in `suffixes`, relative to it, sorted.

    Hidden files and folders are left out; linked folders count once.
    """
    names: list[str] = []
    visited = set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        target = Path(folder).resolve()
        if target in visited:
            subfolders.clear()  # a link to a folder above would never end
            continue
        visited.add(target)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        prefix = "" if Path(folder) == root else f"{Path(folder).relative_to(root)}{os.sep}"
        names += [f"{prefix}{name}" for name in files if name.lower().endswith(suffixes) and not name.startswith(".")]
    return sorted(names)


def is_pattern(text: str) -> bool:
    """Whether `text` stands for several files: `*`, `?`, `[...]` or `{...}`."""
    return re.search(r"[*?\[{]", text) is not None


def expand_braces(pattern: str) -> list[str]:
    """Return what the shell makes of `a{000..012}b` and `a{x,y}b`, in order; other texts stay as they are.

    Raises:
        ValueError: a brace without a partner, or one that holds neither a range nor a list.
    """
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        if "{" in pattern or "}" in pattern:
            raise ValueError(f"{pattern} has a brace without a partner; write for example shard-{{000..012}}.tar.")
        return [pattern]
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if numbers:
        first, last = int(numbers[1]), int(numbers[2])
        choices = [f"{number:0{len(numbers[1])}}" for number in range(first, last + 1)]
    else:
        choices = match[1].split(",")
    if len(choices) < (1 if numbers else 2):
        raise ValueError(f"{pattern} has braces around {match[1]!r}; write {{FIRST..LAST}} or {{ONE,OTHER}}.")
    head, tail = pattern[: match.start()], pattern[match.end() :]
    texts = [text for choice in choices for text in expand_braces(head + choice + tail)]
    return list(dict.fromkeys(texts))  # {x,{0..1}} comes to x twice


def matching_files(pattern: str) -> list[Path]:
    """Return the files that `pattern` names, sorted where it leaves the order open.

    Raises:
        FileNotFoundError: nothing matches, or a file of a brace pattern is missing.
    """
    files: list[Path] = []
    for part in expand_braces(str(Path(pattern).expanduser())):
        if re.search(r"[*?\[]", part):
            anchor = Path(part).anchor
            found = sorted(path for path in Path(anchor).glob(part[len(anchor) :]) if path.is_file())
        else:
            found = [Path(part)] if Path(part).is_file() else []
        if not found:
            raise FileNotFoundError(f"no file matches {part}; check the pattern and the folder.")
        files += found
    return list(dict.fromkeys(files))


def split_words(path: Path) -> set[str]:
    """Return the words of a file's name: `x_val-00001.parquet` -> {"x", "val", "parquet"}."""
    return set(re.split(r"[^a-z]+", path.name.lower())) - {""}


def files_of_split(files: Sequence[Path], split: Split | None, own_split: str | None, data: str) -> list[Path]:
    """Return those of `files` that belong to a split, as their names tell.

    Files whose names all tell the same have no splits: they are all "train".

    Args:
        files: what to choose from.
        split: "train", "test" or None for everything.
        own_split: a word that the names of the chosen files must have; goes before `split`.
        data: what the files are called in messages.

    Raises:
        NoSuchSplit: there are none.
    """
    if own_split is not None:
        chosen = [path for path in files if own_split in split_words(path)]
        if not chosen:
            raise NoSuchSplit(f"{data} has no split {own_split}: no file with that word in its name.")
        return chosen
    if split is None:
        return list(files)
    by_word: dict[str | None, list[Path]] = {}
    for path in files:
        words = split_words(path)
        by_word.setdefault(next((word for word in SPLIT_WORDS if word in words), None), []).append(path)
    if len(by_word) == 1 and split == "train":
        return list(files)
    if len(by_word) > 1:
        for word in (*SPLIT_NAMES[split], *([None] if split == "train" else [])):
            if word in by_word:
                return by_word[word]
    expected = " or ".join(SPLIT_NAMES[split])
    raise NoSuchSplit(f"{data} has no {split} images: no file with the word {expected} in its name.")


def split_folder(root: Path, split: Split | None) -> Path:
    """Return the sub-folder of `root` that holds `split`; a folder without a sub-folder "train" is all "train".

    Raises:
        NoSuchSplit: there is none.
    """
    if split is None:
        return root
    for name in SPLIT_NAMES[split]:
        if (root / name).is_dir():
            return root / name
    if split == "train":
        return root
    expected = " or ".join(SPLIT_NAMES[split])
    raise NoSuchSplit(f"folder {root} has no {split} images; put them into a sub-folder {expected}.")
