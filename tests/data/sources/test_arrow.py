"""Parquet files and data sets of the Hub: the right images, names and labels, or one clear line."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from dinov3_hf.data.sources.base import NoSuchSplit
from dinov3_hf.data.sources.spec import load_images
from tests.data.sources.writing import CLASSES, encoded, number_of, write_folder, write_parquet
from tests.testing_utils import TEST_DATA, require_package, require_test_data

pytestmark = [require_package("datasets"), require_package("pyarrow")]


def numbers(images) -> list[int]:
    return [number_of(images.image(i)) for i in range(len(images))]


def test_files_rows_and_labels(tmp_path, capfd):
    for shard in range(3):
        write_parquet(tmp_path / f"part-{shard}.parquet", range(10 * shard, 10 * shard + 10))
    capfd.readouterr()
    images = load_images(f"{tmp_path}/part-{{0..2}}.parquet", labelled=True)
    assert numbers(images) == list(range(30))
    assert images.labels.tolist() == [number % 3 for number in range(30)]
    assert images.labels.dtype == np.int64
    assert images.class_names == CLASSES
    assert images.name(17) == f"{tmp_path / 'part-1.parquet'} row 7"
    assert (images.name(0)[-5:], images.name(29)[-5:]) == ("row 0", "row 9")
    assert images.content(5) == encoded(5)  # undecoded
    assert load_images(tmp_path / "part-0.parquet", num_channels=1).image(3).shape == (20, 24, 1)
    assert capfd.readouterr() == ("", "")  # no progress bars, no log lines
    assert len(pickle.dumps(images)) < 20_000  # a worker gets the name of the Arrow file, not the images


def test_folder_of_parquet_files_and_its_splits(tmp_path):
    write_parquet(tmp_path / "a" / "train-0.parquet", range(5))
    write_parquet(tmp_path / "a" / "val-0.parquet", range(5, 8))
    write_parquet(tmp_path / "b" / "train" / "0.parquet", range(4))
    write_parquet(tmp_path / "b" / "validation" / "0.parquet", range(4, 6))
    for folder, num_train, num_test in (("a", 5, 3), ("b", 4, 2)):
        sizes = [len(load_images(tmp_path / folder, split)) for split in ("train", "test", None)]
        assert sizes == [num_train, num_test, num_train + num_test]
    write_folder(tmp_path / "a", range(2))
    assert len(load_images(tmp_path / "a")) == 2  # a folder of images that has other files too


def test_columns_of_other_names_and_types(tmp_path):
    import pyarrow
    import pyarrow.parquet

    write_parquet(tmp_path / "named.parquet", range(3), column="photo")
    assert numbers(load_images(tmp_path / "named.parquet")) == [0, 1, 2]
    (tmp_path / "elsewhere.png").write_bytes(encoded(7))
    plain = {
        "bytes": pyarrow.array([encoded(1), encoded(2)]),
        "path": pyarrow.array([str(tmp_path / "elsewhere.png")] * 2),
        "struct": pyarrow.array(
            [{"bytes": encoded(3), "path": None}, {"bytes": None, "path": str(tmp_path / "elsewhere.png")}]
        ),
    }
    for name, values in plain.items():
        table = pyarrow.table({"image": values, "cls": ["b", "a"]})
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet")
    assert numbers(load_images(tmp_path / "bytes.parquet")) == [1, 2]
    assert numbers(load_images(tmp_path / "path.parquet")) == [7, 7]
    images = load_images(tmp_path / "struct.parquet", labelled=True)
    assert numbers(images) == [3, 7]
    assert (images.class_names, images.labels.tolist()) == (["a", "b"], [1, 0])


def test_fingerprint_survives_a_move_and_notices_other_rows(tmp_path):
    first = load_images(write_parquet(tmp_path / "a" / "x.parquet", range(5))).fingerprint()
    (tmp_path / "a").rename(tmp_path / "b")
    assert load_images(tmp_path / "b" / "x.parquet").fingerprint() == first
    assert load_images(write_parquet(tmp_path / "c" / "x.parquet", range(6))).fingerprint() != first


def test_files_that_cannot_be_read(tmp_path):
    def refused(data, message, error=ValueError, **options):
        with pytest.raises(error, match=message) as caught:
            load_images(data, **options)
        assert "\n" not in str(caught.value)

    whole = write_parquet(tmp_path / "whole.parquet", range(5))
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(whole.read_bytes()[:-20])
    refused(cut, r"cut\.parquet cannot be read as a parquet file \(.*\); copy it again or leave it out\.$")
    damaged = bytearray(whole.read_bytes())
    damaged[4:200] = bytes(196)
    (tmp_path / "damaged.parquet").write_bytes(damaged)
    refused(tmp_path / "damaged.parquet", r"damaged\.parquet cannot be read \(.*\); its files must be whole")
    (tmp_path / "empty.parquet").touch()
    refused(tmp_path / "empty.parquet", r"empty\.parquet cannot be read as a parquet file")
    refused(write_parquet(tmp_path / "none.parquet", []), "has no rows")
    refused(
        write_parquet(tmp_path / "unlabelled.parquet", range(3), labels=[0, -1, 1]),
        "has images without a label; name a split that is labelled",
        labelled=True,
    )
    refused(tmp_path / "*.txt", r"no file matches .*\*\.txt", FileNotFoundError)
    (tmp_path / "x.tar").touch()
    refused(tmp_path / "{whole.parquet,x.tar}", r"files of several kinds \(\.parquet, \.tar\)")
    (tmp_path / "notes.txt").touch()
    refused(tmp_path / "notes.txt", "is a file; name the folder that holds the images, or files of the kind .parquet")
    refused(whole, "has no test images", NoSuchSplit, split="test")


def test_columns_that_are_missing(tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"], "number": [1]}), tmp_path / "texts.parquet")
    with pytest.raises(ValueError, match=r"no image column; its columns are text, number: name one as `column`"):
        load_images(tmp_path / "texts.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"image": [encoded(0)]}), tmp_path / "plain.parquet")
    with pytest.raises(ValueError, match=r"has no labels; its columns are image, and a column label or labels or cls"):
        load_images(tmp_path / "plain.parquet", labelled=True)


@pytest.mark.parametrize(("values", "dtype"), [([1, 2], "int64"), ([None, None], "null")])
@pytest.mark.parametrize("prefix", ["", "stream:"])
def test_a_column_of_numbers_holds_no_images(tmp_path, prefix, values, dtype):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"image": values}), tmp_path / "numbers.parquet")
    with pytest.raises(ValueError, match=rf"has {dtype} in its column image, not images or their paths; name another"):
        load_images(f"{prefix}{tmp_path / 'numbers.parquet'}")


def test_hub_that_is_out_of_reach(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError) as caught:
        load_images("nobody/nothing")
    message = str(caught.value)
    assert message.startswith("there is no folder or file nobody/nothing, and as a data set of the Hub it fails: ")
    assert "\n" not in message


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """The library's cache as it is after `owner/pets` has been downloaded, and no way to the Hub."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    files = {"train": range(10), "test": range(10, 14)}
    paths = {split: str(write_parquet(tmp_path / f"{split}.parquet", rows)) for split, rows in files.items()}
    prepared = datasets.load_dataset("parquet", data_files=paths)
    built = Path(prepared["train"].cache_files[0]["filename"]).parent
    cache = Path(datasets.config.HF_DATASETS_CACHE) / "owner___pets" / "default" / "0.0.0" / "abc"
    cache.mkdir(parents=True)
    for file in built.iterdir():
        (cache / file.name.replace("parquet-", "pets-")).write_bytes(file.read_bytes())
    facts = json.loads((cache / "dataset_info.json").read_text())
    (cache / "dataset_info.json").write_text(json.dumps(facts | {"dataset_name": "pets"}))


