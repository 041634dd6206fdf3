import hashlib
import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from vqvae_core import decoding
from vqvae_core.decoding import FILE_FORMATS, ImageError, decode, decode_plain
from vqvae_core.images import encode, grid, images_to_pixels, pixels_to_images, resize_and_crop

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)


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
    assert (resize_and_crop(pixels, 10) == 200).all()
    assert (resize_and_crop(pixels.transpose(1, 0, 2), 10) == 200).all()


def test_shrinking_averages() -> None:
    checks = np.indices((64, 64)).sum(0)[..., None].repeat(3, 2) % 2 * 255
    small = resize_and_crop(checks.astype(np.uint8), 8)
    assert abs(small[2:-2, 2:-2].astype(int) - 127).max() < 20


SIZES = "6f4b2058a2e060191115b1c0972b3fe7544aadcb627796c1f0e64e4114c886f3"


def sizes_hash() -> str:
    """Of pictures of many sizes, made smaller and larger."""
    rng, found = np.random.default_rng(0), hashlib.sha256()
    for height, width, size in [(2, 300, 64), (37, 41, 8), (90, 61, 84), (375, 500, 128), (511, 333, 32), (64, 65, 64)]:
        found.update(resize_and_crop(rng.integers(0, 256, (height, width, 3), dtype=np.uint8), size).tobytes())
    return found.hexdigest()


@pytest.mark.slow
def test_a_machine_without_vector_instructions_makes_the_same_pixels() -> None:
    command = "from tests.vqvae_core.test_images import sizes_hash; print(sizes_hash())"
    for capability in ("default", "avx2"):
        done = subprocess.run(
            [sys.executable, "-c", command],
            cwd=Path(__file__).parents[2],
            env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
            capture_output=True,
            text=True,
            check=True,
        )
        # Other pixels under the same recipe need a new VERSION of the shard stage.
        assert done.stdout.strip() == sizes_hash() == SIZES


def test_both_decoders_see_the_same_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The faster one is for upright, well-formed JPEGs; Pillow has CMYK and what may be turned, and decides on
    faults."""
    noise = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    picture, turned = Image.fromarray(noise).resize((165, 113)), Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    named = Image.Exif()
    named[ExifTags.Base.Make] = "camera"
    plain = [
        _saved(picture, quality=80, **options)
        for options in ({}, {"progressive": True}, {"subsampling": 0}, {"subsampling": 1}, {"keep_rgb": True},
                        {"restart_marker_blocks": 2}, {"comment": "words"}, {"icc_profile": b"profile"})
    ]  # fmt: skip
    plain += [plain[0] + b"more", _saved(picture.resize((40, 1))), _saved(picture.resize((1, 40)))]
    plain += [_saved(picture, exif=b"Exif\0\0broken"), _saved(picture, exif=named), _saved(picture.convert("L"))]
    plain += [_saved(picture, xmp=b'<x:xmpmeta xmlns:x="adobe:ns:meta/"/>')]
    others = [_saved(picture.convert("CMYK")), _saved(picture, exif=turned)]
    turned.endian = ">"
    others += [_saved(picture, exif=turned), _in_two_segments(turned.tobytes(), plain[0])]
    others += [_saved(picture, xmp=b'<x:xmpmeta xmlns:x="adobe:ns:meta/" tiff:Orientation="3"/>')]
    others += [plain[0][:2] + b"\0\0" + plain[0][2:], plain[5].replace(b"\xff\xd1", b"\xff\xd5")]
    assert None not in map(decoding._plain_jpeg, plain)
    assert {*map(decoding._plain_jpeg, others[:-1])} == {None}  # the last one is plain, and broken
    found: list[bytes] = []
    assert decoding.simplejpeg is not None
    decode_jpeg = decoding.simplejpeg.decode_jpeg

    def counted(data: bytes) -> np.ndarray:
        pixels = decode_jpeg(data)
        found.append(data)
        return pixels

    monkeypatch.setattr(decoding.simplejpeg, "decode_jpeg", counted)
    pixels = [_pixels_or_reason(data) for data in plain + others]
    assert found == plain
    assert "cannot be decoded: OSError" in _pixels_or_reason(plain[0][:-700])
    monkeypatch.setattr(decoding, "simplejpeg", None)
    for data, before in zip(plain + others, pixels, strict=True):
        assert np.array_equal(_pixels_or_reason(data), before)
    for number in (1, 2, 3):
        assert np.shape(pixels[len(plain) + number]) == (165, 113, 3)


def _in_two_segments(exif: bytes, jpeg: bytes) -> bytes:
    """The file with its EXIF cut in the middle of the tag for orientation."""
    cut = exif.index(b"\x01\x12") + 1
    parts = [exif[:cut], b"Exif\0\0" + exif[cut:]]
    segments = [b"\xff\xe1" + (len(part) + 2).to_bytes(2, "big") + part for part in parts]
    return jpeg[:2] + b"".join(segments) + jpeg[2:]


def _pixels_or_reason(data: bytes) -> np.ndarray | str:
    try:
        return decode(data)
    except ImageError as error:
        return str(error)


def _saved(picture: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def test_it_is_the_libraries_bicubic_filter() -> None:
    """Pillow's own differs at the border of the square, where it sees what is beyond."""
    noise = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    picture = Image.fromarray(noise).resize((300, 300), Image.Resampling.BILINEAR)
    theirs = picture.resize((64, 64), Image.Resampling.BICUBIC)
    assert np.abs(resize_and_crop(np.asarray(picture), 64).astype(int) - np.asarray(theirs)).max() <= 1


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


def test_the_short_way_sees_the_same_pixels_or_nothing() -> None:
    picture = Image.fromarray(PIXELS)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    scratch = np.empty(PIXELS.nbytes, np.uint8)
    for data in (_saved(picture), _saved(picture, quality=80), encode(PIXELS, "png"), encode(PIXELS, "jpg")):
        found = decode_plain(data, scratch)
        assert found is not None
        assert np.array_equal(found, decode(data))
        assert decode_plain(data[: len(data) // 2], scratch) is None
    assert decode_plain(encode(PIXELS, "jpg"), scratch[:-1]) is None
    others = [encode(PIXELS, "webp"), b"", b"no picture"]
    for shown, options in ((picture.convert("L"), {}), (picture.convert("RGBA"), {}), (picture, {"exif": exif})):
        buffer = io.BytesIO()
        shown.save(buffer, "PNG", **options)
        others.append(buffer.getvalue())
    assert [decode_plain(data, scratch) for data in others] == [None] * len(others)


def test_a_bomb_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "MAX_PIXELS", 200)
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
