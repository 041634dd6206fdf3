"""What is in a set of images: sizes, modes, levels, brightness, exact duplicates, and a sheet to look at.

Counted image by image while shards are made, as whole numbers, so that the sums do not depend on their order.
"""

import base64
import functools
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from xxhash import xxh3_64_intdigest

from vqvae_core.artifacts import Artifact
from vqvae_core.images import encode, grid

REPORT = "data.json"
SHEET = "contact_sheet.png"
SIDES = (32, 64, 128, 256, 512, 1024, 2048)  # bounds of the histogram of shorter sides, in pixels
MAX_HASHES = 1 << 28  # 2 GiB of them: above, duplicates are not counted
_SHEET_IMAGES, _SHEET_COLUMNS = 64, 16
_EXACT_ROWS = 2**24 // 255**2  # of as many squares float32 holds the sum exactly


@dataclass(frozen=True)
class Origin:
    """What one image was before it was resized, and the sums of its pixels after.

    kind: format and mode of its file. hash64: XXH3 of its bytes. sums, squares: of each channel's pixels in [0, 255].
    """

    width: int
    height: int
    kind: str
    hash64: int
    sums: list[int]
    squares: list[int]

    @classmethod
    def of(cls, width: int, height: int, kind: str, data: bytes, pixels: np.ndarray) -> "Origin":
        """data: the bytes of the file; pixels: what became of it, uint8 (H, W, 3)."""
        sums, squares = _channel_sums(pixels)
        return cls(width, height, kind, xxh3_64_intdigest(data), sums, squares)


def _channel_sums(pixels: np.ndarray) -> list[list[int]]:
    """The sums of each channel's pixels, and of their squares."""
    # Of some rows at a time in float32: faster than in whole numbers, and as exact.
    height, width, channels = pixels.shape
    sums = np.zeros((2, width * channels))
    for first in range(0, height, _EXACT_ROWS):
        rows = pixels[first : first + _EXACT_ROWS].reshape(-1, width * channels).astype(np.float32)
        ones = np.ones(len(rows), np.float32)
        sums[0] += ones @ rows
        np.multiply(rows, rows, out=rows)
        sums[1] += ones @ rows
    return (sums @ _columns_of_channels(width, channels)).astype(np.int64).tolist()


def jpeg_notes(images: Artifact) -> list[str]:
    """What has to be said beside bits/dim of these image shards: a sentence, or nothing."""
    kinds: Iterable[str] = json.loads(images.read(REPORT))["kinds"] if REPORT in images.files else ()
    if images.facts.get("image_format") != "jpg" and not any(kind.startswith(("JPEG", "MPO")) for kind in kinds):
        return []
    return [
        "Images are or were JPEG, which has fewer bits than what it was made of: bits/dim compare models with each "
        "other, not with published figures."
    ]


@functools.lru_cache(maxsize=4)
def _columns_of_channels(width: int, channels: int) -> np.ndarray:
    """(width * channels, channels): 1 where a column of interleaved pixels is of a channel. A product with it adds
    them."""
    found = np.tile(np.eye(channels), (width, 1))
    found.flags.writeable = False
    return found


def summarize(origins: Iterable[Origin], levels: Iterable[str | None], size: int) -> dict[str, Any]:
    """What a shard's sidecar keeps of its images: JSON values."""
    origins = list(origins)
    if not origins:
        return {}
    shorter = np.array([min(origin.width, origin.height) for origin in origins])
    hashes = np.array([origin.hash64 for origin in origins], np.uint64)
    return {
        "shorter": np.bincount(np.searchsorted(SIDES, shorter, side="right"), minlength=len(SIDES) + 1).tolist(),
        "enlarged": int((shorter < size).sum()),
        "width": [min(origin.width for origin in origins), max(origin.width for origin in origins)],
        "height": [min(origin.height for origin in origins), max(origin.height for origin in origins)],
        "kinds": dict(Counter(origin.kind for origin in origins)),
        "levels": dict(Counter(level for level in levels if level is not None)),
        "pixels": len(origins) * size * size,
        "sums": np.sum([origin.sums for origin in origins], axis=0).tolist(),
        "squares": np.sum([origin.squares for origin in origins], axis=0).tolist(),
        "hashes": base64.b64encode(hashes.astype("<u8").tobytes()).decode(),
    }


