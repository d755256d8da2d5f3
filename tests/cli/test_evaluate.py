"""`dinov3-hf evaluate knn` on models of every origin, folders and digits; and what it says when something is wrong."""

import io
import json

import pytest
import transformers

from dinov3_hf.cli.splits import all_labelled, labelled_splits
from dinov3_hf.evals.features import extract_features, load_model
from dinov3_hf.evals.knn import knn_accuracies, leave_one_out_accuracies
from dinov3_hf.models.dinov3_vit.image_processing import build_image_processor
from tests.testing_utils import (
    TEST_DATA,
    require_package,
    require_test_data,
    run_cli,
    run_in_process,
    save_labelled_images,
    save_tiny_vit,
)


@pytest.fixture
def model(tmp_path):
    save_tiny_vit(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def photos(tmp_path):
    save_labelled_images(tmp_path / "photos")
    return tmp_path / "photos"


@require_package("sklearn")
def test_in_a_process_of_its_own(model):
    done = run_cli("evaluate", "knn", model, "--data", "digits", "--k", "5", "--k", "2000", "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert {name: facts[name] for name in ("data", "size", "num_train", "num_test", "num_classes")} == {
        "data": "digits",
        "size": 32,
        "num_train": 1442,
        "num_test": 355,
        "num_classes": 10,
    }
    train, test = labelled_splits("digits", 3, 32)
    network, processor = load_model(str(model))
    features = (extract_features(network, part, processor, part.labels) for part in (train, test))
    assert facts["knn"] == {str(k): value for k, value in knn_accuracies(*features, [5, 2000]).items()}
    assert 30 < facts["knn"]["5"]["knn_top1"] < 100  # even random features tell digits apart better than chance
    assert done.stderr == ""  # no progress bar where there is no terminal


def test_the_table(model, photos, capsys):
    status, page, error = run_in_process(capsys, "evaluate", "knn", model, "--data", photos, "--k", "3", "--k", "50")
    assert (status, error) == (0, "")
    assert page.startswith(f"kNN of {model} on {photos}\n")
    rows = [line.split() for line in page.splitlines()]
    assert ["3", "100.00", "100.00"] in rows  # dark and light
    assert any(row[:2] == ["50", "(all)"] for row in rows)
    assert "16 training and 4 test images of 2 classes at 32 x 32 pixels" in page


def test_each_image_by_all_the_others(model, photos, capsys):
    command = ("evaluate", "knn", model, "--data", photos, "--k", "3", "--k", "50", "--leave_one_out")
    status, page, error = run_in_process(capsys, *command)
    assert (status, error) == (0, "")
    assert "20 images, each by all the others, of 2 classes" in page
    facts = json.loads(run_in_process(capsys, *command, "--json")[1])
    assert (facts["num_train"], facts["num_test"], facts["leave_one_out"]) == (19, 20, True)
    network, processor = load_model(str(model))
    images = all_labelled(str(photos), 3, facts["size"])
    features = extract_features(network, images, processor, images.labels)
    assert facts["knn"] == {str(k): value for k, value in leave_one_out_accuracies(features, [3, 50]).items()}


@pytest.mark.parametrize("family", ["dinov3_vit", "dinov2", "dinov3_convnext", "grey", "native"])
def test_models_of_every_origin(family, photos, tmp_path, capsys):
    folder = tmp_path / family
    if family == "grey":
        save_tiny_vit(folder, num_channels=1)
    elif family == "native":  # one that transformers has no class for
        save_tiny_vit(folder, norm_type="rmsnorm")
        assert json.loads((folder / "config.json").read_text())["model_type"] == "dinov3_vit_native"
    else:
        vit = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 8, "image_size": 32}
        config = {
            "dinov3_vit": lambda: transformers.DINOv3ViTConfig(**vit, intermediate_size=32),
            "dinov2": lambda: transformers.Dinov2Config(**vit),
            "dinov3_convnext": lambda: transformers.DINOv3ConvNextConfig(hidden_sizes=[8] * 4, depths=[1] * 4),
        }[family]()
        transformers.AutoModel.from_config(config).save_pretrained(folder)
        build_image_processor(image_size=32).save_pretrained(folder)
    status, page, error = run_in_process(
        capsys,
        *("evaluate", "knn", folder, "--data", photos, "--k", "3", "--json", "--size", "64", "--batch_size", "7"),
    )
    assert (status, error) == (0, "")
    facts = json.loads(page)
    assert facts["size"] == 64
    assert facts["knn"]["3"]["knn_top1"] == 100


