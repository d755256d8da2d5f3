"""Samples do not depend on workers and ranks; images that cannot be read are replaced, the same way every time."""

import io

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from PIL import Image
from torch.utils.data import BatchSampler, DataLoader

from dinov3_hf.data.collators import collate_views
from dinov3_hf.data.datasets import SSLDataset
from dinov3_hf.data.masking import MaskSampler
from dinov3_hf.data.multicrop import MultiCropViews
from dinov3_hf.data.photometric import Photometric
from dinov3_hf.data.sampler import SampleKey, StreamSampler
from dinov3_hf.data.sources.base import as_source
from dinov3_hf.data.sources.spec import load_images
from tests.data.bad_files import encode, photo
from tests.testing_utils import TEST_DATA, require_package, require_test_data


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
        as_source(RandomPictures() if images is None else images, 3),
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
@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
@pytest.mark.parametrize("kind", ["pixels", "large JPEGs"])
def test_number_of_workers_changes_nothing(kind, tmp_path):
    images = None
    if kind == "large JPEGs":  # decoded at a fraction of their size
        for i in range(11):
            (tmp_path / f"{i}.jpg").write_bytes(encode(photo(300, 400, seed=i), "JPEG"))
        images = load_images(tmp_path)

    def batches(num_workers):
        sampler = StreamSampler(as_source(RandomPictures() if images is None else images, 3), 32, 8, seed=0)
        dataset = ssl_dataset(images)
        loader = DataLoader(dataset, 8, sampler=sampler, collate_fn=collate_views, num_workers=num_workers)
        return list(loader)

    expected = batches(0)
    assert len(expected) == 4
    for num_workers in (1, 4):
        for batch, reference in zip(batches(num_workers), expected, strict=True):
            assert_equal_batches(batch, reference)


def merge(parts):
    """The global batch that ranks and accumulation steps saw in parts, in their order."""

    def join(values, num_images):
        if isinstance(values[0], dict):
            return {name: join([value[name] for value in values], num_images) for name in values[0]}
        if isinstance(values[0], list):
            return [entry for value in values for entry in value]
        if isinstance(values[0], np.ndarray):
            split = [value.reshape(-1, num_images, *value.shape[1:]) for value in values]
            return np.concatenate(split, axis=1).reshape(-1, *values[0].shape[1:])
        return torch.cat([value.unflatten(0, (-1, num_images)) for value in values], dim=1).flatten(0, 1)

    size = len(parts[0]["mask"]) // 2
    assert [part["first_image"] for part in parts] == list(range(0, len(parts) * size, size))
    names = [name for name in parts[0] if name not in ("first_image", "mask_indices", "mask_weight")]
    return {name: join([part[name] for part in parts], size) for name in names}


@pytest.mark.invariant
@pytest.mark.parametrize(("num_ranks", "accumulation"), [(2, 1), (1, 2), (2, 2)])
def test_ranks_and_accumulation_change_nothing(num_ranks, accumulation):
    dataset = ssl_dataset()
    micro_batch = 8 // num_ranks // accumulation

    def batches(size, num_processes, process_index):
        sampler = BatchSampler(StreamSampler(as_source(RandomPictures(), 3), 24, 8, seed=0), size, drop_last=True)
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
    first, second = dataset[SampleKey(0, 0, 0, 1)], dataset[SampleKey(2, 0, 1, 1)]
    assert not torch.equal(first["global_crops"], second["global_crops"])
    assert torch.equal(
        first["global_crops"], dataset[SampleKey(1, 0, 0, 1)]["global_crops"]
    )  # any position of the epoch


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
    sampler = StreamSampler(images, len(images), 50, seed=0)
    distort = Photometric((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    for batch in DataLoader(dataset, 50, sampler=sampler, collate_fn=collate_views, num_workers=2):
        crops = distort(batch["global_crops"], batch["global_photometric"])
        assert crops.shape == (100, 3, 48, 48)
        assert crops.isfinite().all()
        assert 0.5 < crops.std() < 2
        assert batch["local_crops"].shape == (400, 3, 24, 24)
