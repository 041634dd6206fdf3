"""Pixels (uint8 HWC in [0, 255]), images (float32 CHW in [-1, 1]) and encoded files: the only conversions."""

import contextlib
import io
import struct
import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torch.nn import functional

from vqvae_core.errors import InputError
from vqvae_core.shapes import Float, UInt8

try:
    import simplejpeg
except ImportError:  # where only the core is installed
    simplejpeg = None

ImageFormat = Literal["png", "webp", "jpg"]
IMAGE_FORMATS: tuple[ImageFormat, ...] = ("png", "webp", "jpg")
FILE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
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


def resize_and_crop(pixels: np.ndarray, size: int) -> np.ndarray:
    """The centre square of pixels (H, W, 3) at (size, size, 3): its shorter side is scaled to `size` (bicubic,
    antialiased)."""
    height, width = pixels.shape[:2]
    if (height, width) == (size, size):
        return pixels
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = pixels[top : top + side, left : left + side]
    # Torch's kernel is several times faster than Pillow's, and computes in whole numbers: the same with and without
    # vector instructions.
    planes = torch.from_numpy(square if square.flags.writeable else square.copy()).unsqueeze(0).permute(0, 3, 1, 2)
    small = functional.interpolate(planes, (size, size), mode="bicubic", antialias=True)
    return np.ascontiguousarray(small.numpy()[0].transpose(1, 2, 0))


def encode(image: Image.Image | np.ndarray, image_format: ImageFormat) -> bytes:
    """Encode an RGB image or pixels (H, W, 3): PNG, WebP without loss; JPEG at quality 95, chroma not subsampled."""
    buffer = io.BytesIO()
    picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    if image_format == "png":
        picture.save(buffer, "PNG", compress_level=3)
    elif image_format == "webp":
        picture.save(buffer, "WEBP", lossless=True, quality=50, method=0, exact=True)
    else:
        picture.save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def pixels_to_images(pixels: UInt8[Tensor, "*b h w 3"]) -> Float[Tensor, "*b 3 h w"]:
    """uint8 (..., H, W, 3) to float32 (..., 3, H, W) in [-1, 1]."""
    return pixels.movedim(-1, -3).to(torch.float32).div(127.5).sub(1.0)


def images_to_pixels(images: Float[Tensor, "*b 3 h w"]) -> UInt8[Tensor, "*b h w 3"]:
    """float (..., 3, H, W) in [-1, 1], clamped and rounded, to uint8 (..., H, W, 3)."""
    return images.to(torch.float32).add(1.0).mul(127.5).round().clamp(0, 255).to(torch.uint8).movedim(-3, -1)


def grid(pictures: np.ndarray, columns: int, *, scale: int = 1, gap: int = 2) -> np.ndarray:
    """Pictures (N, H, W, 3) in rows of `columns`, enlarged `scale` times without smoothing, on a white ground."""
    pictures = pictures.repeat(scale, axis=1).repeat(scale, axis=2)
    count, height, width, _ = pictures.shape
    rows = -(-count // columns)
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for number, picture in enumerate(pictures):
        top, left = number // columns * (height + gap), number % columns * (width + gap)
        sheet[top : top + height, left : left + width] = picture
    return sheet