def test_bfloat16_and_workers(model, photos, capsys):
    options = ("--bf16", "--num_workers", "2", "--temperature", "0.1", "--device", "cpu")
    status, page, _ = run_in_process(
        capsys, "evaluate", "knn", model, "--data", photos, "--json", "--k", "3", *options
    )
    assert status == 0
    assert json.loads(page)["knn"]["3"]["knn_top1"] == 100


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("NOWHERE", "--data", "PHOTOS"), "there is no model folder"),
        (("owner/name", "--data", "PHOTOS"), "there is no folder owner/name, and as a Hub repository it fails"),
        (
            ("EMPTY", "--data", "PHOTOS"),
            "is no model folder (it needs config.json and preprocessor_config.json); give",
        ),
        (("MODEL", "--data", "NOWHERE"), "there is no folder or file"),
        (("MODEL", "--data", "digit"), "did you mean digits?"),
        (("MODEL", "--data", "EMPTY"), "is empty; put images into it or name another folder."),
        (("MODEL", "--data", "TEXTS"), "holds no images; their names must end in .jpg"),
        (("MODEL", "--data", "FLAT"), "lies in no class sub-folder; labels need one folder a class"),
        (("MODEL", "--data", "BROKEN"), "dark/00.png (image file is truncated"),
        (("MODEL", "--data", "BROKEN", "--num_workers", "1"), "dark/00.png (image file is truncated"),
        (
            ("MODEL", "--data", "PHOTOS", "--size", "20"),
            "image size 20 is not a multiple of the patch size 8; use 16 or 24.",
        ),
        (("MODEL", "--data", "PHOTOS", "--temperature", "-1"), "temperature -1.0 is not positive; 0.07 is usual."),
    ],
)
def test_bad_input_gets_one_line(arguments, says, model, photos, tmp_path, capsys):
    for name in ("empty", "texts", "flat"):
        (tmp_path / name).mkdir()
    (tmp_path / "texts" / "notes.txt").write_text("no picture")
    save_labelled_images(tmp_path / "broken", size=(400, 300))
    first = tmp_path / "broken" / "dark" / "00.png"
    first.write_bytes(first.read_bytes()[:20_000])
    (tmp_path / "flat" / "1.png").write_bytes((photos / "dark" / "00.png").read_bytes())
    names = ("nowhere", "empty", "texts", "flat", "broken", "photos", "model")
    places = {name.upper(): tmp_path / name for name in names}
    status, page, error = run_in_process(
        capsys, "evaluate", "knn", *(places.get(argument, argument) for argument in arguments)
    )
    assert (status, page) == (1, "")
    assert error.startswith("error: ") and error.count("\n") == 1
    assert says in error


def test_unreadable_images_are_left_out_and_named(model, tmp_path, capsys):
    save_labelled_images(tmp_path / "photos", num_images=30)
    (tmp_path / "photos" / "dark" / "00.png").write_bytes(b"")
    command = ("evaluate", "knn", model, "--data", tmp_path / "photos", "--k", "3", "--json")
    status, page, error = run_in_process(capsys, *command)
    assert status == 0
    facts = json.loads(page)
    assert (facts["num_train"] + facts["num_test"], facts["num_unreadable"]) == (59, 1)
    assert facts["knn"]["3"]["knn_top1"] == 100
    first, second = error.splitlines()
    assert (
        first.startswith("1 of ") and "images were left out" in first and "dark/00.png (the file is empty)" in second
    )
    status, page, error = run_in_process(capsys, *command, "--max_unreadable_share", "0.01")
    assert (status, page) == (1, "") and error.count("\n") == 1
    assert "more than max_unreadable_share 0.01 allows; the first: cannot read image" in error


@require_test_data
@require_package("pyarrow")
def test_real_photos_of_a_user(model, tmp_path, capsys):
    import pyarrow.parquet as parquet
    from PIL import Image

    for split, name in (("train", "tiny_imagenet_train"), ("val", "tiny_imagenet_val")):
        rows = parquet.read_table(TEST_DATA / f"{name}.parquet").slice(0, 200).to_pylist()
        for i, row in enumerate(rows):
            place = tmp_path / "photos" / split / row["wnid"] / f"{i}.JPEG"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(row["image"]["bytes"])
    assert {Image.open(io.BytesIO(row["image"]["bytes"])).mode for row in rows} <= {"RGB", "L"}
    status, page, _ = run_in_process(capsys, "evaluate", "knn", model, "--data", tmp_path / "photos", "--json")
    assert status == 0
    facts = json.loads(page)
    assert facts["num_train"] == 200
    assert 0 < facts["knn"]["20"]["knn_top1"] < facts["knn"]["20"]["knn_top5"]
