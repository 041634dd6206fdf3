"""The official ImageNet (ILSVRC2012) archives: a tar of one tar a synset for training, a flat tar for validation.

Nothing is unpacked: headers are walked once for the index, pictures are read by their offset.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

from pipelines.sources.base import Entry, Part, Run, RunIndex, SourceError, SourceItem, number_by_name, readable
from pipelines.sources.files import list_files, open_source, place_of
from pipelines.sources.tars import members, read_members, will_read_member
from vqvae_core.artifacts import hash_bytes
from vqvae_core.storage import Folder

TRAIN = "ILSVRC2012_img_train.tar"
VALIDATION = "ILSVRC2012_img_val.tar"
VALIDATION_SYNSETS = "val_synsets.txt"


@dataclass(frozen=True, kw_only=True)
class ImageNetSource:
    """ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and val_synsets.txt (a synset a line, in order of names)."""

    path: str | None = field(default=None, metadata={"hashed": False})
    """Folder with the archives, local or s3://. Never part of a fingerprint."""

    random_access: ClassVar[bool] = True
    has_episodes: ClassVar[bool] = False

    @cached_property
    def _folder(self) -> Folder:
        return place_of(self.path, f"the ImageNet archives {TRAIN} and {VALIDATION}")

    def check(self) -> None:
        names = {name for name, _ in list_files(self.path, ".tar", f"the ImageNet archives {TRAIN} and {VALIDATION}")}
        for name in (TRAIN, VALIDATION):
            if name not in names:
                raise SourceError(
                    f"expected {TRAIN} and {VALIDATION} at {self.path}, found no {name}; the official archives come "
                    "from image-net.org"
                )
        if not self._folder.exists(VALIDATION_SYNSETS):
            raise SourceError(
                f"expected {VALIDATION_SYNSETS} beside the archives at {self.path}, found none: the synset of each "
                "validation image, a line each, in the order of their names. The archives do not have it; "
                "docs/sources.md says how to make it from the development kit"
            )
        open_source(self._folder, VALIDATION_SYNSETS).close()

    def identity(self) -> dict[str, Any]:
        self.check()
        files = list_files(self.path, ".tar", "the ImageNet archives")
        with open_source(self._folder, VALIDATION_SYNSETS) as file:
            synsets = hash_bytes(file.read())
        archives = [list(entry) for entry in files if entry[0] in (TRAIN, VALIDATION)]
        return {"kind": "imagenet", "files": archives, "validation_synsets": synsets}

    def parts(self) -> list[Part]:
        """One for each inner archive, found by the headers of the outer one, and one for the validation archive."""
        parts = []
        with open_source(self._folder, TRAIN) as file:
            for member in members(file, TRAIN):
                if not member.name.endswith(".tar"):
                    raise SourceError(
                        f"expected one tar a synset in {TRAIN}, found {readable(member.name)}; is it the official "
                        "archive?"
                    )
                place = {"start": member.offset, "bytes": member.num_bytes}
                parts.append(Part(name=readable(member.name.removesuffix(".tar")), locator=place))
        if len({part.name for part in parts}) != len(parts):
            raise SourceError(f"expected one tar a synset in {TRAIN}, found the same synset twice")
        return [*parts, Part(name="validation", locator={"validation": True})]

    def index(self, part: Part, spool: Folder) -> Iterator[RunIndex]:
        if part.locator.get("validation"):
            yield self._validation(part)
            return
        start, size = part.locator["start"], part.locator["bytes"]
        with open_source(self._folder, TRAIN) as file:
            entries = [
                Entry(
                    position=position,
                    name=member.name,
                    level=part.name,
                    offset=member.offset,
                    num_bytes=member.num_bytes,
                )
                for position, member in enumerate(members(file, f"{TRAIN}:{part.name}.tar", start, size))
            ]
        yield RunIndex(run=Run(name=part.name, locator={"archive": TRAIN}), entries=entries)

    def _validation(self, part: Part) -> RunIndex:
        with open_source(self._folder, VALIDATION_SYNSETS) as file:
            synsets = file.read().decode("utf-8", "replace").split()
        with open_source(self._folder, VALIDATION) as file:
            pictures = sorted(members(file, VALIDATION), key=lambda member: (member.name, member.offset))
        if len(pictures) != len(synsets):
            raise SourceError(
                f"expected a synset a picture, found {len(pictures)} pictures in {VALIDATION} and {len(synsets)} lines "
                f"in {VALIDATION_SYNSETS}"
            )
        entries = [
            Entry(
                position=position,
                name=member.name,
                level=synset,
                split="validation",
                offset=member.offset,
                num_bytes=member.num_bytes,
            )
            for position, (member, synset) in enumerate(zip(pictures, synsets, strict=True))
        ]
        return RunIndex(run=Run(name=part.name, locator={"archive": VALIDATION}), entries=entries)

    def labels(self, levels: set[str]) -> dict[str, int] | None:
        return number_by_name(levels)

    def will_read(self, run: Run, entry: Entry) -> None:
        will_read_member(self._folder, run.locator["archive"], entry)

    def read(self, run: Run, entries: Sequence[Entry], spool: Folder) -> Iterator[SourceItem]:
        archive = run.locator["archive"]
        inner = f"{run.name}.tar/" if archive == TRAIN else ""
        for entry, item in zip(entries, read_members(self._folder, archive, entries), strict=True):
            item.facts["source"] = f"{archive}/{inner}{readable(entry.name)}"
            yield item
