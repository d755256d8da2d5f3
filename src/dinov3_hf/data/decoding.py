"""Images of any origin to 8-bit pixels: what can be converted is converted, the rest is refused with a reason.

Letters: H, W height and width of an image; C channels: 3 for RGB, 1 for grey, or as many as the images have.
"""

import ctypes
import logging
import math
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

MODES = {1: "L", 3: "RGB"}  # by number of channels; what has another number is converted to it
# Others are refused: Pillow would hand some of them (EPS) to programs of the system.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
ARRAY_START = b"\x93NUMPY"  # of a .npy file
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
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

# What libraries log about a broken file would be printed in programs that have not set up their logging.
logging.getLogger("PIL").addHandler(logging.NullHandler())
logging.getLogger("tifffile").addHandler(logging.NullHandler())


class UnreadableImage(ValueError):
    """An image cannot be read. The message says why in a few words; whoever asked for the image knows its name."""


class UnsuitableImage(UnreadableImage):
    """An image is whole, and cannot be read as it is asked for; the others of its source are probably like it."""


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
    """Open an image as 8-bit pixels of 3 (RGB) or 1 (grey) channels, or of the number that it has.

    To 3 and 1 channels images are converted, transparent ones are laid on white. With another `num_channels` they must
    have as many, which are taken as they are. Integers of 16 bits are scaled from their full range, longer ones and
    floats from their smallest to their largest value. Animations give their first frame, EXIF rotations are undone.
    Arrays (.npy) and TIFF files of several bands may have their channels last or first.

    Raises:
        UnreadableImage: empty, corrupt or truncated, not an image, or more than 134 million pixels.
        UnsuitableImage: another number of channels, or a TIFF file for which a package is missing.
    """
    if isinstance(content, np.ndarray):
        return opened_pixels(_with_channels(content, num_channels))
    with _reasons():
        encoded = content.read_bytes() if isinstance(content, Path) else content
        if not encoded:
            raise UnreadableImage("the file is empty")
        values = _array(encoded, num_channels)
        if values is not None:
            return opened_pixels(_with_channels(_eight_bits(values), num_channels))
        image = _open(encoded)
        if image.format not in ("JPEG", "MPO"):  # nothing to gain by waiting: these decode at full size only
            return opened_pixels(_pixels(image, num_channels))
        _check_bands(image, num_channels)
        height, width = image.height, image.width
        if _orientation(image) >= 5:  # a quarter turn
            height, width = width, height
    reductions = tuple(reduction for reduction in JPEG_REDUCTIONS if reduction <= min(height, width))
    return OpenedImage(height, width, reductions, lambda reduction: _decode_jpeg(encoded, num_channels, reduction))


def opened_pixels(pixels: np.ndarray) -> OpenedImage:
    """Return decoded `pixels`, uint8 (H, W[, C]), as an opened image."""
    if pixels.dtype != np.uint8:
        raise ValueError(f"an image must have uint8 pixels, not {pixels.dtype}; scale it to 8 bits first.")
    pixels = np.require(pixels[:, :, None] if pixels.ndim == 2 else pixels, requirements=["C", "W"])
    height, width = pixels.shape[:2]
    return OpenedImage(height, width, (1,), lambda reduction: pixels)


def encoded_array(values: np.ndarray) -> bytes:
    """Return an array as a .npy file, one of the contents that `open_image` takes."""
    buffer = BytesIO()
    np.save(buffer, values, allow_pickle=False)
    return buffer.getvalue()


def _with_channels(pixels: np.ndarray, num_channels: int) -> np.ndarray:
    pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels
    if pixels.dtype != np.uint8 or pixels.shape[2:] == (num_channels,):
        return pixels
    if num_channels not in MODES or pixels.ndim != 3 or not 1 <= pixels.shape[2] <= 4:
        raise _unsuitable(pixels, num_channels)
    with _reasons():
        return _pixels(Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels), num_channels)


def _unsuitable(values: np.ndarray, num_channels: int) -> UnsuitableImage:
    shape = " x ".join(map(str, values.shape))
    return UnsuitableImage(f"its shape is {shape}, not height x width x {num_channels}")


