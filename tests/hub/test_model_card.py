"""Model cards: what they say, that what they show runs, and that an edited one stays."""

import json
import re

import pytest
import torch
from huggingface_hub import EvalResult, ModelCard
from PIL import Image
from transformers import AutoImageProcessor

from dinov3_hf.convert.checkpoint import read_checkpoint
from dinov3_hf.convert.writing import write_checkpoint
from dinov3_hf.hub.card_validation import check_model_card
from dinov3_hf.hub.model_card import (
    DINOV3_LICENSE,
    is_generated,
    keep_edited_card,
    license_of,
    table,
    with_license,
    write_model_card,
)
from dinov3_hf.models.dinov3_vit.image_processing import build_image_processor
from tests.testing_utils import save_tiny_vit

RESULT = EvalResult(
    task_type="image-classification",
    dataset_type="digits",
    dataset_name="digits",
    metric_type="accuracy",
    metric_value=0.93,
)


def save_convnext_config(folder):
    """What a ConvNeXt folder says of itself, without weights."""
    folder.mkdir()
    config = {
        "model_type": "dinov3_convnext",
        "architectures": ["DINOv3ConvNextModel"],
        "depths": [3, 3, 9, 3],
        "hidden_sizes": [96, 192, 384, 768],
        "num_channels": 3,
    }
    (folder / "config.json").write_text(json.dumps(config))


def card_of(folder, **said):
    assert write_model_card(folder, **said)
    text = (folder / "README.md").read_text()
    check_model_card(text)
    return text


def test_everything_that_is_known_is_said(tmp_path):
    model = save_tiny_vit(tmp_path / "m", untie_global_and_local_cls_norm=True)
    text = card_of(
        tmp_path / "m",
        title="Tiny",
        license="apache-2.0",
        provenance="Converted from a.pth.",
        sections={"Evaluation": table({"kNN": "93 %"})},
        results=[RESULT],
        datasets=["me/pets"],
    )
    card = ModelCard(text)
    assert card.data.to_dict() | {"tags": 0} == {
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "image-feature-extraction",
        "tags": 0,
        "datasets": ["me/pets"],
        "model-index": [
            {
                "name": "Tiny",
                "results": [
                    {
                        "task": {"type": "image-classification"},
                        "dataset": {"name": "digits", "type": "digits"},
                        "metrics": [{"type": "accuracy", "value": 0.93}],
                    }
                ],
            }
        ],
    }
    num_parameters = (
        sum(parameter.numel() for parameter in model.parameters()) - model.local_cls_norm.weight.numel() * 2
    )
    said = " ".join(text.split())
    assert "# Tiny A ViT with 2 blocks of width 24 and patches of 8 px" in said
    assert f"({num_parameters:,} parameters), the architecture of [DINOv3]" in said
    assert "Converted from a.pth." in said
    assert "| register tokens | 2 |" in text and "| weights | F32 |" in text and "`extras.safetensors`" in text
    assert "| image size | 32 x 32 px; others work too |" in text
    assert "\n## Evaluation\n\n| | |\n|---|---|\n| kNN | 93 % |\n" in text
    for published in ("appendix B.4", "69.6, 85.7 and 90.9 %", "table 26", "@article{simeoni2025dinov3"):
        assert published in text


def test_what_is_not_known_is_left_out(tmp_path):
    save_tiny_vit(tmp_path / "my-model")
    text = card_of(tmp_path / "my-model")
    assert set(ModelCard(text).data.to_dict()) == {"library_name", "pipeline_tag", "tags"}
    assert "\n# my-model\n" in text
    assert "heads.safetensors" not in text


def test_derived_weights_keep_the_licence_of_the_released_ones(tmp_path):
    save_tiny_vit(tmp_path / "m")
    data = ModelCard(card_of(tmp_path / "m", license=DINOV3_LICENSE)).data
    assert (data["license"], data["license_name"]) == ("other", "dinov3-license")
    assert data["license_link"].startswith("https://ai.meta.com/")


@pytest.mark.parametrize(
    ("name", "license"),
    [
        ("dinov3_vits16_pretrain_lvd1689m-08c60483.pth", DINOV3_LICENSE),
        ("dinov3-vitl16-pretrain-sat493m", DINOV3_LICENSE),
        ("vit_small_patch16_dinov3.lvd1689m", DINOV3_LICENSE),
        ("teacher_checkpoint.pth", None),
        ("dinov3_mine.pth", None),
    ],
)
def test_released_weights_are_known_by_name(name, license):
    assert license_of(name) == license


def test_the_card_of_a_conversion(tmp_path):
    save_tiny_vit(tmp_path / "dinov3-tiny-pretrain-lvd1689m")
    write_checkpoint(read_checkpoint(tmp_path / "dinov3-tiny-pretrain-lvd1689m"), tmp_path / "copy", "hf")
    text = (tmp_path / "copy" / "README.md").read_text()
    check_model_card(text)
    assert is_generated(text)
    assert ModelCard(text).data["license_name"] == "dinov3-license"
    assert "\n# copy\n" in text and "Converted from dinov3-tiny-pretrain-lvd1689m (hf)." in text


def test_unknown_licences_are_refused_before_anything_is_written(tmp_path):
    save_tiny_vit(tmp_path / "m")
    with pytest.raises(ValueError, match=r"'apache2' is none that the Hub knows; did you mean apache-2.0\?"):
        write_model_card(tmp_path / "m", license="apache2")
    assert not (tmp_path / "m" / "README.md").exists()


def test_a_convnext(tmp_path):
    save_convnext_config(tmp_path / "m")
    text = card_of(tmp_path / "m")
    assert "A ConvNeXt with 4 stages" in text and "| blocks of each stage | 3, 3, 9, 3 |" in text
    assert "import DINOv3ConvNextModel" in text


