"""Folders and digits give the right images and labels, or one clear line."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinov3_hf.data.sources.spec import load_images
from tests.testing_utils import require_package


def write_image(path: Path, colour=(200, 100, 50), size=(20, 16), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)


@require_package("sklearn")
def test_digits():
    train, test, everything = (load_images("digits", split) for split in ("train", "test", None))
    assert (len(train), len(test), len(everything)) == (1442, 355, 1797)
    assert train.image(0).shape == (8, 8, 3)
    assert train.image(0).dtype == np.uint8
    assert (train.pixels.min(), train.pixels.max()) == (0, 255)
    assert load_images("digits", num_channels=1).image(0).shape == (8, 8, 1)
    np.testing.assert_allclose(np.bincount(test.labels) / np.bincount(everything.labels), 0.2, atol=0.005)
    assert train.class_names == [str(digit) for digit in range(10)]


def test_folder_is_read_in_any_layout(tmp_path):
    for name in ("b/deep/er/1.JPG", "a.png", "b/2.webp", "c/3.bmp"):
        write_image(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    write_image(tmp_path / ".thumbnails" / "4.png")
    (tmp_path / "c" / "._3.jpg").write_bytes(b"left by a Mac")
    images = load_images(str(tmp_path))
    assert [images.content(i).relative_to(tmp_path).as_posix() for i in range(len(images))] == [
        "a.png",
        "b/2.webp",
        "b/deep/er/1.JPG",
        "c/3.bmp",
    ]
    assert images.labels is None
    assert images.image(0).shape == (16, 20, 3)
    assert images.image(0)[3, 3].tolist() == [200, 100, 50]
    assert load_images(tmp_path, num_channels=1).image(0).shape == (16, 20, 1)


def test_linked_folders_count_once(tmp_path):
    write_image(tmp_path / "elsewhere" / "1.png")
    root = tmp_path / "root"
    write_image(root / "own" / "2.png")
    for link, target in (("a_link", tmp_path / "elsewhere"), ("b_link", tmp_path / "elsewhere"), ("own/loop", root)):
        (root / link).symlink_to(target, target_is_directory=True)
    images = load_images(root)
    assert [images.content(i).relative_to(root).as_posix() for i in range(len(images))] == [
        "a_link/1.png",
        "own/2.png",
    ]


def test_orientation_and_modes(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    write_image(tmp_path / "1.jpg", size=(20, 16), exif=exif)
    Image.new("L", (4, 4), 77).save(tmp_path / "2.png")
    Image.new("RGBA", (4, 4), (1, 2, 3, 255)).save(tmp_path / "3.png")
    images = load_images(tmp_path)
    assert images.image(0).shape == (20, 16, 3)
    assert [images.image(i)[0, 0].tolist() for i in (1, 2)] == [[77, 77, 77], [1, 2, 3]]


def test_labels_are_the_class_folders(tmp_path):
    for name in ("cat/1.png", "dog/1.png", "cat/images/2.png"):
        write_image(tmp_path / name)
    images = load_images(tmp_path, labelled=True)
    assert images.class_names == ["cat", "dog"]
    assert images.labels.tolist() == [0, 0, 1]
    assert images.labels.dtype == np.int64
    write_image(tmp_path / "loose.png")
    with pytest.raises(ValueError, match=r"loose\.png lies in no class sub-folder; labels need"):
        load_images(tmp_path, labelled=True)


def test_fingerprint_survives_a_move_and_notices_other_images(tmp_path):
    write_image(tmp_path / "a" / "x" / "1.png")
    first = load_images(tmp_path / "a").fingerprint()
    assert first["images"] == 1
    (tmp_path / "a").rename(tmp_path / "b")
    assert load_images(tmp_path / "b").fingerprint() == first
    (tmp_path / "b" / "x" / "1.png").rename(tmp_path / "b" / "x" / "2.png")
    assert load_images(tmp_path / "b").fingerprint() != first


def test_splits_of_a_folder(tmp_path):
    write_image(tmp_path / "cat" / "1.png")
    assert len(load_images(tmp_path, "train")) == 1
    with pytest.raises(FileNotFoundError, match="has no test images; put them into a sub-folder test or val"):
        load_images(tmp_path, "test")
    for name in ("train/cat/1.png", "train/cat/2.png", "val/cat/3.png"):
        write_image(tmp_path / name)
    assert len(load_images(tmp_path, "train", labelled=True)) == 2
    assert load_images(tmp_path, "test", labelled=True).class_names == ["cat"]
    assert len(load_images(tmp_path)) == 4


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("digit", FileNotFoundError, "digit is neither a folder nor a known data set; did you mean digits?"),
        ("photoz", FileNotFoundError, "did you mean photos?"),
        ("xyz", FileNotFoundError, "use digits or the path of a folder"),
        ("no/such/folder", FileNotFoundError, "there is no folder or file no/such/folder"),
        ("empty", FileNotFoundError, "folder empty is empty; put images into it"),
        ("photos", FileNotFoundError, "folder photos holds no images; their names must end in .jpg"),
        ("photos/notes.txt", ValueError, "notes.txt is a file; name the folder that holds the images"),
    ],
)
def test_sources_that_are_none(source, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    with pytest.raises(error) as caught:
        load_images(source)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unreadable_images_are_named(tmp_path):
    (tmp_path / "1.jpg").write_bytes(b"no image")
    write_image(tmp_path / "2.jpg")
    (tmp_path / "2.jpg").write_bytes((tmp_path / "2.jpg").read_bytes()[:300])
    write_image(tmp_path / "3.png")
    (tmp_path / "3.png").write_bytes((tmp_path / "3.png").read_bytes()[:45])
    images = load_images(tmp_path)
    for i in range(3):
        with pytest.raises(ValueError, match=f"cannot read image .*{i + 1}[.]"):
            images.image(i)


def test_other_bad_arguments(tmp_path):
    write_image(tmp_path / "1.png")
    with pytest.raises(ValueError, match="unknown split 'dev'; use train or test"):
        load_images(tmp_path, "dev")
    with pytest.raises(ValueError, match=r"num_channels 4 \(it has 3 channels, not 4\)"):
        load_images(tmp_path, num_channels=4)
