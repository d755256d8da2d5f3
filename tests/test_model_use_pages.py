"""The Python of docs/auto_classes.md and docs/big_models.md runs as it stands there."""

import os
import re
import subprocess
import sys

import pytest
from PIL import Image

from dinov3_hf import DINOv3ViTConfig, DINOv3ViTModel
from dinov3_hf.models.dinov3_vit.image_processing import build_image_processor
from tests.models.compositions import VIT
from tests.testing_utils import REPOSITORY, require_package

WITHOUT_US = "import sys\nsys.modules['dinov3_hf'] = None\n"


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs" / page).read_text(), re.DOTALL)


@pytest.fixture
def desk(tmp_path):
    """A folder as the pages assume it: a model, one of our own type, and a photo."""
    DINOv3ViTModel(DINOv3ViTConfig(**VIT)).save_pretrained(tmp_path / "teacher")
    DINOv3ViTModel(DINOv3ViTConfig(**VIT, norm_type="rmsnorm")).save_pretrained(tmp_path / "variant")
    for name in ("teacher", "variant"):
        build_image_processor("web", 64).save_pretrained(tmp_path / name)
    Image.radial_gradient("L").convert("RGB").save(tmp_path / "photo.jpg")
    return tmp_path


def run(forks, program: str, folder) -> str:
    done = forks.run("-c", program, folder=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def run_without_us(program: str, folder) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_US + program],
        cwd=folder,
        env={**os.environ, "HF_MODULES_CACHE": str(folder / "modules")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_auto_classes(forks, desk):
    elsewhere = [block for block in blocks("auto_classes.md") if "trust_remote_code" in block]
    here = [block for block in blocks("auto_classes.md") if block not in elsewhere]
    checks = (
        "assert features.shape == (1, 32)\n"
        "assert type(ours) is type(also_ours) is DINOv3ViTModel\n"
        "assert type(segmenter.backbone) is DINOv3ViTBackbone and type(backbone) is backbone_class\n"
        "again = EomtDinov3ForUniversalSegmentation.from_pretrained('eomt')\n"
        "assert again.layers[0].attention.q_proj.weight.equal(ours.layer[0].attention.q_proj.weight)\n"
        "assert again.layernorm.weight.equal(ours.norm.weight)\n"
    )
    run(forks, "\n".join([*here, checks]), desk)
    assert len(elsewhere) == 1
    run_without_us(elsewhere[0] + "assert type(model).__module__.startswith('transformers_modules.')", desk)


def test_big_models(forks, desk):
    plain = [block for block in blocks("big_models.md") if "quantization_config" not in block]
    printed = run(forks, "\n".join(["import torch\npixels = torch.rand(1, 3, 64, 64)", *plain]), desk)
    assert "{0: 14.78, 1: 12.08}" in printed


@require_package("torchao")
def test_quantised_weights(forks, desk):
    quantised = [block for block in blocks("big_models.md") if "quantization_config" in block]
    assert len(quantised) == 1
    run(forks, quantised[0], desk)
