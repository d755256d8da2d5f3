"""Training and test images of `--data`: the right ones with the right labels, or one clear line."""

import shutil

import numpy as np
import pytest
from PIL import Image

from dinov3_hf.cli.splits import all_labelled, labelled_splits
from tests.data.sources.writing import write_parquet
from tests.testing_utils import require_package, save_labelled_images


def pixels(part) -> list[bytes]:
    return [np.asarray(part.image(i)).tobytes() for i in range(len(part))]


@require_package("sklearn")
def test_digits_are_used_whole():
    train, test = labelled_splits("digits", num_channels=1, size=16)
    assert (len(train), len(test)) == (1442, 355)
    assert train.image(0).shape == (8, 8, 1)
    assert len(train.labels) == 1442


def test_a_folder_is_split_once_and_for_all(tmp_path):
    save_labelled_images(tmp_path, num_images=11)
    train, test = labelled_splits(str(tmp_path), 3, 32)
    assert train.class_names == test.class_names == ["dark", "light"]
    assert np.bincount(train.labels).tolist() == [9, 9]
    assert np.bincount(test.labels).tolist() == [2, 2]
    assert len(set(pixels(train)) | set(pixels(test))) == 22  # nothing twice, nothing lost
    for part in (train, test):
        brightness = np.array([np.asarray(part.image(i)).mean() for i in range(len(part))])
        assert ((brightness > 120) == part.labels).all()
    again = labelled_splits(str(tmp_path), 3, 32)
    assert [pixels(part) for part in again] == [pixels(train), pixels(test)]


def test_photos_are_cut_to_their_centre(tmp_path):
    save_labelled_images(tmp_path, size=(80, 48))
    train, _ = labelled_splits(str(tmp_path), 3, 32)
    assert train.image(0).size == (32, 32)
    grey, _ = labelled_splits(str(tmp_path), 1, 32)
    assert grey.image(0).mode == "L"


@pytest.mark.parametrize("name", ["test", "val"])
def test_splits_of_ones_own(name, tmp_path, monkeypatch):
    save_labelled_images(tmp_path / "photos" / "train")
    save_labelled_images(tmp_path / "photos" / name, num_images=3)
    shutil.rmtree(tmp_path / "photos" / name / "dark")  # the label of the other class must not move down
    monkeypatch.setenv("HOME", str(tmp_path))
    for data in (str(tmp_path / "photos"), "~/photos"):
        train, test = labelled_splits(data, 3, 32)
        assert (len(train), len(test)) == (20, 3)
        assert test.labels.tolist() == [1, 1, 1]
        assert test.class_names == ["dark", "light"]


def test_all_images_whatever_their_split(tmp_path):
    save_labelled_images(tmp_path / "photos" / "train")
    save_labelled_images(tmp_path / "photos" / "val", num_images=3)
    shutil.rmtree(tmp_path / "photos" / "val" / "dark")
    images = all_labelled(str(tmp_path / "photos"), 3, 32)
    assert len(images) == len(images.labels) == 23
    assert images.labels[-3:].tolist() == [1, 1, 1] and images.class_names == ["dark", "light"]
    train, test = labelled_splits(str(tmp_path / "photos"), 3, 32)
    for i, (part, row) in {0: (train, 0), 19: (train, 19), 20: (test, 0), 22: (test, 2)}.items():
        assert np.array_equal(np.asarray(images.image(i)), np.asarray(part.image(row)))
    assert len(all_labelled(str(tmp_path / "photos" / "train"), 3, 32)) == 20


def test_train_alone_is_split(tmp_path):
    save_labelled_images(tmp_path / "train")
    train, test = labelled_splits(str(tmp_path), 3, 32)
    assert (len(train), len(test)) == (16, 4)


@require_package("datasets")
@require_package("pyarrow")
def test_parquet_files(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write_parquet(tmp_path / "pets_train.parquet", range(30))
    write_parquet(tmp_path / "pets_val.parquet", range(30, 36))
    train, test = labelled_splits(f"{tmp_path}/pets_*.parquet", 3, 16)
    assert (len(train), len(test)) == (30, 6)
    assert test.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert train.image(0).size == (16, 16)
    train, test = labelled_splits(str(tmp_path / "pets_train.parquet"), 3, 16)
    assert (len(train), len(test)) == (24, 6)


def test_data_that_cannot_be_split(tmp_path):
    def refused(folder, message, error=ValueError):
        with pytest.raises(error, match=message) as caught:
            labelled_splits(str(tmp_path / folder), 3, 32)
        assert "\n" not in str(caught.value)

    refused("nowhere", "there is no folder", FileNotFoundError)
    (tmp_path / "empty").mkdir()
    refused("empty", "is empty; put images into it", FileNotFoundError)
    (tmp_path / "flat").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "flat" / "1.png")
    refused("flat", r"lies in no class sub-folder; labels need one folder a class: .*flat/CLASS/IMAGE")
    save_labelled_images(tmp_path / "one" / "cats")
    refused("one", "all images in .*one are of one class, cats; give images of several classes")
    save_labelled_images(tmp_path / "few", num_images=4)
    refused("few", r"no class in .*few has 5 images, too few to set some aside; give test images as well")
    save_labelled_images(tmp_path / "untrained" / "val")
    refused("untrained", "has a sub-folder val but none named train; put the training images there")
    save_labelled_images(tmp_path / "more" / "train")
    save_labelled_images(tmp_path / "more" / "test")
    (tmp_path / "more" / "train" / "dark").rename(tmp_path / "more" / "train" / "night")
    refused("more", "classes without training images, such as dark; add some or remove these classes")
