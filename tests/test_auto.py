"""What the `Auto*` classes and `pipeline` open, in processes of their own: by default, and with `override_native`."""

import json

import pytest
import torch
from PIL import Image

from dinov3_hf import DINOv3ConvNextConfig, DINOv3ConvNextModel, DINOv3ViTModel
from dinov3_hf.models.dinov3_vit.image_processing import build_image_processor
from tests.models.compositions import CONVNEXT
from tests.models.dinov3_vit.tiny import randomize, tiny_model

PROGRAM = """
import json, sys
from pathlib import Path

import torch
from transformers import AutoBackbone, AutoConfig, AutoImageProcessor, AutoModel, pipeline

import dinov3_hf

folder = Path(sys.argv[1])
if sys.argv[2] == "override":
    dinov3_hf.register_auto_classes(override_native=True)
    dinov3_hf.register_auto_classes(override_native=True)  # nothing more happens

found = {}
for source in sorted(path for path in folder.iterdir() if path.is_dir()):
    config = AutoConfig.from_pretrained(source)
    model = AutoModel.from_pretrained(source)
    backbone = AutoBackbone.from_config(config)
    processor = AutoImageProcessor.from_pretrained(source)
    extract = pipeline("image-feature-extraction", str(source))
    pooled = pipeline("image-feature-extraction", str(source), pool=True)
    picture = str(folder / "picture.png")
    features = extract(picture, return_tensors=True)
    found[source.name] = {
        "modules": [type(each).__module__ for each in (config, model, backbone, extract.model)],
        "processor": [type(processor).__name__, type(extract.image_processor).__name__],
        "shape": list(features.shape),
        "pooled": pooled(picture, return_tensors=True)[0].tolist(),
    }
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One folder of each of the four model types, and a picture."""
    folder = tmp_path_factory.mktemp("folders")
    tiny_model().save_pretrained(folder / "vit")
    tiny_model(norm_type="rmsnorm").save_pretrained(folder / "vit_native")
    for name, fields in {"convnext": {}, "convnext_native": {"layer_scale_init_value": None}}.items():
        randomize(DINOv3ConvNextModel(DINOv3ConvNextConfig(**CONVNEXT, **fields))).save_pretrained(folder / name)
    for model_folder in list(folder.iterdir()):
        build_image_processor("web", 64).save_pretrained(model_folder)
    Image.radial_gradient("L").convert("RGB").save(folder / "picture.png")
    return folder


@pytest.mark.parametrize("mode", ["default", "override"])
def test_auto_classes_and_pipeline(forks, folder, mode):
    done = forks.run("-c", PROGRAM, folder, mode)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == {"vit", "vit_native", "convnext", "convnext_native"}
    pixels = build_image_processor("web", 64)(Image.open(folder / "picture.png"), return_tensors="pt")["pixel_values"]
    for name, report in found.items():
        ours = mode == "override" or name.endswith("_native")
        family = "dinov3_vit" if name.startswith("vit") else "dinov3_convnext"
        owner = "dinov3_hf" if ours else "transformers"
        assert report["modules"] == [
            f"{owner}.models.{family}.{kind}_{family}"
            for kind in ("configuration", "modeling", "modeling", "modeling")
        ]
        assert all(kind.startswith("DINOv3ViTImageProcessor") for kind in report["processor"])
        model_class = DINOv3ViTModel if family == "dinov3_vit" else DINOv3ConvNextModel
        with torch.no_grad():
            output = model_class.from_pretrained(folder / name)(pixels)
        assert report["shape"] == list(output.last_hidden_state.shape)
        torch.testing.assert_close(torch.tensor(report["pooled"]), output.pooler_output[0], rtol=1e-4, atol=1e-4)
