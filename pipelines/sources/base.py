"""What a source of images is: parts to index, runs to read, and one entry per image.

A *part* is what one index task looks at: an archive, a Parquet file, a folder of one class. A *run* is what is read in
one go: an inner archive, a row group, an episode of an engine. The index has one entry per image, so that the stage can
permute images across shards without opening them. Adding a source is one file (docs/sources.md): a frozen config
dataclass with the methods of `Source`, and its name in `pipelines/sources/__init__.py`.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np

from vqvae_core.artifacts import hash_json
from vqvae_core.errors import InputError
from vqvae_core.storage import Folder

Split = Literal["train", "validation"]
MAX_LABELS = 100_000


class SourceError(InputError):
    """A source is missing, empty or not what its config says. The message tells what to do."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one index task looks at. name: unique in the source and relative to it. locator: JSON values."""

    name: str
    locator: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of a source: read in one go, in order.

    name: unique in the source and relative to it; it becomes part of provenance, never a path that is written to.
    prefix: what the keys of its images begin with, where they don't anyway.
    locator: what `Source.read` needs to find the run, as JSON values.
    """

    name: str
    prefix: str = ""
    locator: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One image of a run.

    position: its place in the run. name: as the source has it (bytes that are no UTF-8 as surrogates, as Python's file
    names have them); the sample's key is made of it.
    level: its name in the label map (class, synset, level of an engine), None where it has none.
    split: train, or validation for what the source holds out; the recipe may make that the test split.
    offset, num_bytes: where `read` finds it, in the source's own terms.
    """

    position: int
    name: str
    level: str | None = None
    split: Split = "train"
    offset: int = 0
    num_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class RunIndex:
    """A run and its images, in order. ignored: how many files are not used, by extension where they are no images, or
    as "test split"; a run may have nothing else."""

    run: Run
    entries: Sequence[Entry]
    ignored: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class SourceItem:
    """One image as the source has it.

    image: encoded bytes, or pixels (uint8 HWC) in memory of their own, since several images are held at a time; None
    where they cannot be read.
    facts: what becomes part of the sample's JSON: `source` (its place, relative), `episode`, `step`...
    fault: why it cannot be used, where the source itself knows. sha256: of its bytes, where they are too many to hold.
    """

    position: int
    image: bytes | np.ndarray | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    fault: str = ""
    sha256: str = ""


class Source(Protocol):
    """The contract of a source's config. Frozen, keyword-only; safe to send to another process."""

    random_access: ClassVar[bool]  # True: `read` of some entries costs about these entries only
    has_episodes: ClassVar[bool]  # True: images follow each other in episodes, which are never split

    def check(self) -> None:
        """Raise `SourceError` within seconds where the source is missing or unreadable."""
        ...

    def identity(self) -> dict[str, Any]:
        """What the source contains, as JSON: kind, relative names, sizes, versions, seeds. Never its location."""
        ...

    def parts(self) -> Sequence[Part]:
        """What there is to index, found by listing alone."""
        ...

    def index(self, part: Part, spool: Folder) -> Iterator[RunIndex]:
        """The runs of a part, in order. spool: a folder that is kept with the index, for a source that has to be
        unpacked to be read; files in it must be named after the part."""
        ...

    def labels(self, levels: set[str]) -> dict[str, int] | None:
        """The number of each level that occurs, or None where the source has no labels."""
        ...

    def read(self, run: Run, entries: Sequence[Entry], spool: Folder) -> Iterator[SourceItem]:
        """The images at these entries of a run, in their order (ascending position)."""
        ...


@runtime_checkable
class ReadsAhead(Protocol):
    """A source that can be told what comes next. Pictures that are taken from all over a data set are a wait for the
    disk each, unless it is asked for some of them at a time."""

    def will_read(self, run: Run, entry: Entry) -> None:
        """`read` of this one comes soon. Reads nothing and never fails: what is wrong with it, `read` finds."""
        ...


