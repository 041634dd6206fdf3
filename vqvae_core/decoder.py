"""Samples of mapped image shards to a batch of pixels: what a loader's processes do."""

import mmap
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from vqvae_core.artifacts import ArtifactError
from vqvae_core.augment import AugmentConfig
from vqvae_core.decoding import ImageError, decode, decode_plain
from vqvae_core.image_shards import TarIndex

Buffer = bytes | mmap.mmap | memoryview


class PlainDecoder:
    """Pixels of one image after the other, as shards hold them, in the same memory where they fit."""

    def __init__(self) -> None:
        self._scratch = _unaligned(0)

    def __call__(self, data: bytes) -> np.ndarray:
        """Pixels (H, W, 3), which the next call may overwrite. Raises `ImageError`."""
        pixels = decode_plain(data, self._scratch)
        if pixels is None:
            pixels = decode(data)
            if pixels.nbytes > len(self._scratch):
                self._scratch = _unaligned(pixels.nbytes)
        return pixels


@dataclass
class Decoder:
    """Shards by number, and their images by row. size: pixels a side of every image that it gives."""

    augment: AugmentConfig
    size: int
    seed: int
    _pixels: PlainDecoder = field(default_factory=PlainDecoder)
    _open: dict[int, tuple[memoryview, TarIndex, str]] = field(default_factory=dict)

    def open(self, number: int, data: Buffer, index: TarIndex, where: str) -> None:
        """Give a shard a number. Its bytes must stay until it is closed."""
        self._open[number] = memoryview(data), index, where

    def close(self, number: int) -> None:
        view, _, _ = self._open.pop(number)
        view.release()

    def decode(self, epoch: int, shards: Sequence[int], rows: Sequence[int], out: np.ndarray) -> None:
        """Fill out (N, size, size, 3), uint8, with images by shard and row. Raises `ArtifactError` naming the image."""
        for number, (shard, row) in enumerate(zip(shards, rows, strict=True)):
            view, index, where = self._open[shard]
            if row >= len(index.keys):
                raise ArtifactError(f"expected more than {row} images in {where}, found {len(index.keys)}")
            start, key, place = index.offsets[row], index.keys[row], out[number]
            # A copy costs less than to decode out of mapped pages, and so does a second one than to decode into them.
            data = bytes(view[start : start + index.num_bytes[row]])
            try:
                pixels = self._pixels(data)
            except ImageError as error:
                raise ArtifactError(f"expected an image for {key} in {where}, but it {error}") from error
            pixels = self.augment.apply(pixels, key=key, seed=self.seed, epoch=epoch)
            if pixels.shape != place.shape:
                raise ArtifactError(
                    f"expected {self.size} x {self.size} pixels for {key} in {where}, "
                    f"found {pixels.shape[1]} x {pixels.shape[0]}"
                )
            place[...] = pixels


def _unaligned(num_bytes: int) -> np.ndarray:
    """Memory that begins 16 bytes past a multiple of 64: where rows begin at multiples of 32, libjpeg-turbo writes past
    the cache, which takes a tenth to a quarter more time for pixels that are read again at once."""
    memory = np.empty(num_bytes + 64, np.uint8)
    first = (16 - memory.ctypes.data) % 64
    return memory[first : first + num_bytes]
