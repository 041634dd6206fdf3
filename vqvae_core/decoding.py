"""Encoded files to pixels (uint8 HWC in [0, 255]), without torch: what reads many of them starts quickly."""

import contextlib
import io
import struct
import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import ExifTags, Image, ImageOps

from vqvae_core.errors import InputError

try:
    import simplejpeg
except ImportError:  # where only the core is installed
    simplejpeg = None

ImageFormat = Literal["png", "webp", "jpg"]
IMAGE_FORMATS: tuple[ImageFormat, ...] = ("png", "webp", "jpg")
FILE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
_JPEG = 0xFF  # the first byte
_APP1, _APP2, _START_OF_PIXELS = 0xE1, 0xE2, 0xDA
_TURNS = (b"\x01\x12", b"\x12\x01", b"Orientation")  # the tag in EXIF of both byte orders, and in XMP
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # markers of JPEG, with the picture's size
_MODES = {1: "L", 3: "RGB"}  # of a JPEG, by its channels
_BROKEN_EXIF = (SyntaxError, ValueError, TypeError, KeyError, OSError, struct.error)
MAX_PIXELS = 100_000_000  # a larger picture is refused before its pixels are decoded


class ImageError(InputError):
    """Bytes that are no image, or one that cannot be used. The message is the reason in the list of rejects: a kind,
    by which rejects are counted, and after a colon what is particular to this one."""


@dataclass(frozen=True)
class Picture:
    """A decoded image, upright and in RGB: pixels (H, W, 3), uint8. What its file was: width and height as stored,
    format and mode."""

    pixels: np.ndarray
    width: int
    height: int
    file_format: str
    mode: str


def load(data: bytes) -> Picture:
    """Decode a file of one of FILE_FORMATS. Raises `ImageError`.

    Grey, palette, CMYK and 16-bit pictures become RGB of 8 bits; transparency is left out; EXIF orientation is applied;
    colour profiles are not. A file with more than one frame is refused, but for a photograph with a preview (MPO).
    """
    plain = _plain_jpeg(data)
    if plain is not None and 0 < plain[0] * plain[1] <= MAX_PIXELS:
        width, height, mode = plain
        pixels = _jpeg_pixels(data, width, height)
        if pixels is not None:
            return Picture(pixels, width, height, "JPEG", mode)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Only these: some others of the library start programs.
            picture = Image.open(io.BytesIO(data), formats=FILE_FORMATS)
            width, height, mode, kind = picture.width, picture.height, picture.mode, str(picture.format)
            if width * height > MAX_PIXELS:
                raise ImageError(f"too large: {width} x {height} is more than {MAX_PIXELS} pixels")
            if kind != "MPO" and getattr(picture, "is_animated", False):
                raise ImageError("animated: has more than one frame")
            pixels = None
            if (kind, mode) == ("JPEG", "RGB") and not _is_turned(picture):
                pixels = _jpeg_pixels(data, width, height)
            if pixels is None:
                picture.load()
                with contextlib.suppress(*_BROKEN_EXIF):
                    ImageOps.exif_transpose(picture, in_place=True)
                pixels = np.asarray(_to_rgb(picture))
            return Picture(pixels, width, height, kind, mode)
    except ImageError:
        raise
    except MemoryError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(f"too large: {error}") from error
    except Exception as error:  # decoders raise whatever they like on broken bytes
        raise ImageError(f"cannot be decoded: {type(error).__name__}") from error


def _plain_jpeg(data: bytes) -> tuple[int, int, str] | None:
    """Width, height and mode of a JPEG in colour or grey, where nothing before its pixels could turn it (EXIF,
    XMP) or hold a second picture (MPF). Nothing else is looked at: what is broken, the decoder finds."""
    if data[:2] != b"\xff\xd8":
        return None
    found, position, app1 = None, 2, False
    try:
        while data[position] == 0xFF and (marker := data[position + 1]) != _START_OF_PIXELS:
            stop = position + 2 + int.from_bytes(data[position + 2 : position + 4])
            if marker == _APP1:
                if app1 or any(data.find(sign, position, stop) >= 0 for sign in _TURNS):
                    return None  # more than one may be parts of one whole
                app1 = True
            if marker == _APP2 and data[position + 4 : position + 7] == b"MPF":
                return None
            if marker in _FRAMES:
                height, width, channels = struct.unpack_from(">HHB", data, position + 5)
                if channels not in _MODES:
                    return None
                found = width, height, _MODES[channels]
            position = stop
        return found if data[position] == 0xFF else None
    except (IndexError, struct.error):
        return None


def _is_turned(picture: Image.Image) -> bool:
    """Broken EXIF turns nothing."""
    with contextlib.suppress(*_BROKEN_EXIF):
        return picture.getexif().get(ExifTags.Base.Orientation, 1) != 1
    return False


def _jpeg_pixels(data: bytes, width: int, height: int) -> np.ndarray | None:
    """What Pillow would make of it, sooner. None where it is not well formed: then Pillow has the last word."""
    if simplejpeg is None:
        return None
    try:
        pixels = simplejpeg.decode_jpeg(data)
    except ValueError:
        return None
    return pixels if pixels.shape == (height, width, 3) else None


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == "RGB":
        return picture
    if picture.mode.startswith("I"):  # 16 bits; the library would clip them
        values = np.asarray(picture)
        if values.min() < 0 or values.max() > 65535:
            raise ImageError("cannot be used: has pixels of more than 16 bits")
        picture = Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))
    if picture.mode == "F":
        raise ImageError("cannot be used: has pixels in floating point")
    return picture.convert("RGB")


def decode(data: bytes) -> np.ndarray:
    """Pixels (H, W, 3) of an encoded image: see `load`."""
    return load(data).pixels


def jpeg_into(data: memoryview, place: np.ndarray) -> tuple[int, ...] | None:
    """Decode a JPEG into place, uint8 (N,), without a copy of either. The shape of its pixels, None where it is no such
    image or larger: then `decode` has the last word."""
    if simplejpeg is None or not data or data[0] != _JPEG:
        return None
    try:
        return simplejpeg.decode_jpeg(data, buffer=place).shape
    except ValueError:
        return None


def decode_plain(data: bytes, scratch: np.ndarray) -> np.ndarray | None:
    """Pixels (H, W, 3), perhaps in scratch, of a JPEG or PNG with nothing beside its pixels, as shards hold them. None
    where it is something else, or larger than scratch: then `decode` has the last word."""
    try:
        if data[:2] == b"\xff\xd8":
            return simplejpeg.decode_jpeg(data, buffer=scratch) if simplejpeg is not None else None
        picture = Image.open(io.BytesIO(data), formats=("PNG",))
        if picture.mode != "RGB" or picture.info or picture.width * picture.height > MAX_PIXELS:
            return None
        return np.asarray(picture)
    except Exception:  # decoders raise whatever they like on broken bytes
        return None