@dataclass
class DataReport:
    """The summaries of all shards, added up. add() them in any order."""

    shorter: np.ndarray = field(default_factory=lambda: np.zeros(len(SIDES) + 1, np.int64))
    enlarged: int = 0
    width: tuple[int, int] | None = None
    height: tuple[int, int] | None = None
    kinds: Counter[str] = field(default_factory=Counter)
    levels: dict[str, Counter[str]] = field(default_factory=dict)
    rejects: Counter[str] = field(default_factory=Counter)
    ignored: Counter[str] = field(default_factory=Counter)
    _pixels: int = 0
    _sums: list[int] = field(default_factory=lambda: [0, 0, 0])
    _squares: list[int] = field(default_factory=lambda: [0, 0, 0])
    _hashes: list[np.ndarray] = field(default_factory=list)
    _num_hashes: int = 0

    def add(self, split: str, summary: Mapping[str, Any]) -> None:
        """split: of a shard; summary: what `summarize` said of it."""
        if not summary:
            return
        self.shorter += np.array(summary["shorter"])
        self.enlarged += summary["enlarged"]
        self.width, self.height = _hull(self.width, summary["width"]), _hull(self.height, summary["height"])
        self.kinds.update(summary["kinds"])
        self.levels.setdefault(split, Counter()).update(summary["levels"])
        if split == "train":
            self._pixels += summary["pixels"]
            self._sums = [a + b for a, b in zip(self._sums, summary["sums"], strict=True)]
            self._squares = [a + b for a, b in zip(self._squares, summary["squares"], strict=True)]
        hashes = np.frombuffer(base64.b64decode(summary["hashes"]), "<u8")
        self._num_hashes += len(hashes)
        if self._num_hashes > MAX_HASHES:
            self._hashes.clear()
        else:
            self._hashes.append(hashes)

    @property
    def exact_duplicates(self) -> int | None:
        """Images whose file has the same bytes as another one's before; None where there were too many to compare."""
        if self._num_hashes > MAX_HASHES:
            return None
        hashes = np.sort(np.concatenate([*self._hashes, np.zeros(0, np.uint64)]))
        return int((hashes[1:] == hashes[:-1]).sum())

    def mean_and_deviation(self) -> tuple[list[float], list[float]] | None:
        """Of each channel (RGB) over all pixels of the train split, in [0, 255]."""
        if not self._pixels:
            return None
        mean = [total / self._pixels for total in self._sums]
        # In whole numbers up to the last step: the two terms are close to each other.
        variance = [
            (self._pixels * squares - total * total) / self._pixels**2
            for squares, total in zip(self._squares, self._sums, strict=True)
        ]
        return mean, [value**0.5 for value in variance]

    def to_json(self) -> dict[str, Any]:
        names = [f"below {SIDES[0]}", *(f"{a} to {b - 1}" for a, b in pairwise(SIDES))]
        names.append(f"{SIDES[-1]} and more")
        found = self.mean_and_deviation()
        levels = sorted({name for counts in self.levels.values() for name in counts})
        return {
            "shorter_side": dict(zip(names, self.shorter.tolist(), strict=True)),
            "width": self.width,
            "height": self.height,
            "enlarged": self.enlarged,
            "kinds": dict(sorted(self.kinds.items())),
            "levels": {name: {split: counts[name] for split, counts in self.levels.items()} for name in levels},
            "mean": found[0] if found else None,
            "deviation": found[1] if found else None,
            "exact_duplicates": self.exact_duplicates,
            "rejects": dict(sorted(self.rejects.items())),
            "ignored": dict(sorted(self.ignored.items())),
        }


def _hull(known: tuple[int, int] | None, found: list[int]) -> tuple[int, int]:
    low, high = found
    return (low, high) if known is None else (min(known[0], low), max(known[1], high))


def contact_sheet(pixels: list[np.ndarray]) -> bytes:
    """A PNG of images of one size, in rows of 16."""
    scale = 2 if pixels[0].shape[0] < 64 else 1
    columns = min(_SHEET_COLUMNS if pixels[0].shape[0] < 100 else 8, len(pixels))
    return encode(grid(np.stack(pixels[:_SHEET_IMAGES]), columns, scale=scale), "png")
