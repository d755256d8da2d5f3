"""Data recipes: sources, weights and evaluation images as the file says, or one clear line."""

import pytest

from dinov3_hf.cli.splits import labelled_splits
from dinov3_hf.data.sources.mixture import Mixture
from dinov3_hf.data.sources.spec import load_images
from dinov3_hf.data.sources.stream import ImageStream
from dinov3_hf.errors import ArgumentError
from tests.data.sources.writing import number_of, write_folder, write_parquet, write_tar
from tests.testing_utils import require_package

pytestmark = [require_package("datasets"), require_package("pyarrow")]


@pytest.fixture
def data(tmp_path):
    write_folder(tmp_path / "photos", range(6))
    write_parquet(tmp_path / "tables" / "train-0.parquet", range(100, 110))
    write_parquet(tmp_path / "tables" / "val-0.parquet", range(110, 114))
    write_tar(tmp_path / "shards" / "0.tar", range(200, 208))
    return tmp_path


def write(folder, text):
    path = folder / "data.yaml"
    path.write_text(text)
    return path


def test_sources_weights_and_relative_paths(data, monkeypatch):
    recipe = """
        sources:
          - {data: photos, weight: 0.1, alone: true}
          - {data: tables, weight: 0.6}
          - {data: "shards/{0..0}.tar", weight: 0.3}
    """
    images = load_images(write(data, recipe), "train")
    assert isinstance(images, Mixture)
    assert [len(part.source) for part in images.parts] == [6, 10, 8]
    assert [part.weight for part in images.parts] == [0.1, 0.6, 0.3]
    assert [part.alone for part in images.parts] == [True, False, False]
    monkeypatch.chdir(data / "photos")  # paths start from the file, not from here
    assert load_images("../data.yaml", "train").fingerprint() == images.fingerprint()


def test_without_weights_every_image_counts_the_same(data):
    images = load_images(write(data, "sources: [photos, {data: tables}, digits]"), "train")
    assert [part.weight for part in images.parts] == [6, 10, 1442]


def test_split_and_column_of_an_entry(data):
    write_parquet(data / "named.parquet", range(3), column="photo")
    write_parquet(data / "two" / "dev" / "x.parquet", range(5))
    recipe = """
        sources:
          - {data: tables, split: val}
          - {data: named.parquet, column: photo}
          - {data: two, split: dev}
          - {data: digits, split: test}
    """
    images = load_images(write(data, recipe), "train")
    assert [len(part.source) for part in images.parts] == [4, 3, 5, 355]
    with pytest.raises(FileNotFoundError, match="tables has no split dev: no file with that word in its name"):
        load_images(write(data, "sources: [{data: tables, split: dev}]"), "train")
    with pytest.raises(FileNotFoundError, match="photos has no split val: no sub-folder of that name"):
        load_images(write(data, "sources: [{data: photos, split: val}]"), "train")
    with pytest.raises(ValueError, match="has no column photos; did you mean photo"):
        load_images(write(data, "sources: [{data: named.parquet, column: photos}]"), "train")


def test_streaming(data):
    recipe = """
        streaming: true
        shuffle_buffer: 4
        sources:
          - {data: tables, weight: 2}
          - {data: shards/*.tar, weight: 1}
    """
    images = load_images(write(data, recipe), "train")
    assert all(isinstance(part.source, ImageStream) for part in images.parts)
    assert [part.source.shuffle_buffer for part in images.parts] == [4, 4]
    assert [number_of(images.parts[0].source.image(i)) for i in range(10)] == list(range(100, 110))
    recipe = "shuffle_buffer: 4\nsources: [{data: 'stream:tables', weight: 1}, {data: photos, weight: 1}]"
    one = load_images(write(data, recipe), "train")
    assert [isinstance(part.source, ImageStream) for part in one.parts] == [True, False]
    assert one.parts[0].source.shuffle_buffer == 4


def test_evaluation_images(data):
    recipe = write(data, "sources: [photos]\ntrain: tables\ntest: {data: tables}")
    train, test = labelled_splits(str(recipe), 3, 16)
    assert (len(train), len(test)) == (10, 4)
    recipe = write(data, "train: {data: tables, split: train}\ntest: tables/val-0.parquet")
    train, test = labelled_splits(str(recipe), 3, 16)
    assert (len(train), len(test)) == (10, 4)
    assert len(load_images(recipe, "train")) == 10  # no sources: trains on what there is
    recipe = write(data, "sources: [photos, tables/train-0.parquet]")
    images = load_images(recipe, labelled=True)  # classes of the same name are one class
    assert images.class_names == ["cat", "dog", "owl"]
    assert [images.labels[i] for i in range(6)] == [0, 0, 1, 1, 2, 2]
    write_parquet(data / "many.parquet", range(20))
    train, test = labelled_splits(str(write(data, "train: many.parquet\nstreaming: true")), 3, 16)
    assert (len(train), len(test)) == (17, 3)  # a part is set aside; evaluations do not stream


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("sources: [", ArgumentError, "data.yaml line 1 is not valid YAML"),
        ("- photos", ArgumentError, "is not a mapping; write `sources:`"),
        ("{}", ArgumentError, "names no images; write `sources:`"),
        ("sources: []", ArgumentError, "names no images"),
        ("source: [photos]", ArgumentError, "has a field 'source', which does not exist; did you mean sources?"),
        ("sources: photos", ArgumentError, "sources in data recipe .* is 'photos'; expected a list"),
        ("sources: [3]", ArgumentError, "source 1 in data recipe .* is 3; write `data: FOLDER`"),
        ("sources: [{wieght: 1, data: photos}]", ArgumentError, "has a field 'wieght', .* did you mean weight?"),
        ("sources: [{weight: 1}]", ArgumentError, "source 1 in data recipe .* has no data; write `data: FOLDER`"),
        ("sources: [{data: 5}]", ArgumentError, "data of source 1 .* is 5; expected text"),
        ("sources: [{data: photos, weight: many}]", ArgumentError, "weight of .* is 'many'; expected a number"),
        ("sources: [{data: photos, alone: 1}]", ArgumentError, "alone of .* is 1; expected true or false"),
        ("sources: [photos, {data: tables, weight: 1}]", ArgumentError, "has sources without a weight; give one to"),
        ("streaming: true\nsources: [tables, shards]", ArgumentError, "has sources without a weight"),
        ("sources: ['stream:tables', photos]", ArgumentError, "has sources without a weight"),
        ("sources: [{data: photos, weight: 0}]", ValueError, "weight 0 in .* is not positive; leave a source out"),
        ("sources: [{data: photos, weight: -1}]", ValueError, "weight -1 in .* is not positive"),
        ("shuffle_buffer: 0\nsources: [photos]", ValueError, "shuffle_buffer 0 in .* is not positive"),
        ("sources: [photoz/x/y]", FileNotFoundError, "there is no folder or file .*photoz/x/y"),
        ("train: {data: tables, weight: 1}", ArgumentError, "train in data recipe .* has a field 'weight'"),
        (
            "streaming: true\nsources: [photos]",
            ValueError,
            "is a folder of images, .* leave out stream: or `streaming`",
        ),
    ],
)
def test_recipes_that_say_something_wrong(data, text, error, message):
    with pytest.raises(error, match=message) as caught:
        load_images(write(data, text), "train")
    assert "\n" not in str(caught.value)


def test_recipe_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no data recipe .*data\.yaml; name a YAML file that exists"):
        load_images(tmp_path / "data.yaml")
    (tmp_path / "data.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ArgumentError, match="cannot be read"):
        load_images(tmp_path / "data.yaml")
