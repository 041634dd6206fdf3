"""Samples of mapped image shards to a batch of pixels: what a loader's processes do."""

import mmap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vqvae_core.artifacts import ArtifactError
from vqvae_core.augment import AugmentConfig
from vqvae_core.decoding import ImageError, decode, decode_plain, jpeg_into
from vqvae_core.image_shards import TarIndex

Buffer = bytes | mmap.mmap | memoryview


class PlainDecoder:
    """Pixels of one image after the other, as shards hold them, in the same memory where they fit."""

    def __init__(self) -> None:
        self._scratch = batch_memory(0)

    def __call__(self, data: bytes) -> np.ndarray:
        """Pixels (H, W, 3), which the next call may overwrite. Raises `ImageError`."""
        pixels = decode_plain(data, self._scratch)
        if pixels is None:
            pixels = decode(data)
            if pixels.nbytes > len(self._scratch):
                self._scratch = batch_memory(pixels.nbytes)
        return pixels


@dataclass
class Decoder:
    """Shards by number, and their images by row. size: pixels a side of every image that it gives."""

    augment: AugmentConfig
    size: int
    seed: int
    _pixels: PlainDecoder = field(default_factory=PlainDecoder)
    _open: dict[int, tuple[memoryview, list[int], list[int], list[str], str]] = field(default_factory=dict)

    def open(self, number: int, data: Buffer, index: TarIndex, where: str) -> None:
        """Give a shard a number. Its bytes must stay until it is closed."""
        self._open[number] = memoryview(data), index.offsets, index.num_bytes, index.keys, where

    def close(self, number: int) -> None:
        self._open.pop(number)[0].release()

    def decode(self, epoch: int, shards: Sequence[int], rows: Sequence[int], out: np.ndarray) -> None:
        """Fill out (N, size, size, 3), uint8, contiguous, with images by shard and row. Raises `ArtifactError` naming
        the image."""
        memory = out.reshape(len(out), 3 * self.size**2)
        as_stored, shape = self.augment.keeps_all, (self.size, self.size, 3)
        for number, (shard, row, place) in enumerate(zip(shards, rows, memory, strict=True)):
            view, offsets, sizes, keys, where = self._open[shard]
            if row >= len(keys):
                raise ArtifactError(f"expected more than {row} images in {where}, found {len(keys)}")
            start = offsets[row]
            data = view[start : start + sizes[row]]
            if as_stored and jpeg_into(data, place) == shape:
                continue
            try:
                pixels = self._pixels(bytes(data))
            except ImageError as error:
                raise ArtifactError(f"expected an image for {keys[row]} in {where}, but it {error}") from error
            pixels = self.augment.apply(pixels, key=keys[row], seed=self.seed, epoch=epoch)
            if pixels.shape != shape:
                raise ArtifactError(
                    f"expected {self.size} x {self.size} pixels for {keys[row]} in {where}, "
                    f"found {pixels.shape[1]} x {pixels.shape[0]}"
                )
            out[number] = pixels


def batch_memory(num_bytes: int, memory: Any = None) -> np.ndarray:
    """Bytes that begin 16 past a multiple of 64, of memory that has 64 more, or new: where rows of pixels begin at
    multiples of 32, libjpeg-turbo writes past the cache, which takes a tenth to a quarter more time for pixels that are
    read again at once."""
    found = np.empty(num_bytes + 64, np.uint8) if memory is None else np.frombuffer(memory, np.uint8)
    first = (16 - found.ctypes.data) % 64
    return found[first : first + num_bytes]
