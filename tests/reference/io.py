"""Reads recorded cases: a folder with `case.json` and safetensors files, or one plain JSON file."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from .round_trip import BACKBONE_KINDS, through_files

CASE_FILE = "case.json"


class BrokenCase(Exception):
    """The files of a case contradict each other."""


@dataclass(frozen=True)
class Case:
    """One recorded case, read on demand.

    `weights` have native state-dict names; `outputs` are what the original implementation computed from them and
    from `inputs` under the settings in `spec`.
    """

    folder: Path
    round_trip: bool = False  # the weights go through a folder of the Hub first

    @cached_property
    def spec(self) -> dict[str, Any]:
        return read_json(self.folder / CASE_FILE)

    @property
    def kind(self) -> str:
        return self.spec["kind"]

    @property
    def config(self) -> dict[str, Any]:
        return self.spec["config"]

    @property
    def constructor(self) -> dict[str, Any]:
        return self.config["constructor"]

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        weights = self._tensors("weights")
        return through_files(weights) if self.round_trip and self.kind in BACKBONE_KINDS else weights

    @cached_property
    def inputs(self) -> dict[str, Tensor]:
        return self._tensors("inputs")

    @cached_property
    def outputs(self) -> dict[str, Tensor]:
        return self._tensors("outputs")

    def _tensors(self, sort: str) -> dict[str, Tensor]:
        listed = self.spec[sort]
        if not listed:
            return {}  # a case without tensors of a sort has no file for it
        file = self.folder / f"{sort}.safetensors"
        tensors = load_file(file)
        for name, entry in listed.items():
            if name not in tensors:
                raise BrokenCase(f"{file.name} has no {name}, which {CASE_FILE} lists")
            found = {"shape": list(tensors[name].shape), "dtype": str(tensors[name].dtype).removeprefix("torch.")}
            if found != entry:
                raise BrokenCase(f"{name} in {file.name} is {found}, in {CASE_FILE} {entry}")
        return tensors


def find_cases(path: Path) -> Iterator[Path]:
    """Case folders and JSON files at or below `path`, sorted.

    Raises:
        FileNotFoundError: there is nothing at `path`.
    """
    if not path.exists():
        raise FileNotFoundError(f"There is no folder or file {path}.")
    if path.is_file() or (path / CASE_FILE).is_file():
        yield path
        return
    for child in sorted(path.iterdir()):
        if child.is_dir() or child.suffix == ".json":
            yield from find_cases(child)


def read_json(path: Path) -> Any:
    """The content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))
