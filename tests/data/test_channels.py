"""Images of any number of channels: arrays and TIFF files of several bands are read as they are, and checked early."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinov3_hf.data.decoding import UnreadableImage, UnsuitableImage, encoded_array, open_image
from dinov3_hf.data.multicrop import MultiCropViews
from dinov3_hf.data.sources.base import as_source
from dinov3_hf.data.sources.spec import load_images
from tests.data.bad_files import encode
from tests.data.sources.conftest import own_caches  # noqa: F401
from tests.testing_utils import require_package


def bands(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape or (20, 30, 5), dtype=np.uint8)


def tiff(values: np.ndarray, **options) -> bytes:
    import tifffile

    buffer = BytesIO()
    tifffile.imwrite(buffer, values, **options)
    return buffer.getvalue()


FIVE = bands()
SAMPLES = {"photometric": "minisblack", "planarconfig": "contig"}


def decode(content, num_channels=5) -> np.ndarray:
    opened = open_image(content, num_channels)
    pixels = opened.decode()
    assert pixels.dtype == np.uint8
    assert pixels.shape == (opened.height, opened.width, num_channels)
    assert pixels.flags.writeable and pixels.flags.c_contiguous
    return pixels


def test_arrays():
    np.testing.assert_array_equal(decode(FIVE), FIVE)
    np.testing.assert_array_equal(decode(encoded_array(FIVE)), FIVE)
    np.testing.assert_array_equal(decode(encoded_array(np.moveaxis(FIVE, 2, 0))), FIVE)  # channels first
    np.testing.assert_array_equal(decode(encoded_array(np.asfortranarray(FIVE))), FIVE)
    grey = bands(20, 30)
    np.testing.assert_array_equal(decode(encoded_array(grey), 1), grey[..., None])
    np.testing.assert_array_equal(decode(encoded_array(grey), 3), grey[..., None].repeat(3, 2))
    rgb = bands(20, 30, 3)
    np.testing.assert_array_equal(decode(encoded_array(rgb), 1)[..., 0], np.array(Image.fromarray(rgb).convert("L")))


@require_package("tifffile")
@pytest.mark.parametrize(
    ("values", "options"),
    [
        (FIVE, SAMPLES),
        (FIVE, SAMPLES | {"compression": "zlib"}),
        (FIVE, SAMPLES | {"bigtiff": True, "byteorder": ">"}),
        (np.moveaxis(FIVE, 2, 0), {"photometric": "minisblack", "planarconfig": "separate"}),
        (np.moveaxis(FIVE, 2, 0), {"imagej": True, "metadata": {"axes": "CYX"}}),  # a page for each band
        (FIVE, {}),  # a page for each row
    ],
)
def test_tiff_files_of_several_bands(values, options):
    np.testing.assert_array_equal(decode(tiff(values, **options)), FIVE)


@require_package("tifffile")
def test_deep_values_are_scaled_as_those_of_grey_images():
    deep = FIVE.astype(np.uint16) * 257
    np.testing.assert_array_equal(decode(tiff(deep, **SAMPLES)), FIVE)
    np.testing.assert_array_equal(decode(encoded_array(deep)), FIVE)
    np.testing.assert_array_equal(decode(encoded_array(deep.astype(">u2"))), FIVE)
    floats = np.array([[[-1.0, 0.0], [1.0, np.nan]]], dtype=np.float32)  # one scale for all channels
    np.testing.assert_array_equal(decode(encoded_array(floats), 2), [[[0, 128], [255, 0]]])
    np.testing.assert_array_equal(decode(encoded_array(FIVE > 99)), (FIVE > 99) * np.uint8(255))


def test_ordinary_images_are_taken_if_they_have_as_many_channels():
    four = bands(20, 30, 4)
    np.testing.assert_array_equal(decode(encode(four, "PNG"), 4), four)
    two = bands(20, 30, 2)
    np.testing.assert_array_equal(decode(encode(Image.fromarray(two, "LA"), "PNG"), 2), two)
    assert decode(encode(Image.fromarray(four, "CMYK"), "JPEG"), 4).shape == four.shape


@pytest.mark.parametrize(
    ("content", "num_channels", "reason"),
    [
        (encode(bands(20, 30, 3), "PNG"), 5, "it has 3 channels, not 5"),
        (encode(bands(20, 30, 3), "JPEG"), 5, "it has 3 channels, not 5"),
        (encode(bands(20, 30), "PNG"), 2, "it has 1 channel, not 2"),
        (encoded_array(bands(20, 30)), 5, "its shape is 20 x 30 x 1, not height x width x 5"),
        (encoded_array(FIVE), 3, "its shape is 20 x 30 x 5, not height x width x 3"),
        (encoded_array(bands(20, 30, 4)), 3, "its shape is 20 x 30 x 4, not height x width x 3"),  # no transparency
        (encoded_array(bands(2, 3, 20, 30)), 3, "its shape is 2 x 3 x 20 x 30, not height x width x 3"),
        (FIVE, 1, "its shape is 20 x 30 x 5, not height x width x 1"),
    ],
)
def test_other_numbers_of_channels_are_refused(content, num_channels, reason):
    with pytest.raises(UnsuitableImage) as caught:
        open_image(content, num_channels)
    assert str(caught.value) == reason


@require_package("tifffile")
@pytest.mark.parametrize("num_channels", [1, 3, 5])
def test_broken_files_are_refused(num_channels, capfd):
    whole = tiff(FIVE, **SAMPLES)
    array = encoded_array(FIVE)
    header = array.index(b"(20, 30, 5)")
    huge = array[:header] + b"(99999, 30, 5), }".ljust(20) + array[header + 20 :]
    for content in (
        *(whole[:100], whole[: len(whole) // 2], array[:60], array[:1000], huge),
        encoded_array(np.zeros((0, 30, 5), np.uint8)),
        encoded_array(FIVE * 1j),
        encoded_array(np.full((20, 30, 5), np.nan)),
    ):
        with pytest.raises(UnreadableImage) as caught:
            open_image(content, num_channels)
        assert str(caught.value)
        assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_too_many_values(monkeypatch):
    pytest.importorskip("tifffile")
    monkeypatch.setattr("dinov3_hf.data.decoding.MAX_PIXELS", 20 * 30 * 5 // 3)
    decode(tiff(FIVE, **SAMPLES))
    monkeypatch.setattr("dinov3_hf.data.decoding.MAX_PIXELS", 20 * 30 * 5 // 3 - 1)
    with pytest.raises(UnreadableImage, match="more than 2,997 values"):
        decode(tiff(FIVE, **SAMPLES))


def test_a_package_that_is_missing_is_named(monkeypatch, tmp_path):
    pytest.importorskip("tifffile")
    (tmp_path / "a.tif").write_bytes(tiff(FIVE, **SAMPLES))
    monkeypatch.setitem(__import__("sys").modules, "tifffile", None)
    with pytest.raises(ValueError, match=r"a\.tif cannot be read .*pip install 'dinov3-hf\[tiff\]'"):
        load_images(tmp_path, num_channels=5)


def save_arrays(folder: Path, num_images: int = 4) -> list[np.ndarray]:
    arrays = [bands(20, 30, 5, seed=i) for i in range(num_images)]
    for i, values in enumerate(arrays):
        path = folder / ("water" if i % 2 else "wood") / f"{i}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded_array(values))
    return arrays


def test_folders_of_arrays(tmp_path):
    arrays = save_arrays(tmp_path)
    images = load_images(tmp_path, labelled=True, num_channels=5)
    assert images.class_names == ["water", "wood"]
    for i, number in enumerate((1, 3, 0, 2)):
        np.testing.assert_array_equal(images.image(i), arrays[number])
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.png")
    assert len(load_images(tmp_path)) == 1  # arrays beside images are masks, depth, features


@require_package("datasets")
@pytest.mark.parametrize("prefix", ["", "stream:"])
@pytest.mark.parametrize("kind", ["uint8", "uint16", "lists", "encoded"])
def test_arrays_in_tables(kind, prefix, tmp_path):
    import datasets

    arrays = [bands(20, 30, 5, seed=i) for i in range(3)]
    feature, values = {
        "uint8": (datasets.Array3D((20, 30, 5), "uint8"), arrays),
        "uint16": (datasets.Array3D((20, 30, 5), "uint16"), [image.astype(np.uint16) * 257 for image in arrays]),
        "lists": (datasets.List(datasets.List(datasets.List(datasets.Value("uint8")))), arrays),
        "encoded": (datasets.Value("binary"), [encoded_array(image) for image in arrays]),
    }[kind]
    datasets.disable_progress_bars()
    table = datasets.Dataset.from_dict({"image": values}, features=datasets.Features({"image": feature}))
    table.to_parquet(tmp_path / "x.parquet")
    images = load_images(f"{prefix}{tmp_path}/x.parquet", num_channels=5)
    for i, image in enumerate(arrays):
        np.testing.assert_array_equal(images.image(i), image)


def test_arrays_in_tar_files(tmp_path):
    import tarfile

    arrays = save_arrays(tmp_path / "folder")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(tmp_path / "folder" / "wood", "wood")
    images = load_images(tmp_path / "x.tar", num_channels=5)
    assert len(images) == 2
    np.testing.assert_array_equal(images.image(0), arrays[0])


def test_images_that_do_not_fit_are_refused_before_a_run_begins(tmp_path):
    save_arrays(tmp_path / "arrays")
    with pytest.raises(ValueError, match=r"1\.npy cannot be read with num_channels 3 \(its shape is 20 x 30 x 5, not"):
        load_images(tmp_path / "arrays")
    for i in range(3):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png")
    message = (
        r"0\.png cannot be read with num_channels 5 \(it has 3 channels, not 5\), nor can .*; set num_channels to"
    )
    with pytest.raises(ValueError, match=message):
        load_images(tmp_path, num_channels=5)
    (tmp_path / "1.png").write_bytes(encoded_array(FIVE))  # one fits: the others are left out one by one
    images = load_images(tmp_path, num_channels=5)
    with pytest.raises(ValueError, match=r"cannot read image .*2\.png \(it has 3 channels, not 5\); repair or remove"):
        images.image(2)
    with pytest.raises(ValueError, match="num_channels 0 is no number of channels"):
        load_images(tmp_path, num_channels=0)


def test_images_of_a_program():
    class Given:
        def __len__(self):
            return 2

        def image(self, i):
            return FIVE

    images = as_source(Given(), 5)
    np.testing.assert_array_equal(images.image(1), FIVE)
    with pytest.raises(ValueError, match=r"image 0 cannot be read with num_channels 3 \(its shape is"):
        as_source(Given(), 3)
    with pytest.raises(ValueError, match=r"read with 5 channels, and the model takes 3; open them with load_images"):
        as_source(images, 3)


@pytest.mark.invariant
@pytest.mark.parametrize("num_channels", [1, 2, 4, 5, 13])
def test_each_channel_is_cut_as_if_it_were_alone(num_channels):
    views = MultiCropViews(16, 8, num_local_crops=2, gram_crop_size=24)
    image = bands(40, 50, num_channels)
    together = views(image, np.random.default_rng(1))
    for channel in range(num_channels):
        alone = views(image[..., channel : channel + 1], np.random.default_rng(1))
        for name in ("global_crops", "local_crops", "gram_crops"):
            difference = together[name][:, channel].int() - alone[name][:, 0].int()
            assert difference.abs().max() <= 1, name  # rounding of different code for different numbers of channels
            assert (difference != 0).float().mean() < 0.01
    assert together["global_crops"].dtype == torch.uint8
