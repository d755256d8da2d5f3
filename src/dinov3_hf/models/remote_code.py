"""Code in the model folder, so that a model type of our own opens where this package is not installed.

`AutoModel.from_pretrained(folder, trust_remote_code=True)` runs the module that `auto_map` in `config.json` names. All
that it imports must lie beside it, so our modules are copied flat, with `from .dinov3_vit_layers import ...` where the
package has `from dinov3_hf.models.dinov3_vit.layers import ...`. This module is among the copies: what was opened by
means of them can be saved again and opens again.
"""

import ast
import inspect
import os
from collections.abc import Iterable
from importlib import import_module
from importlib.util import resolve_name
from pathlib import Path
from typing import Any, ClassVar

_PACKAGE = "dinov3_hf"
_HEADER = """\
# SPDX-License-Identifier: Apache-2.0
# Copyright the dinov3_hf contributors; copied from version {version} of that package by save_pretrained.
"""
_ENTRY = "auto_classes"
_ENTRY_DOCSTRING = (
    '"""What `auto_map` names. All modules are here because some versions of transformers look no further."""'
)


class RemoteCodeMixin:
    """For models and configurations whose folder gets its code from [`RemoteCodeConfigMixin`]."""

    @classmethod
    def register_for_auto_class(cls, auto_class: str | type = "AutoModel") -> None:
        """Nothing. The `Auto*` classes call this so that transformers copies the code again when it saves; we do."""


class RemoteCodeConfigMixin(RemoteCodeMixin):
    """For configurations of model types of our own. Comes before `PreTrainedConfig` in the bases."""

    remote_code_module: ClassVar[str]  # the modeling module, which stands beside the module of the configuration
    remote_code_beside: ClassVar[tuple[str, ...]] = ()  # modules beside it that it does not import: processors
    remote_code_classes: ClassVar[
        dict[str, str]
    ]  # Auto class -> class in that module; the configuration class is "AutoConfig"

    @property
    def is_stock_representable(self) -> bool:
        """Whether transformers alone can open what this configuration describes; its folder then gets no code."""
        return False

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Save as [`PreTrainedConfig.save_pretrained`] does, after the code where transformers needs it."""
        self.__dict__.pop("auto_map", None)
        if not self.is_stock_representable:
            package = type(self).__module__.rpartition(".")[0]
            write_code(save_directory, package, (self.remote_code_module, *self.remote_code_beside))
            # One entry for all classes: transformers imports the files anew for each entry, and a model would not know
            # the class of its own configuration.
            self.auto_map = {auto: remote_name(name) for auto, name in self.remote_code_classes.items()}
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)


def remote_name(class_name: str) -> str:
    """What `auto_map` calls a class whose module is in the folder."""
    return f"{_ENTRY}.{class_name}"


def write_code(folder: str | os.PathLike[str], package: str, modules: Iterable[str]) -> None:
    """
    Write modules, and all modules of ours that they import, into a folder; `auto_map` finds them there.

    Args:
        folder: made when it is absent.
        package: full name of the package of the modules, or of their copies that transformers has imported.
        modules: names of modules in it.
    """
    sources: dict[str, str] = {}
    for module in modules:
        sources |= flat_sources(f"{package}.{module}")
    imports = [f"from .{name} import *  # noqa: F403" for name in sorted(sources)]
    sources[_ENTRY] = "\n".join(["# SPDX-License-Identifier: Apache-2.0", _ENTRY_DOCSTRING, "", *imports, ""])
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, source in sources.items():
        _write_whole(Path(folder, f"{name}.py"), source)


def flat_sources(module_name: str) -> dict[str, str]:
    """
    A module and all modules of ours that it imports, for one folder.

    Args:
        module_name: full name of a module of this package, or of a copy that transformers has imported.

    Returns:
        File name without `.py` -> source, whose imports of our modules are relative.
    """
    sources: dict[str, str] = {}
    waiting = [module_name]
    while waiting:
        name = waiting.pop()
        if _flat_name(name) not in sources:
            sources[_flat_name(name)], imported = _flat_source(name)
            waiting += imported
    return sources


def _flat_source(module_name: str) -> tuple[str, list[str]]:
    """The source with relative imports, and the full names of what it imports of ours."""
    source = inspect.getsource(import_module(module_name))
    lines = source.splitlines(keepends=True)
    imported = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.level or _is_ours(node.module or "")):
            written = "." * node.level + (node.module or "")
            name = resolve_name(written, module_name.rpartition(".")[0])
            line = lines[node.lineno - 1]
            lines[node.lineno - 1] = line.replace(f"from {written} import", f"from .{_flat_name(name)} import", 1)
            imported.append(name)
    header = _HEADER.format(version=import_module(_PACKAGE).__version__) if _is_ours(module_name) else ""
    return header + "".join(lines), imported


def _flat_name(module_name: str) -> str:
    """`dinov3_vit_layers` for `dinov3_hf.models.dinov3_vit.layers`; names that say their model, and copies', stay."""
    *_, folder, name = module_name.split(".")
    says_its_model = "dinov3" in name or "dinotxt" in name
    return name if says_its_model or not _is_ours(module_name) else f"{folder}_{name}"


def _is_ours(module_name: str) -> bool:
    return module_name.startswith(f"{_PACKAGE}.")


def _write_whole(path: Path, text: str) -> None:
    """Whoever opens `path` finds the old text or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