def number_by_name(levels: set[str]) -> dict[str, int] | None:
    """Labels by the order of names: what most sources use. Names that are whole numbers keep their value; numbers that
    do not occur below the largest one are labels too. A negative number, or an odd name among many numbers, is no
    label: images that have it are rejected, where renumbering all others would hide it. Raises `SourceError` for more
    than MAX_LABELS."""
    if not levels:
        return None
    if len(levels) > MAX_LABELS:
        raise SourceError(
            f"expected at most {MAX_LABELS} different labels, found {len(levels)}, for example {min(levels)!r}; is it "
            "a column of labels?"
        )
    numbers = {level for level in levels if is_label(level)}
    negative = {level for level in levels if level.startswith("-") and is_label(level[1:])}
    if numbers and len(levels - numbers - negative) <= len(numbers) // 10:
        return {str(label): label for label in range(max(map(int, numbers)) + 1)}
    if all(level.isascii() and level.isdecimal() for level in levels):
        return {level: label for label, level in enumerate(sorted(levels, key=lambda level: (int(level), level)))}
    return {level: label for label, level in enumerate(sorted(levels))}


def is_label(level: str) -> bool:
    """A whole number as a label map writes it, below 100,000: larger ones are names."""
    return level.isascii() and level.isdecimal() and (level == "0" or level[0] != "0") and len(level) < 6


def fraction_of(name: str, seed: int = 0) -> float:
    """A number in [0, 1) that depends on the name and the seed alone: splits by fraction are drawn with it."""
    return int(hash_json([name, seed])[:13], 16) / 16**13


_SPLIT_WORD = re.compile(r"(?:^|[-_.])(train|training|val|valid|validation|test)(?=[-_.0-9]|$)")


def given_split(name: str) -> Literal["train", "validation", "test"] | None:
    """The split that a file says it is, by a word of its name or else of the nearest folder above it that has one."""
    for part in reversed(name.lower().split("/")):
        match = _SPLIT_WORD.search(part)
        if match:
            return "train" if match[1].startswith("train") else "validation" if match[1].startswith("val") else "test"
    return None


def splits_of(names: Sequence[str]) -> dict[str, Split | None] | None:
    """The split of each file where their names give one: those that say train and validation, or train and test.

    A test split beside a validation split is left out (None): its labels are often not known. None in place of the
    whole where the names don't say. Raises `SourceError` where some do and some don't.
    """
    found = {name: given_split(name) for name in names}
    kinds = set(found.values())
    if "train" not in kinds or not kinds & {"validation", "test"}:
        return None
    silent = sorted(readable(name) for name, split in found.items() if split is None)
    if silent:
        raise SourceError(
            f"expected a split (train, val or test) in the name of every file or its folder, since some have one; "
            f"{len(silent)} have none, for example {', '.join(silent[:3])}: rename them or move them away"
        )
    used = "validation" if "validation" in kinds else "test"
    return {
        name: "train" if split == "train" else "validation" if split == used else None for name, split in found.items()
    }


def parts_of(files: Sequence[tuple[str, int]]) -> list[Part]:
    """A part for each file, with the split that its name gives. Names like _metadata are left out."""
    names = [name for name, _ in files if not name.rpartition("/")[2].startswith("_")]
    given = splits_of(names)
    return [
        Part(name=name, locator={"split": given[name] if given else None, "left_out": bool(given) and not given[name]})
        for name in names
    ]


def left_out(part: Part, num_files: int = 1) -> RunIndex:
    """What the index says of files of a test split that is not used: how many there are."""
    return RunIndex(run=Run(name=readable(part.name)), entries=[], ignored={"test split": num_files})


def split_by_fraction(name: str, validation_fraction: float, seed: int = 0) -> Split:
    return "validation" if fraction_of(name, seed) < validation_fraction else "train"


def check_fraction(value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"validation_fraction must be at least 0 and below 1, was {value}")


def relative(path: str) -> str:
    """A path that somebody recorded, as part of a sample's facts: as it is, or its last part where it is absolute."""
    path = readable(path.replace("\\", "/"))
    return path.rpartition("/")[2] if path.startswith("/") or path[1:2] == ":" else path


def readable(name: str | bytes) -> str:
    """A name as valid text: bytes that are no UTF-8 are written as \\xNN."""
    data = name if isinstance(name, bytes) else name.encode("utf-8", "surrogateescape")
    return data.decode("utf-8", "backslashreplace")
