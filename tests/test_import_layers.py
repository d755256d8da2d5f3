"""Who may import whom: the arrows between the rooms of the package, read from the source without running it."""

import ast
from pathlib import Path

import pytest

from tests.testing_utils import REPOSITORY

PACKAGE = REPOSITORY / "src" / "dinov3_hf"

# Room (folder or module of the package) -> the rooms it may import besides itself.
ALLOWED: dict[str, set[str]] = {
    "__init__": {"auto", "models", "training"},
    "__main__": {"cli"},
    "_compat": set(),
    "errors": set(),
    "field_types": {"errors"},
    "yaml_text": {"errors"},
    "auto": {"models"},
    "recipes": set(),
    "data": set(),
    "distributed": set(),
    "objectives": {"distributed"},
    "curation": {"distributed"},
    "models": {"objectives"},
    "convert": {"models", "hub"},
    "hub": {"models"},
    "viz": set(),
    "evals": {"models", "viz"},
    "training": {"models", "data", "objectives", "evals", "distributed", "hub", "viz", "recipes"},
    "plan": {"models", "recipes", "distributed"},
    "cli": {"*"},
}
EVERYONE_MAY_IMPORT = {"_compat", "errors", "field_types", "yaml_text", "__init__"}
# Programs beside the package.
PROGRAMS: dict[str, set[str]] = {"training_scripts": {"*"}, "conversion": {"convert", "cli"}}


def imports_of(path: Path, module: str) -> set[str]:
    """Full names of the modules of ours that the source file `path`, imported as `module`, imports anywhere in it."""
    package = module.rsplit(".", 1)[0] if path.stem != "__init__" else module
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parent, *filter(None, [node.module])])
            # `from dinov3_hf import x` may name a room; `from dinov3_hf.room import x` does so already.
            found |= {f"{base}.{alias.name}" for alias in node.names} if base == "dinov3_hf" else {base}
    return {name for name in found if name.split(".")[0] == "dinov3_hf"}


def room_of(module: str) -> str:
    """The room of `dinov3_hf.room.module`; names taken from the package itself belong to `__init__`."""
    name = module.split(".")[1] if "." in module else "__init__"
    return name if name in ALLOWED else "__init__"


def modules() -> list[tuple[Path, str]]:
    names = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        names.append((path, ".".join(parts[:-1] if parts[-1] == "__init__" else parts)))
    return names


@pytest.mark.parametrize(("path", "module"), modules(), ids=[module for _, module in modules()])
def test_a_module_imports_only_the_rooms_below_it(path, module):
    room = module.split(".")[1] if "." in module else "__init__"
    assert room in ALLOWED, f"room {room} is new: say in ALLOWED what it may import"
    allowed = ALLOWED[room] | EVERYONE_MAY_IMPORT | {room}
    wrong = {name for name in imports_of(path, module) if room_of(name) not in allowed and "*" not in allowed}
    assert not wrong, f"{module} may not import {sorted(wrong)}"


def test_evaluations_reach_models_through_one_door():
    for path, module in modules():
        if module.startswith("dinov3_hf.evals.") and path.stem != "features":
            assert "models" not in {room_of(name) for name in imports_of(path, module)}, module


@pytest.mark.parametrize("folder", sorted(PROGRAMS))
def test_programs_import_only_their_rooms(folder):
    for path in (REPOSITORY / folder).rglob("*.py"):
        allowed = PROGRAMS[folder] | EVERYONE_MAY_IMPORT
        wrong = {name for name in imports_of(path, path.stem) if room_of(name) not in allowed}
        assert "*" in PROGRAMS[folder] or not wrong, f"{path.name} may not import {sorted(wrong)}"


def test_the_reader_of_imports_sees_all_forms(tmp_path):
    source = tmp_path / "module.py"
    source.write_text(
        "import dinov3_hf.data.masking\n"
        "from dinov3_hf import cli, SSLConfig\n"
        "from dinov3_hf.viz.pca import pca_figure\n"
        "from . import sibling\n"
        "from ..plan import memory\n"
        "def f():\n    from ..models.heads import x\n"
        "import torch\n"
    )
    rooms = {room_of(name) for name in imports_of(source, "dinov3_hf.training.module")}
    assert rooms == {"data", "cli", "__init__", "viz", "training", "plan", "models"}
