"""WebDataset tars that somebody made: members of one key next to each other, one of them an image.

Only the image and its label (`.cls`, or `label` in `.json`) are looked at. Other members are never read, so nothing
that they hold can run.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

from pipelines.sources.base import (
    Entry,
    Part,
    Run,
    RunIndex,
    SourceItem,
    check_fraction,
    left_out,
    number_by_name,
    parts_of,
    readable,
    split_by_fraction,
)
from pipelines.sources.files import extension_of, identity_of, list_files, open_source, place_of
from pipelines.sources.tars import LINK, Member, members, read_members, will_read_member
from vqvae_core.storage import Folder

_IMAGES = ("jpg", "jpeg", "jpe", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm")
_LABELS = ("cls", "json")
_WHAT = "WebDataset tars"


@dataclass(frozen=True, kw_only=True)
class WebDatasetSource:
    """Tars of samples. Files named train-* and val-* (or test-*) are the splits; where they are not, a fraction of the
    samples is validation."""

    path: str | None = field(default=None, metadata={"hashed": False})
    """Folder with the tars, local or s3://. Never part of a fingerprint."""
    validation_fraction: float = 0.05
    """Share of the samples that become validation where no tar is named so."""

    random_access: ClassVar[bool] = True
    has_episodes: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_fraction(self.validation_fraction)

    @cached_property
    def _folder(self) -> Folder:
        return place_of(self.path, _WHAT)

    def _files(self) -> list[tuple[str, int]]:
        return list_files(self.path, ".tar", _WHAT)

    def check(self) -> None:
        open_source(self._folder, self._files()[0][0]).close()

    def identity(self) -> dict[str, Any]:
        return {"kind": "webdataset", **identity_of(self._files())}

    def parts(self) -> list[Part]:
        return parts_of(self._files())

    def index(self, part: Part, spool: Folder) -> Iterator[RunIndex]:
        if part.locator["left_out"]:
            yield left_out(part)
            return
        entries = []
        ignored: Counter[str] = Counter()
        with open_source(self._folder, part.name) as file:
            for key, sample in _samples(members(file, part.name, wanted=_is_label)):
                found = _images(sample)
                used = [image for _, image in found]
                ignored.update(
                    extension_of(member.name)
                    for name, member in sample.items()
                    if member not in used and name.rpartition(".")[2] not in _LABELS
                )
                for stem, image in found:
                    whole = f"{readable(part.name)}/{readable(key + stem)}"
                    entries.append(
                        Entry(
                            position=len(entries),
                            name=key + stem,
                            level=_level(sample, stem),
                            split=part.locator["split"] or split_by_fraction(whole, self.validation_fraction),
                            offset=image.offset if image else 0,
                            num_bytes=image.num_bytes if image else LINK,
                        )
                    )
        yield RunIndex(run=Run(name=readable(part.name), locator={"file": part.name}), entries=entries, ignored=ignored)

    def labels(self, levels: set[str]) -> dict[str, int] | None:
        return number_by_name(levels)

    def will_read(self, run: Run, entry: Entry) -> None:
        will_read_member(self._folder, run.locator["file"], entry)

    def read(self, run: Run, entries: Sequence[Entry], spool: Folder) -> Iterator[SourceItem]:
        found = [entry for entry in entries if entry.num_bytes >= 0]
        images = read_members(self._folder, run.locator["file"], found)
        for entry in entries:
            if entry.num_bytes >= 0:
                item = next(images)
            else:
                fault = "no image: none among the members of its key, or a link"
                item = SourceItem(position=entry.position, fault=fault)
            item.facts["source"] = f"{run.name}/{readable(entry.name)}"
            yield item


def _split_name(name: str) -> tuple[str, str]:
    """(key, extension): the key ends at the first dot of the last part of the name."""
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return f"{folder}{slash}{stem}", extension.lower()


def _is_label(name: str) -> bool:
    return _split_name(name)[1].rpartition(".")[2] in _LABELS


def _samples(found: Iterator[Member]) -> Iterator[tuple[str, dict[str, Member]]]:
    """Neighbours with one key are a sample; an extension that comes again begins the next one."""
    key, sample = "", {}
    for member in found:
        name, extension = _split_name(member.name)
        if sample and (name != key or extension in sample):
            yield key, sample
            sample = {}
        key = name
        sample[extension] = member
    if sample:
        yield key, sample


def _images(sample: dict[str, Member]) -> list[tuple[str, Member | None]]:
    """(what follows the key, member) of each image: `key.jpg` and the like; where there is none, all that are like
    `key.0001.jpg`, each with its own name; where there is none either, the sample without an image."""
    exact = [("", sample[extension]) for extension in _IMAGES if extension in sample]
    longer = [
        (f".{stem}", member)
        for stem, dot, extension, member in ((*name.rpartition("."), member) for name, member in sample.items())
        if dot and extension in _IMAGES
    ]
    return [*exact[:1]] or [*longer] or [("", None)]


def _level(sample: dict[str, Member], stem: str) -> str | None:
    """The name of a sample's label, None where it has none that can be read."""
    inner = f"{stem[1:]}." if stem else ""
    label = sample.get(f"{inner}cls") or sample.get("cls")
    if label is not None:
        return label.data.decode("utf-8", "replace").strip() or None
    label = sample.get(f"{inner}json") or sample.get("json")
    if label is None:
        return None
    try:
        facts = json.loads(label.data)
    except (ValueError, RecursionError):
        return None
    values = [facts.get(name) for name in ("level", "label", "cls", "class")] if isinstance(facts, dict) else []
    found = next((str(value) for value in values if isinstance(value, str | int)), None)
    return found.encode("utf-8", "replace").decode() if found is not None else None
