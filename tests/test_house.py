"""Limits that keep the tree readable and small, and the versions that are written in more than one place."""

import configparser

from tests.testing_utils import FIXTURES, REPOSITORY


def test_files_stay_short():
    limits = {"src": 600, "training_scripts": 150, "conversion": 150}
    for folder, limit in limits.items():
        for path in (REPOSITORY / folder).rglob("*.py"):
            length = len(path.read_text().splitlines())
            assert length <= limit, f"{path.relative_to(REPOSITORY)} has {length} lines, more than {limit}"


def test_fixtures_stay_small():
    assert sum(path.stat().st_size for path in FIXTURES.rglob("*") if path.is_file()) <= 15 * 2**20


def test_the_floor_that_is_tested_is_the_floor_that_is_promised():
    setup = configparser.ConfigParser()
    setup.read(REPOSITORY / "setup.cfg")
    requirement = next(
        line for line in setup["options"]["install_requires"].split() if line.startswith("transformers")
    )
    floor = requirement.removeprefix("transformers>=").partition(",")[0]
    assert f"'transformers=={floor}.*'" in (REPOSITORY / "Makefile").read_text()


def test_the_citation_names_the_version():
    from dinov3_hf import __version__

    assert f"\nversion: {__version__}\n" in (REPOSITORY / "CITATION.cff").read_text()
