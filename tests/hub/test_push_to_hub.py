"""`push_to_hub` of our models, and of image processors."""

import subprocess
import sys

from huggingface_hub import ModelCard

from dinov3_hf.hub.model_card import is_generated
from tests.hub.client import TOKEN, environment
from tests.testing_utils import save_tiny_vit

VIT = """
from transformers import AutoImageProcessor
from dinov3_hf import DINOv3ViTModel
model = DINOv3ViTModel.from_pretrained({folder!r})
AutoImageProcessor.from_pretrained({folder!r}).push_to_hub("me/m")  # leaves a blank card
print(model.push_to_hub("me/m", license="mit"))
"""
CONVNEXT = """
from dinov3_hf import DINOv3ConvNextConfig, DINOv3ConvNextModel
model = DINOv3ConvNextModel(DINOv3ConvNextConfig(depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 16, 16]))
print(model.push_to_hub("m", private=True, revision="v2", commit_message="First"))
"""
WITHOUT_THE_PACKAGE = """
import sys
sys.modules["dinov3_hf"] = None
from transformers import AutoModel
AutoModel.from_pretrained({folder!r}, trust_remote_code=True).push_to_hub("me/native")
"""


def card(hub, name="me/m", revision="main"):
    text = hub.repositories[name].files(revision)["README.md"].decode()
    assert is_generated(text)
    return text


def test_a_vit_and_its_image_processor(hub, client, tmp_path):
    save_tiny_vit(tmp_path / "m", untie_global_and_local_cls_norm=True)
    assert client.python(VIT.format(folder=str(tmp_path / "m"))).splitlines()[-1] == f"{hub.url}/me/m"
    files = hub.repositories["me/m"].files()
    expected = {"config.json", "model.safetensors", "extras.safetensors", "preprocessor_config.json", "README.md"}
    assert set(files) - {".gitattributes"} == expected
    assert files["model.safetensors"] == (tmp_path / "m" / "model.safetensors").read_bytes()
    assert ModelCard(card(hub)).data["license"] == "mit"
    assert "\n# m\n" in card(hub)


def test_a_convnext(hub, client):
    assert client.python(CONVNEXT).splitlines()[-1] == f"{hub.url}/me/m/tree/v2"
    assert hub.repositories["me/m"].private
    assert "A ConvNeXt with 4 stages" in card(hub, revision="v2")


def test_a_variant_opened_by_the_code_in_its_folder(hub, tmp_path):
    save_tiny_vit(tmp_path / "m", norm_type="rmsnorm")
    program = WITHOUT_THE_PACKAGE.format(folder=str(tmp_path / "m"))
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment(hub, tmp_path / "home") | TOKEN,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    files = hub.repositories["me/native"].files()
    assert files["model.safetensors"] == (tmp_path / "m" / "model.safetensors").read_bytes()
    assert {path.name for path in (tmp_path / "m").glob("*.py")} <= set(files)