def _array(encoded: bytes, num_channels: int) -> np.ndarray | None:
    """The values of a .npy or TIFF file, (H, W) or (H, W, channels); None for files that Pillow is to read."""
    if encoded.startswith(ARRAY_START):
        values: np.ndarray = np.load(BytesIO(encoded), allow_pickle=False)
    elif encoded.startswith(TIFF_STARTS) and not (num_channels in MODES and _is_known(encoded)):
        values = _tiff_values(encoded)
    else:
        return None
    while values.ndim > 3 and values.shape[0] == 1:
        values = values[0]
    if values.ndim == 3 and values.shape[0] == num_channels != values.shape[2]:
        values = np.moveaxis(values, 0, 2)
    if values.size == 0:
        raise UnreadableImage("no pixels")
    # Of files like these a fourth channel is another band, not transparency.
    if num_channels in MODES and values.ndim == 3 and values.shape[2] not in MODES:
        raise _unsuitable(values, num_channels)
    return values


def _is_known(encoded: bytes) -> bool:
    """Whether Pillow knows what kind of image it is."""
    try:
        Image.open(BytesIO(encoded), formats=FORMATS)
    except UnidentifiedImageError:
        return False
    return True


def _tiff_values(encoded: bytes) -> np.ndarray:
    """All bands of a TIFF file, whether they are samples of one page or pages of their own."""
    try:
        import tifffile
    except ImportError as error:
        raise UnsuitableImage("TIFF files of several bands need tifffile: pip install 'dinov3-hf[tiff]'") from error
    with tifffile.TiffFile(BytesIO(encoded)) as file:
        if math.prod(file.series[0].shape) > 3 * MAX_PIXELS:
            raise UnreadableImage(f"more than {3 * MAX_PIXELS:,} values")
        return file.series[0].asarray()


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


def _decode_jpeg(encoded: bytes, num_channels: int, reduction: int) -> np.ndarray:
    with _reasons():
        image = _open(encoded)
        # Takes the largest of the decoder's scales that leaves at least this size.
        image.draft(MODES.get(num_channels), (max(1, image.width // reduction), max(1, image.height // reduction)))
        return _pixels(image, num_channels)


def _check_bands(image: Image.Image, num_channels: int) -> None:
    found = len(image.getbands())
    if num_channels not in MODES and found != num_channels:
        raise UnsuitableImage(f"it has {found} channel{'s' if found > 1 else ''}, not {num_channels}")


def _pixels(image: Image.Image, num_channels: int) -> np.ndarray:
    """Decode `image` and return its pixels, upright: uint8 (H, W, C)."""
    _check_bands(image, num_channels)
    image.load()
    orientation = _orientation(image)
    if num_channels in MODES:
        image = _converted(image, MODES[num_channels])
    pixels = np.array(image).reshape(image.height, image.width, num_channels)
    turn = UPRIGHT.get(orientation)
    return pixels if turn is None else np.ascontiguousarray(turn(pixels))


def _orientation(image: Image.Image) -> int:
    try:
        orientation: int = image.getexif().get(EXIF_ORIENTATION, 1)
        return orientation if orientation in UPRIGHT else 1
    except Exception:  # broken EXIF data of an image that is fine
        return 1


def _converted(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(_eight_bits(np.asarray(image)))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image if image.mode == mode else image.convert(mode)


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """Scale 16-bit or 32-bit integers or floats to uint8."""
    if values.dtype == np.uint8:
        return values
    if values.dtype.kind not in "biuf":
        raise UnreadableImage(f"its values are {values.dtype}, not numbers")
    scaled = values.astype(np.float32)
    finite = np.isfinite(scaled)
    if not finite.any():
        raise UnreadableImage("no finite values")
    low, high = float(scaled.min(where=finite, initial=np.inf)), float(scaled.max(where=finite, initial=-np.inf))
    if values.dtype.kind in "iu" and low >= 0 and high <= 65535:
        low, high = 0.0, 65535.0  # 16 bits; some versions of Pillow open them with 32
    scaled = np.nan_to_num((scaled - low) * (255 / ((high - low) or 1.0)))
    return scaled.round().clip(0, 255).astype(np.uint8)
