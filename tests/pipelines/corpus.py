"""Files as they are found among millions: broken, odd and hostile. Each with what must become of it."""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms

from tests.pipelines.data import frame

KEPT = "kept"


def _saved(picture: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def _picture(seed: int, size: int = 48) -> Image.Image:
    return Image.fromarray(frame(seed, size))


def _claims(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it is very large."""
    data = _saved(Image.new("RGB", (8, 8)), "PNG")
    header = struct.pack(">II", width, height) + data[24:29]
    return data[:16] + header + struct.pack(">I", zlib.crc32(b"IHDR" + header)) + data[33:]


def _rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    return _saved(Image.fromarray(frame(3, 64)[:32]), "JPEG", exif=exif.tobytes())


def corpus(marker: Path) -> dict[str, tuple[bytes, str]]:
    """name -> (bytes, KEPT or the kind of rejection). marker: a file that a payload would make if it ran."""
    jpeg = _saved(_picture(1), "JPEG", quality=90)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    broken_profile = profile[:40] + b"\xff" * 60 + profile[100:]
    payload = b"cos\nsystem\n(S'touch " + str(marker).encode() + b"'\ntR."
    return {
        "truncated.JPEG": (jpeg[: len(jpeg) // 2], "cannot be decoded"),
        "cut_header.JPEG": (jpeg[:30], "cannot be decoded"),
        "zero_bytes.JPEG": (b"", "cannot be decoded"),
        "text.JPEG": (b"<html>404 not found</html>", "cannot be decoded"),
        "png_named.jpg": (_saved(_picture(2), "PNG"), KEPT),
        "cmyk.jpg": (_saved(_picture(4).convert("CMYK"), "JPEG"), KEPT),
        "grey.jpg": (_saved(_picture(5).convert("L"), "JPEG"), KEPT),
        "palette.png": (_saved(_picture(6).quantize(16), "PNG"), KEPT),
        "transparent.png": (_saved(_picture(7).convert("RGBA"), "PNG"), KEPT),
        "sixteen_bit.png": (_saved(Image.fromarray(frame(8, 40)[..., 0].astype(np.uint16) * 257), "PNG"), KEPT),
        "float.tiff": (_saved(Image.new("F", (40, 40)), "TIFF"), "cannot be used"),
        "animated.gif": (_saved(_picture(9), "GIF", save_all=True, append_images=[_picture(10)]), "animated"),
        "one_pixel_high.png": (_saved(Image.new("RGB", (50, 1)), "PNG"), "too small"),
        "bomb.png": (_claims(60_000, 60_000), "too large"),
        "megapixels.png": (_saved(Image.new("1", (20_000, 10_000)), "PNG"), "too large"),
        "rotated.jpg": (_rotated(), KEPT),
        "corrupt_exif.jpg": (_saved(_picture(14), "JPEG", dpi=(72, 72), exif=b"Exif\0\0garbage"), KEPT),
        "corrupt_profile.jpg": (_saved(_picture(11), "JPEG", icc_profile=broken_profile), KEPT),
        "with.many.dots.png": (_saved(_picture(12), "PNG"), KEPT),
        "vector.ps.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n", "cannot be decoded"),
        "payload.pickle.jpg": (payload, "cannot be decoded"),
        "good.png": (_saved(_picture(13), "PNG"), KEPT),
    }


FILE_NAMES: dict[str, Callable[[], str]] = {
    "not_utf8": lambda: b"caf\xe9_\xff.png".decode("utf-8", "surrogateescape"),
    "long": lambda: "x" * 240 + ".png",
    "spaces": lambda: "a b  c.png",
    "unicode": lambda: "h\u00f8n\u5c71.png",
}
TAR_NAMES: dict[str, Callable[[], str]] = {
    **FILE_NAMES,
    "very_long": lambda: "y" * 300 + ".png",
    "parent": lambda: "../../../tmp/evil.png",
    "absolute": lambda: "/etc/evil.png",
}