@pytest.mark.usefixtures("hub_cache")
def test_data_set_of_the_hub(capfd):
    train, test, everything = (load_images("owner/pets", split, labelled=True) for split in ("train", "test", None))
    assert [numbers(images) for images in (train, test)] == [list(range(10)), list(range(10, 14))]
    assert len(everything) == 14
    assert train.class_names == CLASSES
    assert train.name(3) == "owner/pets row 3"
    assert len(load_images("owner/pets:default", "train")) == 10
    assert len(load_images("owner/pets::test", "train")) == 4
    assert len(load_images("owner/pets:default:test")) == 4
    stream = load_images("stream:owner/pets", "train")
    assert numbers(stream) == list(range(10))
    with pytest.raises(NoSuchSplit, match=r"no split val \(.*\); name one: owner/pets::SPLIT"):
        load_images("owner/pets::val")
    with pytest.raises(NoSuchSplit, match="is one split of a data set and has no test images of its own"):
        load_images("owner/pets::test", "test")
    with pytest.raises(ValueError, match=r"cannot be read \(Couldn't find cache for owner/pets for config 'other'\)"):
        load_images("owner/pets:other", "train")
    assert capfd.readouterr() == ("", "")


def test_hub_id_is_a_folder_where_there_is_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "owner" / "name", range(3))
    assert len(load_images("owner/name")) == 3
    with pytest.raises(FileNotFoundError, match="there is no folder or file owner/other; name images that exist"):
        load_images("owner/other")


@require_test_data
def test_real_parquet_files():
    data = f"{TEST_DATA}/tiny_imagenet_*.parquet"
    train, test = (load_images(data, split, labelled=True) for split in ("train", "test"))
    assert (len(train), len(test)) == (19999, 2000)
    assert train.class_names == test.class_names
    assert train.class_names[0] == "goldfish"
    assert np.bincount(test.labels).tolist() == [50] * 40
    assert {train.image(i).shape for i in range(0, 19999, 500)} == {(64, 64, 3)}
    assert train.name(19998).endswith("tiny_imagenet_train.parquet row 19998")
