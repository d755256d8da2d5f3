"""`dinov3-hf visualize`: readable pictures of the right size, from files, folders and digits."""

import numpy as np
import pytest
from PIL import Image

from dinov3_hf.cli.pictures import patch_features, read_pictures
from dinov3_hf.evals.features import load_model
from tests.testing_utils import require_package, run_in_process, save_labelled_images, save_tiny_vit


@pytest.fixture
def model(tmp_path):
    save_tiny_vit(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def photo(tmp_path):
    """A dark photo with a bright right third."""
    pixels = np.random.default_rng(0).normal(60, 15, (60, 90, 3))
    pixels[:, 60:] += 140
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(tmp_path / "photo.jpg")
    return tmp_path / "photo.jpg"


@require_package("sklearn")
def test_in_a_process_of_its_own(forks, model, tmp_path):
    output = tmp_path / "new" / "folder" / "pca.png"
    done = forks.run("-m", "dinov3_hf", "visualize", "pca", model, "digits", "-o", output, "--num_images", "10")
    assert (done.returncode, done.stderr) == (0, "")  # no progress bar where there is no terminal
    with Image.open(output) as picture:
        assert done.stdout == f"{output} ({picture.width} x {picture.height} pixels)\n"
        assert len(picture.convert("RGB").getcolors(1_000_000)) > 100


def test_maps_have_the_patches_of_the_picture(model, photo):
    network, processor = load_model(str(model))
    (whole,) = patch_features(network, processor, read_pictures(str(photo), 1), None)
    assert whole.shape == (12, 18, 24)  # 3 x 32 pixels high
    (small,) = patch_features(network, processor, read_pictures(str(photo), 1), 40)
    assert small.shape == (5, 8, 24)  # 7.5 patches wide
    bright, dark = whole[:, 13:].reshape(-1, 24).mean(axis=0), whole[:, :11].reshape(-1, 24).mean(axis=0)
    assert np.abs(bright - dark).max() > 0.1


def test_pca_of_files_and_folders(model, photo, tmp_path, capsys):
    save_labelled_images(tmp_path / "photos", num_images=3)
    output = tmp_path / "pca.png"
    status, page, error = run_in_process(
        capsys, *("visualize", "pca", model, photo, tmp_path / "photos", "-o", output, "--num_images", "4")
    )
    assert (status, error) == (0, "")
    assert page.startswith(str(output))
    few = Image.open(output).size
    run_in_process(capsys, "visualize", "pca", model, photo, "-o", output)
    single = Image.open(output).size
    assert few != single
    assert single == (12 + 720 + 4 + 720 + 12, 12 + 480 + 12)


def test_similarity_marks_the_patch(model, photo, tmp_path, capsys):
    output = tmp_path / "similarity.png"
    status, page, _ = run_in_process(capsys, "visualize", "similarity", model, photo, "-o", output, "--size", "64")
    assert status == 0
    assert page.splitlines() == [
        f"{output} ({Image.open(output).width} x 504 pixels)",
        "patch 4,6 of 8 rows and 12 columns",
    ]
    status, page, _ = run_in_process(
        capsys, *("visualize", "similarity", model, photo, photo, "-o", output, "--patch", "0,11", "--size", "64")
    )
    assert "patch 0,11 of 8 rows and 12 columns" in page
    assert Image.open(output).height > 504  # maps below the pictures


def test_other_formats_and_grey_models(photo, tmp_path, capsys):
    save_tiny_vit(tmp_path / "grey", num_channels=1)
    for name in ("pca.jpg", "pca.webp", "pca.PNG"):
        status, _, error = run_in_process(capsys, "visualize", "pca", tmp_path / "grey", photo, "-o", tmp_path / name)
        assert (status, error) == (0, "")
        assert Image.open(tmp_path / name).size == (1468, 504)


def test_photos_stand_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.new("RGB", (20, 16)).save(tmp_path / "photo.jpg", exif=exif)
    Image.new("LA", (20, 16)).save(tmp_path / "grey.png")
    assert read_pictures(str(tmp_path / "photo.jpg"), 1)[0].size == (16, 20)
    assert read_pictures(str(tmp_path / "grey.png"), 1)[0].mode == "RGB"


def test_a_file_is_decoded_as_in_training(tmp_path):
    Image.fromarray(np.full((4, 4), 128 * 257, dtype=np.uint16)).save(tmp_path / "xray.png")
    Image.new("RGBA", (4, 4)).save(tmp_path / "transparent.png")
    assert read_pictures(str(tmp_path / "xray.png"), 1)[0].getpixel((0, 0)) == (128, 128, 128)
    assert read_pictures(str(tmp_path / "transparent.png"), 1)[0].getpixel((0, 0)) == (255, 255, 255)


@require_package("sklearn")
def test_digits_are_one_of_each_class_and_again(tmp_path):
    from dinov3_hf.data.sources.spec import load_images

    digits = load_images("digits", "test")
    pictures = [np.asarray(picture) for picture in read_pictures("digits", 20)]
    label_of = {digits.image(i).tobytes(): int(digits.labels[i]) for i in range(len(digits))}
    assert [label_of[picture.tobytes()] for picture in pictures] == [*range(10), *range(10)]
    assert len({picture.tobytes() for picture in pictures}) == 20


def test_few_of_a_folder_are_spread_over_it(tmp_path):
    for i in range(10):
        Image.new("RGB", (4, 4), (i, 0, 0)).save(tmp_path / f"{i}.png")
    assert [picture.getpixel((0, 0))[0] for picture in read_pictures(str(tmp_path), 4)] == [0, 3, 6, 9]
    assert len(read_pictures(str(tmp_path), 20)) == 10


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("NOWHERE", "PHOTO"), "there is no model folder"),
        (("MODEL", "NOWHERE"), "there is no folder or file"),
        (("MODEL", "EMPTY"), "is empty; put images into it"),
        (("MODEL", "TEXT"), "give a JPEG or PNG file, for example."),
        (("MODEL", "BROKEN"), "broken.png cannot be read as an image"),
        (("MODEL", "BROKEN_FOLDER"), "broken.png (image file is truncated"),
        (("MODEL", "PHOTO", "--size", "50"), "image size 50 is not a multiple of the patch size 8; use 48 or 56."),
        (("MODEL", "PHOTO", "-o", "TEXT/a.png"), "text: "),
        (("FIVE_CHANNELS", "PHOTO"), "pictures have 1 or 3 channels; this model takes 5."),
    ],
)
def test_bad_input_gets_one_line(arguments, says, model, photo, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("no picture")
    save_labelled_images(tmp_path / "broken_folder", num_images=1, size=(400, 300))
    broken = tmp_path / "broken_folder" / "dark" / "broken.png"
    broken.write_bytes((tmp_path / "broken_folder" / "dark" / "00.png").read_bytes()[:20_000])
    if "FIVE_CHANNELS" in arguments:
        save_tiny_vit(tmp_path / "five_channels", num_channels=5)
    names = ("nowhere", "empty", "text", "broken_folder", "model", "five_channels")
    places = {name.upper(): tmp_path / name for name in names}
    places |= {"PHOTO": photo, "BROKEN": broken, "TEXT/a.png": tmp_path / "text" / "a.png"}
    output = () if "-o" in arguments else ("-o", tmp_path / "out.png")
    status, page, error = run_in_process(
        capsys, "visualize", "pca", *(places.get(argument, argument) for argument in arguments), *output
    )
    assert (status, page) == (1, "")
    assert error.startswith("error: ") and error.count("\n") == 1
    assert says in error
    assert not (tmp_path / "out.png").exists()


def test_a_patch_outside_the_picture(model, photo, tmp_path, capsys):
    status, _, error = run_in_process(
        capsys, "visualize", "similarity", model, photo, "-o", tmp_path / "a.png", "--patch", "12,0"
    )
    assert status == 1
    assert error == "error: patch 12,0 is outside the grid; use rows 0 to 11 and columns 0 to 17.\n"
