"""Images of any origin to 8-bit pixels: what can be converted is converted, the rest is refused with a reason.

Letters: H, W height and width of an image; C channels, 3 for RGB or 1 for grey.
"""

import ctypes
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

Content = bytes | Path | np.ndarray  # an encoded image, a file that holds one, or pixels uint8 (H, W, C)

MODES = {1: "L", 3: "RGB"}  # by number of channels
# Others are refused: Pillow would hand some of them (EPS) to programs of the system.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
MAX_PIXELS = 2**27  # 134 million, 400 MB of RGB: room for any camera, not for a decompression bomb
JPEG_REDUCTIONS = (1, 2, 4, 8)  # what the decoder offers among others, as Pillow uses it
EXIF_ORIENTATION = 0x0112
UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: np.rot90,
}

# What Pillow logs about a broken file would be printed in programs that have not set up their logging.
logging.getLogger("PIL").addHandler(logging.NullHandler())


class UnreadableImage(ValueError):
    """An image cannot be read. The message says why in a few words; whoever asked for the image knows its name."""


@dataclass(frozen=True)
class OpenedImage:
    """An image whose size is known and whose pixels are decoded on demand.

    Args:
        height: H, of the image turned upright.
        width: W, of the image turned upright.
        reductions: by which it can be decoded smaller: 1, 2, 4 and 8 for a JPEG, as its sides allow, else 1.
        decoder: reduction -> pixels, see `decode`.
    """

    height: int
    width: int
    reductions: tuple[int, ...]
    decoder: Callable[[int], np.ndarray]

    def decode(self, reduction: int = 1) -> np.ndarray:
        """Return the pixels, uint8 (ceil(H / reduction), ceil(W / reduction), C), for one of `reductions`.

        Raises:
            UnreadableImage: corrupt or truncated.
        """
        if reduction not in self.reductions:
            raise ValueError(f"this image can be decoded with a reduction of {self.reductions}, not {reduction}.")
        return self.decoder(reduction)


def open_image(content: Content, num_channels: int) -> OpenedImage:
    """Open an image and convert it to 3 (RGB) or 1 (grey) channels of 8 bits.

    Integers of 16 bits are scaled from their full range, longer integers and floats from their smallest to their
    largest value. Transparent images are laid on white, animations give their first frame, EXIF rotations are undone.

    Raises:
        UnreadableImage: empty, corrupt or truncated, not an image, or more than 134 million pixels.
    """
    if isinstance(content, np.ndarray):
        return opened_pixels(_with_channels(content, num_channels))
    mode = MODES[num_channels]
    with _reasons():
        encoded = content.read_bytes() if isinstance(content, Path) else content
        if not encoded:
            raise UnreadableImage("the file is empty")
        image = _open(encoded)
        if image.format not in ("JPEG", "MPO"):  # nothing to gain by waiting: these decode at full size only
            return opened_pixels(_pixels(image, mode))
        height, width = image.height, image.width
        if _orientation(image) >= 5:  # a quarter turn
            height, width = width, height
    reductions = tuple(reduction for reduction in JPEG_REDUCTIONS if reduction <= min(height, width))
    return OpenedImage(height, width, reductions, lambda reduction: _decode_jpeg(encoded, mode, reduction))


def opened_pixels(pixels: np.ndarray) -> OpenedImage:
    """Return decoded `pixels`, uint8 (H, W[, C]), as an opened image."""
    if pixels.dtype != np.uint8:
        raise ValueError(f"an image must have uint8 pixels, not {pixels.dtype}; convert it to RGB or L first.")
    pixels = np.require(pixels[:, :, None] if pixels.ndim == 2 else pixels, requirements=["C", "W"])
    height, width = pixels.shape[:2]
    return OpenedImage(height, width, (1,), lambda reduction: pixels)


def _with_channels(pixels: np.ndarray, num_channels: int) -> np.ndarray:
    if pixels.dtype != np.uint8 or pixels.shape[2:] == (num_channels,):
        return pixels
    with _reasons():
        image = Image.fromarray(pixels.squeeze(2) if pixels.shape[2:] == (1,) else pixels)
        return _pixels(image, MODES[num_channels])


@contextmanager
def _reasons() -> Iterator[None]:
    """Raise whatever goes wrong inside as `UnreadableImage`, and keep Pillow's warnings from the terminal."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except UnreadableImage:
            raise
        except UnidentifiedImageError as error:
            raise UnreadableImage(f"not an image in a known format ({' '.join(FORMATS)})") from error
        except Image.DecompressionBombError as error:
            raise UnreadableImage(_too_large()) from error
        except OSError as error:
            raise UnreadableImage(error.strerror or _one_line(error)) from error
        except Exception as error:  # on broken files Pillow's parsers raise nearly anything
            raise UnreadableImage(f"{type(error).__name__}: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _too_large() -> str:
    return f"more than {MAX_PIXELS:,} pixels"


def _open(encoded: bytes) -> Image.Image:
    image = Image.open(BytesIO(encoded), formats=FORMATS)  # reads the header only
    if image.format == "TIFF":
        _silence_libtiff()
    if 0 in image.size:
        raise UnreadableImage("no pixels")
    if image.width * image.height > MAX_PIXELS:
        raise UnreadableImage(_too_large())
    return image


@cache
def _silence_libtiff() -> None:
    """Keep libtiff from printing what is wrong with a file, which it does not name; Pillow raises an error anyway."""
    with suppress(AttributeError):  # a build of Pillow that hides the library's functions
        ctypes.CDLL(Image.core.__file__).TIFFSetErrorHandler(None)


def _decode_jpeg(encoded: bytes, mode: str, reduction: int) -> np.ndarray:
    with _reasons():
        image = _open(encoded)
        # Takes the largest of the decoder's scales that leaves at least this size.
        image.draft(mode, (max(1, image.width // reduction), max(1, image.height // reduction)))
        return _pixels(image, mode)


def _pixels(image: Image.Image, mode: str) -> np.ndarray:
    """Decode `image` and return its pixels in `mode`, upright: uint8 (H, W, C)."""
    image.load()
    pixels = np.array(_converted(image, mode)).reshape(image.height, image.width, len(mode))
    turn = UPRIGHT.get(_orientation(image))
    return pixels if turn is None else np.ascontiguousarray(turn(pixels))


def _orientation(image: Image.Image) -> int:
    try:
        orientation: int = image.getexif().get(EXIF_ORIENTATION, 1)
        return orientation if orientation in UPRIGHT else 1
    except Exception:  # broken EXIF data of an image that is fine
        return 1


def _converted(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bits(image)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image if image.mode == mode else image.convert(mode)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale a grey image of 16-bit or 32-bit integers or of floats to mode L."""
    values = np.asarray(image).astype(np.float32)
    finite = np.isfinite(values)
    if not finite.any():
        raise UnreadableImage("no finite values")
    low, high = float(values.min(where=finite, initial=np.inf)), float(values.max(where=finite, initial=-np.inf))
    if image.mode != "F" and low >= 0 and high <= 65535:
        low, high = 0.0, 65535.0  # 16 bits; some versions of Pillow open them with 32
    values = np.nan_to_num((values - low) * (255 / ((high - low) or 1.0)))
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8))
