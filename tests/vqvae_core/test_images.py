import io

import numpy as np
import pytest
import torch
from PIL import Image

from vqvae_core import images
from vqvae_core.images import (
    FILE_FORMATS,
    ImageError,
    decode,
    encode,
    grid,
    images_to_pixels,
    pixels_to_images,
    resize_and_crop,
)

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)


def shrunk(pixels: np.ndarray, size: int) -> np.ndarray:
    return np.asarray(resize_and_crop(Image.fromarray(np.ascontiguousarray(pixels)), size))


def test_pixels_and_images_are_each_others_reverse() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(1, 16, 16, 3)
    converted = pixels_to_images(pixels)
    assert converted.shape == (1, 3, 16, 16)
    assert converted.min() == -1.0
    assert converted.max() == 1.0
    assert torch.equal(images_to_pixels(converted), pixels)


@pytest.mark.parametrize("image_format", ["png", "webp"])
def test_lossless_formats(image_format: str) -> None:
    assert np.array_equal(decode(encode(PIXELS, image_format)), PIXELS)
    assert encode(PIXELS, image_format) == encode(PIXELS, image_format)


def test_jpeg_keeps_all_chroma() -> None:
    picture = Image.open(io.BytesIO(encode(PIXELS, "jpg")))
    assert [component[1:3] for component in picture.layer] == [(1, 1)] * 3


def test_crop_is_the_centre() -> None:
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = 200
    assert (shrunk(pixels, 10) == 200).all()
    assert (shrunk(pixels.transpose(1, 0, 2), 10) == 200).all()


def test_shrinking_averages() -> None:
    checks = np.indices((64, 64)).sum(0)[..., None].repeat(3, 2) % 2 * 255
    small = shrunk(checks.astype(np.uint8), 8)
    assert abs(small[2:-2, 2:-2].astype(int) - 127).max() < 20


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_other_modes_become_rgb(mode: str) -> None:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).convert(mode).save(buffer, "TIFF" if mode == "CMYK" else "PNG")
    assert decode(buffer.getvalue()).shape == (12, 20, 3)


def test_exif_rotation_is_applied() -> None:
    picture = Image.fromarray(PIXELS)
    exif = picture.getexif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", exif=exif)
    assert decode(buffer.getvalue()).shape == (20, 12, 3)


@pytest.mark.parametrize("data", [b"", b"text", encode(PIXELS, "jpg")[:200], encode(PIXELS, "png")[:100]])
def test_broken_bytes(data: bytes) -> None:
    with pytest.raises(ImageError, match="cannot be decoded"):
        decode(data)


def test_a_bomb_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 200)
    with pytest.raises(ImageError, match="too large: 20 x 12 is more than 200 pixels"):
        decode(encode(PIXELS, "png"))


def test_grid() -> None:
    sheet = grid(np.zeros((3, 4, 4, 3), np.uint8), 2, scale=2, gap=1)
    assert sheet.shape == (17, 17, 3)
    assert (sheet[9:, 9:] == 255).all()
    assert (sheet[:8, :8] == 0).all()


@pytest.mark.parametrize("kind", FILE_FORMATS)
def test_every_format_is_read(kind: str) -> None:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, kind)
    assert decode(buffer.getvalue()).shape == PIXELS.shape
    with pytest.raises(ImageError, match="cannot be decoded: UnidentifiedImageError"):
        decode(b"text")
