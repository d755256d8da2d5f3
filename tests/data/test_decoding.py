"""Every kind of image becomes 8-bit pixels or is refused with its reason, and nothing is printed."""

import resource
import sys
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from dinov3_hf.data.decoding import MAX_PIXELS, UPRIGHT, UnreadableImage, open_image
from tests.data.bad_files import (
    UNREADABLE,
    convertible_contents,
    encode,
    jpeg_bomb,
    large_png,
    photo,
    png_bomb,
    png_chunk,
    png_header,
    save_convertible,
    save_unreadable,
    unreadable_contents,
)

PHOTO = photo()
GREY = np.array(Image.fromarray(PHOTO).convert("L"))


def assert_close(pixels, expected, mean):
    """Mean absolute difference in grey levels."""
    assert pixels.dtype == np.uint8
    assert pixels.shape == expected.shape
    assert np.abs(pixels.astype(int) - expected).mean() <= mean


def decode(content, num_channels=3, reduction=1):
    """Pixels whose shape agrees with what was announced; a warning would fail the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened = open_image(content, num_channels)
        pixels = opened.decode(reduction)
    if reduction == 1:
        assert pixels.shape == (opened.height, opened.width, num_channels)
    assert pixels.flags.writeable
    assert pixels.flags.c_contiguous
    return pixels


@pytest.mark.parametrize("name", UNREADABLE)
@pytest.mark.parametrize("num_channels", [1, 3])
def test_refused(name, num_channels, capfd):
    with pytest.raises(UnreadableImage) as caught:
        decode(unreadable_contents()[name], num_channels)
    assert UNREADABLE[name] in str(caught.value)
    assert str(caught.value)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_files_are_treated_as_their_bytes(tmp_path):
    for path in save_unreadable(tmp_path):
        with pytest.raises(UnreadableImage):
            decode(path)
    for path in save_convertible(tmp_path):
        np.testing.assert_array_equal(decode(path), decode(path.read_bytes()))
    with pytest.raises(UnreadableImage, match="No such file"):
        decode(tmp_path / "absent.jpg")


@pytest.mark.parametrize(
    ("name", "mean"),
    [
        ("cmyk.jpg", 2),
        ("ycck.jpg", 3),
        ("progressive.jpg", 3),
        ("rotated.jpg", 3),
        ("pair.mpo.jpg", 3),
        ("palette.png", 5),
        ("animated.gif", 5),
        ("animated.webp", 0),
        ("animated.png", 0),
    ],
)
def test_coloured_ones_are_converted(name, mean):
    content = convertible_contents()[name]
    assert_close(decode(content), PHOTO, mean)
    assert_close(decode(content, num_channels=1), GREY[..., None], mean)


@pytest.mark.parametrize("name", ["grey.jpg", "deep.png", "deep.tif"])
def test_grey_ones_are_converted(name):
    content = convertible_contents()[name]
    mean = 2 if name == "grey.jpg" else 0
    assert_close(decode(content, num_channels=1), GREY[..., None], mean)
    assert_close(decode(content), GREY[..., None].repeat(3, 2), mean)


def test_deep_values_are_scaled_from_their_range():
    dark = np.array([[0, 257 * 3, 257 * 10]], dtype=np.uint16)
    assert decode(encode(dark, "PNG"), 1).ravel().tolist() == [0, 3, 10]  # 16 bits: the full range, not the image's
    long = np.array([[-1000, 0, 1_000_000]], dtype=np.int32)
    assert decode(encode(long, "TIFF"), 1).ravel().tolist() == [0, 0, 255]
    floats = np.array([[-0.5, 0.0, 0.5]], dtype=np.float32)
    assert decode(encode(floats, "TIFF"), 1).ravel().tolist() == [0, 128, 255]
    holes = np.array([[np.nan, 1.0, 3.0, np.inf, -np.inf]], dtype=np.float32)
    assert decode(encode(holes, "TIFF"), 1).ravel().tolist() == [0, 0, 255, 255, 0]
    constant = np.full((2, 2), 7.5, dtype=np.float32)
    assert decode(encode(constant, "TIFF"), 1).ravel().tolist() == [0] * 4
    with pytest.raises(UnreadableImage, match="no finite values"):
        decode(encode(np.full((2, 2), np.nan, dtype=np.float32), "TIFF"))


def test_black_and_white():
    pixels = decode(convertible_contents()["bilevel.png"])
    assert set(np.unique(pixels)) == {0, 255}


def test_transparent_parts_are_white():
    for name, expected in (("transparent.png", PHOTO), ("transparent_grey.png", GREY[..., None].repeat(3, 2))):
        pixels = decode(convertible_contents()[name])
        assert (pixels[:, 30:] == 255).all()
        np.testing.assert_array_equal(pixels[:, :30], expected[:, :30])
    palette = Image.fromarray(PHOTO).quantize(8)
    hidden = np.array(palette) == 3
    pixels = decode(encode(palette, "PNG", transparency=3))
    assert hidden.any()
    assert (pixels[hidden] == 255).all()
    np.testing.assert_array_equal(pixels[~hidden], np.array(palette.convert("RGB"))[~hidden])
    half = Image.fromarray(np.array([[[100, 0, 200, 51]]], dtype=np.uint8))  # a fifth of the colour
    assert decode(encode(half, "PNG")).ravel().tolist() == [224, 204, 244]
    keyed = encode(PHOTO, "PNG", transparency=tuple(PHOTO[0, 0].tolist()))  # RGB with one colour that means nothing
    assert decode(keyed)[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_images_are_turned_upright(format, orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if format == "WEBP" else {}
    path = tmp_path / "image"
    path.write_bytes(encode(PHOTO, format, exif=exif, **options))
    with Image.open(path) as image:
        expected = np.array(ImageOps.exif_transpose(image).convert("RGB"))
    assert_close(decode(path), expected, 0)
    assert {1} | UPRIGHT.keys() == set(range(1, 9))


@pytest.mark.parametrize("orientation", [0, 9, 65535, None])
def test_broken_exif_leaves_an_image_as_it_is(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    broken = b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\xff\xff\x01"
    content = encode(PHOTO, "JPEG", exif=broken if orientation is None else exif)
    assert_close(decode(content), PHOTO, 3)


@pytest.mark.parametrize("num_channels", [1, 3])
@pytest.mark.parametrize("reduction", [1, 2, 4, 8])
@pytest.mark.parametrize("size", [(45, 60), (64, 128), (9, 11)])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpegs_are_decoded_at_a_fraction_of_their_size(size, reduction, num_channels, mode):
    content = encode(Image.fromarray(photo(*size)).convert(mode), "JPEG", quality=95)
    pixels = decode(content, num_channels, reduction)
    assert pixels.shape == (-(-size[0] // reduction), -(-size[1] // reduction), num_channels)
    if size == (64, 128):
        full = Image.fromarray(decode(content, num_channels).squeeze())
        expected = np.array(full.resize(pixels.shape[1::-1], Image.Resampling.BOX)).reshape(pixels.shape)
        assert_close(pixels, expected, 2)


@pytest.mark.parametrize(
    ("size", "format", "expected"),
    [
        ((45, 60), "JPEG", (1, 2, 4, 8)),
        ((45, 60), "MPO", (1, 2, 4, 8)),
        ((7, 60), "JPEG", (1, 2, 4)),
        ((60, 1), "JPEG", (1,)),
        ((45, 60), "PNG", (1,)),
    ],
)
def test_which_images_can_be_reduced(size, format, expected):
    opened = open_image(encode(photo(*size), format), 3)
    assert opened.reductions == expected
    for reduction in expected:
        assert opened.decode(reduction).shape == (-(-size[0] // reduction), -(-size[1] // reduction), 3)
    with pytest.raises(ValueError, match=r"a reduction of \(1,.*\), not 16"):
        opened.decode(16)


def test_decoding_again_gives_the_same():
    opened = open_image(encode(PHOTO, "JPEG"), 3)
    small, full, again = opened.decode(4), opened.decode(), opened.decode(4)
    assert full.shape == PHOTO.shape
    np.testing.assert_array_equal(small, again)


@pytest.mark.parametrize(("channels", "num_channels"), [(3, 3), (1, 1), (1, 3), (3, 1), (4, 3), (2, 1)])
def test_pixels_are_taken_as_they_are_or_converted(channels, num_channels):
    pixels = {1: GREY[..., None], 2: np.stack([GREY, np.full_like(GREY, 255)], 2), 3: PHOTO}.get(channels)
    if pixels is None:
        pixels = np.concatenate([PHOTO, np.full_like(PHOTO[..., :1], 255)], axis=2)
    expected = GREY[..., None] if num_channels == 1 else PHOTO if channels >= 3 else GREY[..., None].repeat(3, 2)
    np.testing.assert_array_equal(decode(pixels, num_channels), expected)


def test_pixels_of_another_kind():
    with pytest.raises(ValueError, match="uint8 pixels, not float64"):
        open_image(np.zeros((45, 60)), 3)


def test_large_images_up_to_the_limit(monkeypatch):
    side = int(MAX_PIXELS**0.5)
    with pytest.raises(UnreadableImage, match="pixels"):
        open_image(png_bomb(side + 1, side + 1), 3)
    # At the limit the header is accepted, without Pillow's warning; this body is too short.
    with pytest.raises(UnreadableImage, match="truncated"):
        decode(png_bomb(64, MAX_PIXELS // 64), 3)
    monkeypatch.setattr("dinov3_hf.data.decoding.MAX_PIXELS", 45 * 60)
    assert decode(encode(PHOTO, "PNG")).shape == (45, 60, 3)
    monkeypatch.setattr("dinov3_hf.data.decoding.MAX_PIXELS", 45 * 60 - 1)
    with pytest.raises(UnreadableImage, match="more than 2,699 pixels"):
        decode(encode(PHOTO, "PNG"))


def test_bombs_are_refused_before_memory_is_taken():
    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    before = peak()
    for content in (png_bomb(60_000, 60_000), png_bomb(13_000, 13_000), jpeg_bomb(12_000, 12_000)):
        with pytest.raises(UnreadableImage):
            open_image(content, 3)
    assert peak() - before < 100e6  # their pixels would take 400 MB and more


def test_a_large_image_that_is_no_bomb():
    content = large_png(9_500, 9_500)  # more than Pillow lets pass without a warning
    assert len(content) < 1e6
    assert decode(content, num_channels=1).shape == (9_500, 9_500, 1)


def test_formats_that_start_programs_are_refused():
    with pytest.raises(UnreadableImage, match="not an image in a known format"):
        open_image(encode(PHOTO, "EPS"), 3)


def test_parsers_may_fail_in_any_way():
    # A text chunk that unpacks to more than Pillow allows raises ValueError inside its PNG parser.
    text = b"comment\x00\x00" + zlib.compress(bytes(100_000_000))
    with pytest.raises(UnreadableImage, match="ValueError"):
        decode(png_header(45, 60) + png_chunk(b"zTXt", text))
