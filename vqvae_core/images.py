"""Pixels (uint8 HWC in [0, 255]), images (float32 CHW in [-1, 1]) and encoded files: the only conversions."""

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from vqvae_core.decoding import ImageFormat
from vqvae_core.shapes import Float, UInt8


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


def images_on(device: str | torch.device, dtype: torch.dtype, pixels: Tensor) -> Tensor:
    """Images (B, 3, H, W) of pixels, uint8 (B, H, W, 3), where and as a model takes them, channels last."""
    return pixels_to_images(pixels.to(device)).to(dtype).contiguous(memory_format=torch.channels_last)


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
