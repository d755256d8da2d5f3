"""A zoo of image files that give trouble: one of each kind, to be put into folders of good ones.

`save_unreadable` writes files that nothing can be made of, `save_convertible` odd ones that are images all the same.
"""

import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

# Names of what `save_unreadable` writes, and the reason (a part of it) that a report gives.
UNREADABLE = {
    "corrupt.jpg": "",
    "corrupt.png": "broken data stream",
    "truncated.jpg": "truncated",
    "truncated.png": "truncated",
    "corrupt.tif": "-2",
    "empty.jpg": "the file is empty",
    "text.jpg": "not an image in a known format",
    "header_only.jpg": "",
    "bomb.png": "more than 134,217,728 pixels",
    "bomb.jpg": "more than 134,217,728 pixels",
}


def photo(height: int = 45, width: int = 60, seed: int = 0) -> np.ndarray:
    """Smooth colours that survive JPEG, different in every corner: uint8 (height, width, 3)."""
    corners = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    return np.array(Image.fromarray(corners).resize((width, height), Image.Resampling.BICUBIC))


def encode(image: Image.Image | np.ndarray, format: str, **options) -> bytes:
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    buffer = BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(height: int, width: int, colour_type: int = 2) -> bytes:
    """The start of an 8-bit PNG that claims to be as large; colour type 2 is RGB, 0 grey."""
    fields = struct.pack(">IIBBBBB", width, height, 8, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", fields)


def png_bomb(height: int, width: int) -> bytes:
    """A small file whose header promises `height` x `width` RGB pixels."""
    return png_header(height, width) + png_chunk(b"IDAT", zlib.compress(bytes(1000))) + png_chunk(b"IEND", b"")


def jpeg_bomb(height: int, width: int) -> bytes:
    """A small JPEG whose header was changed to promise `height` x `width` pixels."""
    jpeg = bytearray(encode(photo(), "JPEG"))
    size_at = jpeg.index(b"\xff\xc0") + 5  # behind marker, length and precision of the frame header
    jpeg[size_at : size_at + 4] = struct.pack(">HH", height, width)
    return bytes(jpeg)


def large_png(height: int, width: int) -> bytes:
    """A small file that decodes to `height` x `width` grey pixels, all black: legal as long as they are few enough."""
    body = zlib.compress(bytes((1 + width) * height), 1)  # one byte for the filter of each row
    return png_header(height, width, colour_type=0) + png_chunk(b"IDAT", body) + png_chunk(b"IEND", b"")


def ycck_jpeg(image: Image.Image) -> bytes:
    """An RGB image as Adobe's programs write CMYK: inverted, and turned into luma, chroma and black."""
    inverted = Image.fromarray(255 - np.asarray(image)).convert("YCbCr")
    black = Image.new("L", image.size, 255)
    # Pillow inverts the planes and calls them CMYK; the last byte of Adobe's marker says what they are.
    planes = [Image.fromarray(255 - np.asarray(plane)) for plane in (*inverted.split(), black)]
    jpeg = bytearray(encode(Image.merge("CMYK", planes), "JPEG", quality=95))
    jpeg[jpeg.index(b"Adobe") + 11] = 2
    return bytes(jpeg)


def unreadable_contents() -> dict[str, bytes]:
    """Encoded images by the names of `UNREADABLE`."""
    jpeg, png = encode(photo(), "JPEG"), encode(photo(), "PNG")
    tiff = encode(photo(), "TIFF", compression="tiff_lzw")
    scan = jpeg.index(b"\xff\xda")
    idat = png.index(b"IDAT")
    return {
        "corrupt.jpg": jpeg[:20] + bytes(range(200)) + jpeg[220:],
        "corrupt.png": png[: idat + 8] + b"\xff" * 40 + png[idat + 48 :],
        "truncated.jpg": jpeg[: (scan + len(jpeg)) // 2],
        "truncated.png": png[: (idat + len(png)) // 2],
        "corrupt.tif": tiff[:200] + b"\xff" * 200 + tiff[400:],
        "empty.jpg": b"",
        "text.jpg": b"<html>404 Not Found</html>\n",
        "header_only.jpg": jpeg[:scan],
        "bomb.png": png_bomb(60_000, 60_000),
        "bomb.jpg": jpeg_bomb(12_000, 12_000),
    }


def convertible_contents() -> dict[str, bytes]:
    """Encoded images that look like `photo()`, or like its grey version, in unusual ways."""
    image = Image.fromarray(photo())
    grey = np.array(image.convert("L"))
    transparent = image.copy()
    transparent.putalpha(Image.fromarray(np.where(np.arange(60) < 30, 255, 0).astype(np.uint8)[None].repeat(45, 0)))
    rotated = Image.Exif()
    rotated[0x0112] = 6
    frames = [image, Image.fromarray(photo(seed=1))]
    return {
        "cmyk.jpg": encode(image.convert("CMYK"), "JPEG"),
        "ycck.jpg": ycck_jpeg(image),
        "grey.jpg": encode(grey, "JPEG"),
        "progressive.jpg": encode(image, "JPEG", progressive=True),
        "rotated.jpg": encode(image.transpose(Image.Transpose.ROTATE_90), "JPEG", exif=rotated),
        "deep.png": encode(grey.astype(np.uint16) * 257, "PNG"),
        "deep.tif": encode(grey.astype(np.uint16) * 257, "TIFF"),
        "float.tif": encode(grey.astype(np.float32) / 255, "TIFF"),
        "palette.png": encode(image.quantize(256), "PNG"),
        "transparent_palette.png": encode(image.quantize(256), "PNG", transparency=0),
        "transparent.png": encode(transparent, "PNG"),
        "transparent_grey.png": encode(transparent.convert("LA"), "PNG"),
        "bilevel.png": encode(image.convert("1"), "PNG"),
        "animated.gif": encode(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "animated.webp": encode(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True),
        "animated.png": encode(frames[0], "PNG", save_all=True, append_images=frames[1:]),
        "pair.mpo.jpg": encode(frames[0], "MPO", save_all=True, append_images=frames[1:]),
    }


def save_unreadable(folder: Path) -> list[Path]:
    """Write one file of each unreadable kind into `folder`; return their paths."""
    return _save(folder, unreadable_contents())


def save_convertible(folder: Path) -> list[Path]:
    """Write one file of each odd but readable kind into `folder`; return their paths."""
    return _save(folder, convertible_contents())


def _save(folder: Path, contents: dict[str, bytes]) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    for name, encoded in contents.items():
        (folder / name).write_bytes(encoded)
    return [folder / name for name in contents]
