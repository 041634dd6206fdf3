"""Augmentation as a pure function of (seed, epoch, key): the same for any number of workers and after any restart."""

import hashlib
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from vqvae_core.errors import InputError
from vqvae_core.order import mix

Pixels = TypeVar("Pixels", bound=Any)  # an array or a tensor


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """What is done to training images beside decoding them."""

    flip: bool = False
    """Mirror every other image, left to right."""
    crop_size: int | None = None
    """Cut a square of this many pixels a side out of images that are stored larger, at random in training and from the
    centre elsewhere; None: images as they are stored."""

    def __post_init__(self) -> None:
        if self.crop_size is not None and self.crop_size < 1:
            raise ValueError(f"crop_size must be at least 1 or None, was {self.crop_size}")

    def size(self, stored: int) -> int:
        """Pixels a side after augmentation, of images stored with so many. Raises `InputError` where they are too
        small."""
        size = self.crop_size or stored
        if size > stored:
            raise InputError(
                f"expected a crop_size of at most {stored}, the size of the stored images, was {size}; "
                "shard larger images or lower it"
            )
        return size

    @property
    def keeps_all(self) -> bool:
        """Images stay as they are stored."""
        return not self.flip and self.crop_size is None

    def apply(self, pixels: np.ndarray, *, key: str, seed: int, epoch: int) -> np.ndarray:
        """Pixels (H, W, 3), cut and mirrored, as a view."""
        if self.keeps_all:
            return pixels
        number = mix(seed, epoch, int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]))
        if self.crop_size is not None:
            top = mix(number, 1) % (pixels.shape[0] - self.crop_size + 1)
            left = mix(number, 2) % (pixels.shape[1] - self.crop_size + 1)
            pixels = pixels[top : top + self.crop_size, left : left + self.crop_size]
        return pixels[:, ::-1] if self.flip and number & 1 else pixels


def centre_crop(pixels: Pixels, size: int) -> Pixels:
    """The centre of pixels (..., H, W, 3), (..., size, size, 3)."""
    top, left = (pixels.shape[-3] - size) // 2, (pixels.shape[-2] - size) // 2
    return pixels[..., top : top + size, left : left + size, :]
