"""Sources give the right images and labels or one clear line; samples do not depend on workers and ranks."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from PIL import Image
from torch.utils.data import BatchSampler, DataLoader

from dinov3_hf.data.collators import collate_views
from dinov3_hf.data.datasets import SSLDataset, load_images
from dinov3_hf.data.masking import MaskSampler
from dinov3_hf.data.multicrop import MultiCropViews
from dinov3_hf.data.photometric import Photometric
from dinov3_hf.data.sampler import StreamSampler
from tests.testing_utils import TEST_DATA, require_package, require_test_data


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
    assert [images.path(i).relative_to(tmp_path).as_posix() for i in range(len(images))] == [
        "a.png",
        "b/2.webp",
        "b/deep/er/1.JPG",
        "c/3.bmp",
    ]
    assert images.labels is None
    assert images.image(0).mode == "RGB"
    assert images.image(0).getpixel((3, 3)) == (200, 100, 50)
    assert load_images(tmp_path, num_channels=1).image(0).mode == "L"


def test_linked_folders_count_once(tmp_path):
    write_image(tmp_path / "elsewhere" / "1.png")
    root = tmp_path / "root"
    write_image(root / "own" / "2.png")
    for link, target in (("a_link", tmp_path / "elsewhere"), ("b_link", tmp_path / "elsewhere"), ("own/loop", root)):
        (root / link).symlink_to(target, target_is_directory=True)
    images = load_images(root)
    assert [images.path(i).relative_to(root).as_posix() for i in range(len(images))] == ["a_link/1.png", "own/2.png"]


def test_orientation_and_modes(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    write_image(tmp_path / "1.jpg", size=(20, 16), exif=exif)
    Image.new("L", (4, 4), 77).save(tmp_path / "2.png")
    Image.new("RGBA", (4, 4), (1, 2, 3, 255)).save(tmp_path / "3.png")
    images = load_images(tmp_path)
    assert images.image(0).size == (16, 20)
    assert [images.image(i).getpixel((0, 0)) for i in (1, 2)] == [(77, 77, 77), (1, 2, 3)]


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
        ("no/such/folder", FileNotFoundError, "there is no folder no/such/folder"),
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
    with pytest.raises(ValueError, match="1 or 3 channels, not 4"):
        load_images(tmp_path, num_channels=4)


class RandomPictures:
    labels = None
    class_names = None

    def __init__(self, length=11):
        self.pixels = np.random.default_rng(0).integers(0, 256, (length, 20, 24, 3), dtype=np.uint8)

    def __len__(self):
        return len(self.pixels)

    def image(self, i):
        return self.pixels[i]


def ssl_dataset(images=None, batch_size=8, seed=0):
    return SSLDataset(
        RandomPictures() if images is None else images,
        MultiCropViews(16, 8, num_local_crops=3),
        MaskSampler(4, batch_size=batch_size, seed=seed),
        seed=seed,
    )


def assert_equal_batches(a, b):
    assert a.keys() == b.keys()
    for name, value in a.items():
        if isinstance(value, dict):
            assert_equal_batches(value, b[name])
        elif isinstance(value, torch.Tensor):
            torch.testing.assert_close(value, b[name], rtol=0, atol=0)
        else:
            np.testing.assert_array_equal(value, b[name])


@pytest.mark.invariant
def test_number_of_workers_changes_nothing():
    def batches(num_workers):
        sampler = StreamSampler(11, 32, seed=0)
        loader = DataLoader(
            ssl_dataset(), 8, sampler=sampler, collate_fn=collate_views, num_workers=num_workers, drop_last=True
        )
        return list(loader)

    expected = batches(0)
    assert len(expected) == 4
    for num_workers in (1, 2):
        for batch, reference in zip(batches(num_workers), expected, strict=True):
            assert_equal_batches(batch, reference)


def merge(parts):
    """The global batch that ranks and accumulation steps saw in parts, in their order."""

    def join(values, num_images):
        if isinstance(values[0], dict):
            return {name: join([value[name] for value in values], num_images) for name in values[0]}
        if isinstance(values[0], np.ndarray):
            split = [value.reshape(-1, num_images, *value.shape[1:]) for value in values]
            return np.concatenate(split, axis=1).reshape(-1, *values[0].shape[1:])
        return torch.cat([value.unflatten(0, (-1, num_images)) for value in values], dim=1).flatten(0, 1)

    names = [name for name in parts[0] if name not in ("mask_indices", "mask_weight")]
    return {name: join([part[name] for part in parts], len(parts[0]["mask"]) // 2) for name in names}


@pytest.mark.invariant
@pytest.mark.parametrize(("num_ranks", "accumulation"), [(2, 1), (1, 2), (2, 2)])
def test_ranks_and_accumulation_change_nothing(num_ranks, accumulation):
    dataset = ssl_dataset()
    micro_batch = 8 // num_ranks // accumulation

    def batches(size, num_processes, process_index):
        sampler = BatchSampler(StreamSampler(11, 24, seed=0), size, drop_last=True)
        shard = BatchSamplerShard(sampler, num_processes=num_processes, process_index=process_index)
        return list(DataLoader(dataset, batch_sampler=shard, collate_fn=collate_views))

    expected = batches(8, 1, 0)
    shards = [batches(micro_batch, num_ranks, rank) for rank in range(num_ranks)]
    for step, batch in enumerate(expected):
        parts = [shard[step * accumulation + i] for i in range(accumulation) for shard in shards]
        merged = merge(parts)
        assert_equal_batches(merged, {name: batch[name] for name in merged})


def test_every_epoch_has_other_views_of_an_image():
    dataset = ssl_dataset(RandomPictures(2))
    first, second = dataset[(0, 1)], dataset[(2, 1)]
    assert not torch.equal(first["global_crops"], second["global_crops"])
    assert torch.equal(first["global_crops"], dataset[(1, 1)]["global_crops"])  # any position of the epoch


@require_test_data
@require_package("pyarrow")
def test_real_photos(tmp_path):
    import pyarrow.parquet as parquet

    table = parquet.read_table(TEST_DATA / "tiny_imagenet_train.parquet").slice(0, 300)
    for i, row in enumerate(table.to_pylist()):
        path = tmp_path / row["wnid"] / f"{i:04}.JPEG"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(row["image"]["bytes"])
    images = load_images(tmp_path, labelled=True)
    assert len(images) == 300
    assert images.class_names == sorted(set(table["wnid"].to_pylist()))
    assert {Image.open(io.BytesIO(row["image"]["bytes"])).mode for row in table.to_pylist()} == {"RGB", "L"}

    dataset = SSLDataset(images, MultiCropViews(48, 24), MaskSampler(6, batch_size=50, seed=0), seed=0)
    sampler = StreamSampler(len(images), len(images), seed=0)
    distort = Photometric((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    for batch in DataLoader(dataset, 50, sampler=sampler, collate_fn=collate_views, num_workers=2):
        crops = distort(batch["global_crops"], batch["global_photometric"])
        assert crops.shape == (100, 3, 48, 48)
        assert crops.isfinite().all()
        assert 0.5 < crops.std() < 2
        assert batch["local_crops"].shape == (400, 3, 24, 24)
