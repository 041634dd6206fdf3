"""Pixels (uint8 HWC in [0, 255]), images (float32 CHW in [-1, 1]) and encoded files: the only conversions."""

import io
import warnings
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from vqvae_core.errors import InputError
from vqvae_core.shapes import Float, UInt8

ImageFormat = Literal["png", "webp", "jpg"]
IMAGE_FORMATS: tuple[ImageFormat, ...] = ("png", "webp", "jpg")
MAX_PIXELS = 100_000_000  # a larger picture is refused before its pixels are decoded


class ImageError(InputError):
    """Bytes that are no image, or one that cannot be used. The message is the reason in the list of rejects."""


def decode(data: bytes) -> np.ndarray:
    """Pixels (H, W, 3) of an encoded image, upright (EXIF) and in RGB. Raises `ImageError`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            picture = Image.open(io.BytesIO(data))
            if picture.width * picture.height > MAX_PIXELS:
                raise ImageError(f"larger than {MAX_PIXELS} pixels: {picture.width} x {picture.height}")
            picture.load()
            picture = ImageOps.exif_transpose(picture)
            return np.asarray(picture if picture.mode == "RGB" else picture.convert("RGB"))
    except ImageError:
        raise
    except Exception as error:  # decoders raise whatever they like on broken bytes
        raise ImageError(f"cannot be decoded: {type(error).__name__}") from error


def resize_and_crop(pixels: np.ndarray, size: int) -> np.ndarray:
    """The centre square of an image at size x size: the shorter side is scaled to `size` (bicubic, antialiased)."""
    height, width = pixels.shape[:2]
    if (height, width) == (size, size):
        return pixels
    side = min(height, width)
    left, top = (width - side) / 2, (height - side) / 2
    picture = Image.fromarray(pixels)
    box = (left, top, left + side, top + side)
    return np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC, box=box))


def encode(pixels: np.ndarray, image_format: ImageFormat) -> bytes:
    """Encode pixels (H, W, 3): PNG and WebP without loss, JPEG at quality 95 without chroma subsampling."""
    buffer = io.BytesIO()
    picture = Image.fromarray(pixels)
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