@pytest.mark.parametrize(
    ("processor", "says"),
    [
        ({"size": {"shortest_edge": 224}}, "| image size | 224 px, the short side; others work too |"),
        ({"size": {"height": 48, "width": 32}}, "| image size | 48 x 32 px; others work too |"),
        ({"image_mean": [0.5], "image_std": [0.2]}, "| normalisation | mean [0.5], standard deviation [0.2] |"),
        ({"do_resize": False}, None),
    ],
)
def test_image_processors_of_others(tmp_path, processor, says):
    save_tiny_vit(tmp_path / "m")
    (tmp_path / "m" / "preprocessor_config.json").write_text(json.dumps(processor))
    text = card_of(tmp_path / "m")
    assert [line for line in text.splitlines() if line.startswith(("| image size", "| normalisation"))] == (
        [says] if says else []
    )


@pytest.mark.parametrize(
    ("num_channels", "image", "options", "says"),
    [
        (1, Image.new("L", (40, 30)), {}, '# image: a grey PIL image (mode "L"), or a list of them'),
        (
            5,
            torch.rand(5, 30, 40),
            {"input_data_format": "channels_first"},
            '# image: with input_data_format="channels_first" a tensor (5, height, width), or a list of them',
        ),
    ],
)
def test_images_of_other_channels(tmp_path, num_channels, image, options, says):
    model = save_tiny_vit(tmp_path / "m", num_channels=num_channels)
    processor = build_image_processor("web", 32)
    processor.image_mean = processor.image_std = [0.5] * num_channels
    processor.save_pretrained(tmp_path / "m")
    assert says in card_of(tmp_path / "m")
    shown = AutoImageProcessor.from_pretrained(tmp_path / "m")(images=image, return_tensors="pt", **options)
    assert model(**shown).pooler_output.shape == (1, 24)


def test_a_variant_without_its_code_needs_this_package(tmp_path):
    save_tiny_vit(tmp_path / "m", norm_type="rmsnorm")
    path = tmp_path / "m" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in config.items() if name != "auto_map"}))
    text = card_of(tmp_path / "m")
    assert "Install `dinov3_hf`: transformers has no class for this variant." in text
    assert "trust_remote_code" not in text and "import DINOv3ViTModel" in text


def test_what_a_configuration_leaves_out_has_its_default(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "dinov3_vit", "hidden_size": 24}')
    text = card_of(tmp_path)
    assert "ViT with 12 blocks of width 24 and patches of 16 px" in text and "[CLS, patches]" in text


def test_other_models_get_no_card(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="holds a 'bert' model, not a DINOv3 backbone"):
        write_model_card(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is no JSON"):
        write_model_card(tmp_path)


def test_a_card_is_ours_until_somebody_edits_it(tmp_path):
    save_tiny_vit(tmp_path / "m")
    path = tmp_path / "m" / "README.md"
    text = card_of(tmp_path / "m", license="mit")
    assert is_generated(text)
    assert card_of(tmp_path / "m") != text  # written anew
    edits = [
        text + "\nMy note.\n",
        "My note.\n" + text,
        text.replace("mit", "apache-2.0"),
        text.replace("frozen", "cold"),
    ]
    for edited in [*edits, "# By hand\n", ""]:
        assert not is_generated(edited)
        path.write_text(edited)
        assert not write_model_card(tmp_path / "m")
        assert path.read_text() == edited
    path.write_bytes("Modèle".encode("latin-1"))
    assert not write_model_card(tmp_path / "m")
    assert path.read_bytes() == "Modèle".encode("latin-1")


def test_an_edited_card_survives_its_folder(tmp_path):
    for name in ("old", "new"):
        save_tiny_vit(tmp_path / name)
    keep_edited_card(tmp_path / "absent", tmp_path / "new")
    card_of(tmp_path / "old")
    keep_edited_card(tmp_path / "old", tmp_path / "new")
    assert not (tmp_path / "new" / "README.md").exists()
    (tmp_path / "old" / "README.md").write_text("by hand")
    keep_edited_card(tmp_path / "old", tmp_path / "new")
    assert (tmp_path / "new" / "README.md").read_text() == "by hand"


def test_another_licence(tmp_path):
    save_tiny_vit(tmp_path / "m")
    without = card_of(tmp_path / "m", results=[RESULT])
    mit = with_license(without, "mit")
    assert is_generated(mit)
    assert mit == card_of(tmp_path / "m", results=[RESULT], license="mit")
    assert with_license(with_license(mit, DINOV3_LICENSE), "mit") == mit


@pytest.mark.parametrize("fields", [{}, {"norm_type": "rmsnorm"}], ids=["stock", "native"])
def test_what_a_card_shows_runs(client, tmp_path, fields):
    save_tiny_vit(tmp_path / "m", **fields)
    text = card_of(tmp_path / "m")
    assert ("trust_remote_code=True" in text) == bool(fields)
    without_us, with_us = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    image = "from PIL import Image\nimage = Image.new('RGB', (40, 30))"
    show = "print(type(model).__module__, tuple(outputs.pooler_output.shape))"
    printed = client.python("\n".join([image, without_us, show, with_us, show]), folder=tmp_path / "m").splitlines()
    theirs, ours = (line.partition(" ") for line in printed[-2:])
    assert theirs[2] == ours[2] == "(1, 24)"
    if not fields:  # in a process that knows our native types, these are found before the code in the folder
        assert theirs[0].startswith("transformers.models.dinov3_vit.")
    assert ours[0] == "dinov3_hf.models.dinov3_vit.modeling_dinov3_vit"
