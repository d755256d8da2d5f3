"""The documentation names what exists: functions, recipe fields, pages."""

import importlib
import inspect
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import dinov3_hf
from dinov3_hf.models.dinov3_pretraining.configuration_dinov3_pretraining import PROTOTYPE_HEAD_DEFAULTS
from dinov3_hf.models.dinov3_pretraining.modeling_dinov3_pretraining import DINOv3ForPreTraining
from dinov3_hf.models.dinov3_vit.configuration_dinov3_vit import DINOv3ViTConfig
from dinov3_hf.objectives.gram import gram_loss
from dinov3_hf.training.schedules import Schedule
from dinov3_hf.training.ssl_config import SSLConfig
from tests.testing_utils import FIXTURES, REPOSITORY

DOCS = REPOSITORY / "docs"
PACKAGE = Path(dinov3_hf.__path__[0])
ROOMS = sorted(path.name for path in PACKAGE.iterdir() if path.is_dir() and not path.name.startswith("_"))
DOTTED = re.compile(rf"`(?:dinov3_hf\.)?((?:{'|'.join(ROOMS)})\.[\w.]+)`")
PAGES = sorted(page for page in DOCS.rglob("*.md") if "_build" not in page.parts)
PAPER_INDEX = DOCS / "paper_index.md"
SSL_STEP = DOCS / "concepts" / "ssl_step.md"


def resolve(name: str) -> Any:
    """What `room.module.Class.attribute` of the package is."""
    parts = name.split(".")
    for split in range(len(parts), 0, -1):
        path = PACKAGE.joinpath(*parts[:split])
        if path.with_suffix(".py").is_file() or path.is_dir():
            found = importlib.import_module(".".join(["dinov3_hf", *parts[:split]]))
            for attribute in parts[split:]:
                found = getattr(found, attribute)
            return found
    raise ModuleNotFoundError(name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_names_of_code_resolve(page):
    for name in DOTTED.findall(page.read_text()):
        resolve(name)


def test_every_line_of_the_paper_index_names_code():
    lines = [line for line in PAPER_INDEX.read_text().splitlines() if line.startswith("|")]
    rows = [line for line in lines if not line.startswith(("|---", "| where", "| paper"))]
    assert len(rows) > 20
    assert [row for row in rows if not DOTTED.search(row)] == []


def test_every_objective_is_in_the_paper_index_and_in_the_step():
    for module in sorted((PACKAGE / "objectives").glob("*.py")):
        for name in re.findall(r"^def ([a-z]\w*)\(", module.read_text(), flags=re.MULTILINE):
            if name != "prototype_entropy":  # a measurement, of no paper
                # What aligns images with text is no part of the self-supervised step.
                for page in (PAPER_INDEX,) if module.stem == "contrastive" else (PAPER_INDEX, SSL_STEP):
                    assert f"objectives.{module.stem}.{name}`" in page.read_text(), (page.name, name)


def test_fields_in_the_step_exist():
    known = {field.name for config in (SSLConfig, Schedule) for field in fields(config)}
    known |= set(PROTOTYPE_HEAD_DEFAULTS) | set(inspect.signature(DINOv3ViTConfig).parameters)
    known |= set(inspect.signature(gram_loss).parameters) | set(dir(DINOv3ForPreTraining))
    known |= {folder.name for folder in FIXTURES.rglob("*") if folder.is_dir()}
    known |= {"dinov3_hf", "last_layer", "code", "end", "null", "loss"}  # the package, a parameter, words
    # Dotted names and paths are no fields, nor are names in capitals.
    words = re.findall(r"`([a-z]\w*)(?:: \w[\w.]*|=\"\w+\")?`", SSL_STEP.read_text())
    assert len(words) > 30
    assert sorted(set(words) - known) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]*)(?:#[^)]*)?\)", page.read_text()):
        assert not target or (page.parent / target).exists(), target
    text = page.read_text()
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= anchors
