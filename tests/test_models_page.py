"""The page of models says what the models are."""

import re

import pytest

from dinov3_hf.plan.model_costs import preset_costs
from tests.testing_utils import REPOSITORY

PAGE = (REPOSITORY / "docs" / "models.md").read_text()
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("| `")]
SIZES = {row[0].strip("`"): row for row in ROWS if len(row) == 8}


def test_every_preset_has_a_row():
    assert list(SIZES) == list(preset_costs())


@pytest.mark.parametrize("preset", SIZES)
def test_sizes(preset):
    cost = preset_costs()[preset]
    assert SIZES[preset][3:] == [
        f"{cost.num_parameters / 1e6:,.1f} M",
        *(f"{count / 1e9:,.1f}" for count in cost.flop.values()),
        *(f"{cost.memory(dtype) / 1e9:.2f}" for dtype in ("float32", "bfloat16")),
    ]


def test_published_figures_are_of_presets():
    published = {row[0].strip("`") for row in ROWS if len(row) != 8 and row[0].strip("`") not in ("",)}
    assert {name for name in published if name.startswith(("vit", "convnext"))} == set(SIZES) - {"vitl16plus"}


def test_the_example_runs():
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(block, {})
