"""What `info` says without importing torch is what torch, transformers and the package say themselves."""

import json
import os
import sys

import pytest
import torch
import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.auto_factory import _BaseAutoBackboneClass, _BaseAutoModelClass
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from dinov3_hf.cli import info
from dinov3_hf.recipes.pages import recipe_summaries
from tests.testing_utils import run_in_process


def test_registered_classes_are_those_of_the_auto_classes():
    import dinov3_hf.auto  # noqa: F401  (registers when it is imported)

    ours = {
        name: cls for name, cls in CONFIG_MAPPING._extra_content.items() if cls.__module__.startswith("dinov3_hf.")
    }
    found = {"AutoConfig": {name: cls.__name__ for name, cls in ours.items()}}
    for auto_class in vars(modeling_auto).values():
        if isinstance(auto_class, type) and issubclass(auto_class, _BaseAutoModelClass | _BaseAutoBackboneClass):
            registered = auto_class._model_mapping._extra_content if auto_class._model_mapping is not None else {}
            classes = {name: registered[config].__name__ for name, config in ours.items() if config in registered}
            found |= {auto_class.__name__: classes} if classes else {}
    assert found == info.REGISTERED


def test_versions_are_those_that_are_imported():
    versions = info.versions()
    assert versions["torch"] == torch.__version__.partition("+")[0] or versions["torch"] == torch.__version__
    assert versions["transformers"] == transformers.__version__
    assert versions["python"] == sys.version.split()[0]


def test_the_processor():
    cpu = info.cpu()
    assert cpu["cores"] == len(os.sched_getaffinity(0)) if sys.platform == "linux" else cpu["cores"] > 0
    assert cpu["memory_gib"] > 0.5
    assert cpu["precisions"][0] == "float32"


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """Stands in for the NVIDIA driver's program on machines that have none; returns what makes it answer."""

    def answer(text: str, status: int = 0):
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\ncat << 'END'\n{text}\nEND\nexit {status}\n")
        program.chmod(0o755)

    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    return answer


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-in is a shell script")
def test_nvidia_gpus(driver):
    driver("NVIDIA H100 80GB HBM3, 81559, 9.0, 550.54.15\nTesla V100-SXM2-16GB, 16384, 7.0, 550.54.15")
    new, old = info.nvidia_gpus()
    assert (new["device"], new["name"], new["memory_gib"], new["driver"]) == (
        *("cuda:0", "NVIDIA H100 80GB HBM3"),
        *(79.6, "550.54.15"),
    )
    assert new["precisions"] == ["float32", "bfloat16", "float16"]
    assert (old["device"], old["precisions"]) == ("cuda:1", ["float32", "float16"])
    assert new["usable_by_torch"] == (torch.version.cuda is not None)


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-in is a shell script")
def test_a_driver_that_does_not_work(driver):
    driver("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.", status=9)
    assert info.nvidia_gpus() == []


def test_the_page_and_its_json(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    status, page, _ = run_in_process(capsys, "info")
    assert status == 0
    facts = json.loads(run_in_process(capsys, "info", "--json")[1])
    said = [
        facts["versions"]["torch"],
        "cpu",
        "DINOv3ViTNativeModel",
        "vit7b16",
        "6,716.0 M",
        "convnext_tiny",
        "quickstart_digits",
    ]
    assert all(word in page for word in said)
    assert facts["models"]["vit7b16"]["num_parameters"] == 6_716_043_264
    assert facts["recipes"] == recipe_summaries()
    assert all(f"{name} " in page for name in recipe_summaries())


def test_only_the_models(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    status, page, _ = run_in_process(capsys, "info", "--models")
    assert status == 0
    assert page.split()[0] == "Models"
    row = next(line.split() for line in page.splitlines() if line.startswith(" vitb16 "))
    assert row == ["vitb16", "85.7", "M", "35.9", "215.0", "0.34", "0.17"]
    assert list(json.loads(run_in_process(capsys, "info", "--models", "--json")[1])) == ["models"]


def test_a_missing_package_says_how_to_get_it(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setitem(info.PACKAGES, "no-such-package", "deepspeed")
    _, page, _ = run_in_process(capsys, "info")
    assert "not installed; pip install 'dinov3-hf[deepspeed]'" in page
