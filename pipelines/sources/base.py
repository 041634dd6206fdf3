"""What a source of images is: an index of runs, and a read of one run.

A *run* is what is read in one go: an inner archive, a Parquet row group, an episode of an engine. The index has one
row per image, so that the stage can permute images across shards without opening them. Adding a source is one file:
a frozen config dataclass with the methods of `Source`, and its name in `pipelines/sources/__init__.py`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np

from vqvae_core.artifacts import hash_json
from vqvae_core.errors import InputError


class SourceError(InputError):
    """A source is missing, empty or not what its config says. The message tells what to do."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of a source: read in one go, in order.

    name: unique in the source and relative to it; it becomes part of provenance, never a path that is written to.
    locator: what `Source.read` needs to find the run, as JSON values.
    """

    name: str
    locator: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class SourceItem:
    """One image as the source has it.

    image: encoded bytes, or pixels (uint8 HWC). level: its name in the label map (class, synset, level of an engine).
    """

    position: int
    key: str
    image: bytes | np.ndarray
    level: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class SourceIndex:
    """Every image that a source offers, by number: three arrays of equal length N, one entry an image.

    run: int32, index into `runs`; position: int32, the image's place in its run; validation: bool.
    label_map: name of each label -> its number, or None where the source has no labels.
    """

    runs: tuple[Run, ...]
    run: np.ndarray
    position: np.ndarray
    validation: np.ndarray
    label_map: dict[str, int] | None = None

    @property
    def num_images(self) -> int:
        return len(self.run)

    @classmethod
    def of_runs(
        cls, runs: Sequence[tuple[Run, int, bool]], *, label_map: dict[str, int] | None = None
    ) -> "SourceIndex":
        """The index of runs whose images all belong to one split: (run, number of images, is validation)."""
        counts = np.array([count for _, count, _ in runs], dtype=np.int64)
        return cls(
            runs=tuple(run for run, _, _ in runs),
            run=np.repeat(np.arange(len(runs), dtype=np.int32), counts),
            position=np.concatenate([np.arange(count, dtype=np.int32) for count in counts] or [np.zeros(0, np.int32)]),
            validation=np.repeat(np.array([validation for _, _, validation in runs], dtype=bool), counts),
            label_map=label_map,
        )


class Source(Protocol):
    """The contract of a source's config. Frozen, keyword-only; safe to send to another process."""

    random_access: ClassVar[bool]  # True: `read` of some positions costs about these positions only

    def check(self) -> None:
        """Raise `SourceError` within seconds where the source is missing or unreadable."""
        ...

    def identity(self) -> dict[str, Any]:
        """What the source contains, as JSON: kind, relative names, sizes, versions, seeds. Never its location."""
        ...

    def index(self) -> SourceIndex: ...

    def read(self, run: Run, positions: Sequence[int] | None = None) -> Iterator[SourceItem]:
        """The images of a run in order, or only those at `positions` (ascending)."""
        ...


def fraction_of(name: str, seed: int = 0) -> float:
    """A number in [0, 1) that depends on the name and the seed alone: splits by fraction are drawn with it."""
    return int(hash_json([name, seed])[:13], 16) / 16**13
