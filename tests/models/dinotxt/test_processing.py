"""The processor, the Auto classes and the pipeline; in this process and in one without this package."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    AutoTokenizer,
    pipeline,
)

import dinov3_hf.auto  # noqa: F401  (registers when it is imported)
from dinov3_hf.models.dinotxt.configuration_dinotxt import DinoTxtConfig, DinoTxtTextConfig, DinoTxtVisionConfig
from dinov3_hf.models.dinotxt.modeling_dinotxt import DinoTxtModel, DinoTxtTextModel, DinoTxtVisionModel
from dinov3_hf.models.dinotxt.processing_dinotxt import DinoTxtProcessor
from dinov3_hf.models.dinotxt.tokenization_dinotxt import CONTEXT_LENGTH, DinoTxtTokenizer
from dinov3_hf.models.dinov3_vit.image_processing import build_image_processor
from tests.clip_vocabulary import VOCABULARY
from tests.models.dinotxt.tiny import tiny_model
from tests.models.other_process import VERSIONS, run_without_us

LABELS = ["a cat", "a dog!", "grass"]
SCRIPT = Path(__file__).with_name("remote_process.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model with its processor, and a picture beside it."""
    folder = tmp_path_factory.mktemp("dinotxt")
    text = {"vocab_size": 49408, "max_position_embeddings": CONTEXT_LENGTH, "bos_token_id": 49406}
    tiny_model({**text, "eos_token_id": 49407}).save_pretrained(folder / "model")
    tokenizer = DinoTxtTokenizer.from_vocabulary(VOCABULARY)
    DinoTxtProcessor(build_image_processor("web", 16), tokenizer).save_pretrained(folder / "model")
    # Of the size that the model wants: not all versions of transformers resize alike.
    Image.radial_gradient("L").resize((16, 16)).convert("RGB").save(folder / "picture.png")
    return folder


@pytest.fixture(scope="module")
def scores(folder) -> list[float]:
    """Of the labels, by the model itself."""
    processor = DinoTxtProcessor.from_pretrained(folder / "model")
    model = DinoTxtModel.from_pretrained(folder / "model").eval()
    sentences = [f"This is a photo of {label}." for label in LABELS]
    inputs = processor(Image.open(folder / "picture.png"), sentences, return_tensors="pt")
    assert inputs["input_ids"].shape == (3, CONTEXT_LENGTH) and inputs["pixel_values"].shape == (1, 3, 16, 16)
    with torch.no_grad():
        return model(**inputs).logits_per_image[0].softmax(dim=-1).tolist()


def check_scores(found: list[dict], expected: list[float]) -> None:
    by_label = {each["label"]: each["score"] for each in found}
    assert set(by_label) == set(LABELS)
    assert [by_label[label] for label in LABELS] == pytest.approx(expected, abs=1e-4)


def test_auto_classes(folder):
    source = folder / "model"
    assert type(AutoConfig.from_pretrained(source)) is DinoTxtConfig
    assert type(AutoModel.from_pretrained(source)) is DinoTxtModel
    assert type(AutoModelForZeroShotImageClassification.from_pretrained(source)) is DinoTxtModel
    assert type(AutoTokenizer.from_pretrained(source)) is DinoTxtTokenizer
    processor = AutoProcessor.from_pretrained(source)
    assert type(processor) is DinoTxtProcessor and type(processor.tokenizer) is DinoTxtTokenizer
    config = DinoTxtModel.from_pretrained(source).config
    assert type(AutoModel.from_config(config)) is DinoTxtModel
    assert type(AutoModel.from_config(config.text_config)) is DinoTxtTextModel
    assert type(AutoModel.from_config(config.vision_config)) is DinoTxtVisionModel


def test_towers_have_model_types_of_their_own(folder, tmp_path):
    model = DinoTxtModel.from_pretrained(folder / "model")
    for tower, config_class in ((model.text_model, DinoTxtTextConfig), (model.vision_model, DinoTxtVisionConfig)):
        path = tmp_path / config_class.__name__
        tower.save_pretrained(path)
        assert type(AutoConfig.from_pretrained(path)) is config_class
        assert type(AutoModel.from_pretrained(path)) is type(tower)


def test_zero_shot_pipeline(folder, scores):
    classify = pipeline("zero-shot-image-classification", str(folder / "model"))
    check_scores(classify(str(folder / "picture.png"), candidate_labels=LABELS), scores)
    assert max(scores) - min(scores) > 0.01


def test_the_processor_comes_back(folder, tmp_path):
    processor = AutoProcessor.from_pretrained(folder / "model")
    processor.save_pretrained(tmp_path)
    again = DinoTxtProcessor.from_pretrained(tmp_path)
    texts = ["a cat", "text " * 100]
    assert again(text=texts)["input_ids"] == processor(text=texts)["input_ids"]
    assert again.image_processor.to_dict() == processor.image_processor.to_dict()
    assert [len(ids) for ids in again(text=texts, padding=False)["input_ids"]] == [4, CONTEXT_LENGTH]


def test_the_folder_has_all_code_once(folder):
    names = {path.name for path in (folder / "model").glob("*.py")}
    modules = {f"{kind}_dinotxt.py" for kind in ("configuration", "modeling", "processing", "tokenization")}
    assert modules <= names and "auto_classes.py" in names and "objectives_contrastive.py" in names
    auto_map = json.loads((folder / "model" / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModel"] == "auto_classes.DinoTxtModel"


@pytest.mark.parametrize("version", VERSIONS)
def test_without_this_package(folder, scores, tmp_path, version):
    run_without_us(version, SCRIPT, folder, tmp_path, *LABELS, HF_MODULES_CACHE=str(tmp_path / "modules"))
    found = json.loads((tmp_path / "found.json").read_text())
    check_scores(found["pipeline"], scores)
    assert found["processor"] == ["DinoTxtProcessor", "DinoTxtTokenizer"]
    assert "trust_remote_code=True" in found["untrusted"]
    check_scores(
        pipeline("zero-shot-image-classification", str(tmp_path / "again"))(
            str(folder / "picture.png"), candidate_labels=LABELS
        ),
        scores,
    )
