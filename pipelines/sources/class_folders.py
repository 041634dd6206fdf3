"""A folder of class folders, a file an image: CLASS/image.jpg, or train/CLASS/image.jpg beside val/CLASS/image.jpg."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

from pipelines.sources.base import (
    Entry,
    Part,
    Run,
    RunIndex,
    SourceError,
    SourceItem,
    check_fraction,
    left_out,
    number_by_name,
    readable,
    split_by_fraction,
)
from pipelines.sources.files import (
    FolderSummary,
    hash_range,
    list_folder,
    list_folders,
    open_source,
    place_of,
    read_files,
    will_read,
)
from pipelines.sources.tars import MAX_MEMBER_BYTES
from vqvae_core.artifacts import hash_json
from vqvae_core.storage import Folder

EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
_SPLITS = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
}
_WHAT = "a folder of class folders with images"


@dataclass(frozen=True, kw_only=True)
class ClassFoldersSource:
    """Image files in a folder for each class. Folders train and val (or validation, or test) above them are the splits;
    where there are none, a fraction of the images is validation. Images outside any folder have no label."""

    path: str | None = field(default=None, metadata={"hashed": False})
    """The folder, local or s3://. Never part of a fingerprint."""
    validation_fraction: float = 0.05
    """Share of the images that become validation where no folder is named so."""

    random_access: ClassVar[bool] = True
    has_episodes: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_fraction(self.validation_fraction)

    @cached_property
    def _folder(self) -> Folder:
        return place_of(self.path, _WHAT)

    def _folders(self) -> tuple[FolderSummary, ...]:
        return list_folders(self.path, EXTENSIONS, _WHAT)

    def check(self) -> None:
        self._folders()

    def identity(self) -> dict[str, Any]:
        folders = [[readable(found.folder), found.digest] for found in self._folders() if found.num_files]
        num_files = sum(found.num_files for found in self._folders())
        return {"kind": "class_folders", "num_files": num_files, "folders": hash_json(folders)}

    def parts(self) -> list[Part]:
        """One for each folder; its files are listed where it is indexed."""
        folders = self._folders()
        tops = {found.folder.split("/")[0] for found in folders if found.folder and found.num_files}
        splits = {top: _SPLITS.get(top.lower()) for top in tops}
        found = set(splits.values())
        given = "train" in found and None not in found  # else `train` is a class
        if "train" in found and found & {"validation", "test"} and not given:
            silent = sorted(readable(top) for top, split in splits.items() if split is None)
            raise SourceError(
                f"expected only splits (train, val or test) in {self.path}, since some folders are, found "
                f"{len(silent)} more with images: {', '.join(silent[:3])}; rename or move them (or train, where that "
                "is a class)"
            )
        other = "validation" if "validation" in found else "test" if "test" in found else None
        parts = []
        for found in folders:
            split = splits.get(found.folder.split("/")[0]) if given else None
            locator = {
                "split": split if given and other else None,
                "left_out": given and bool(found.folder) and split not in ("train", other),
                "above": int(given),
                "digest": found.digest,
            }
            parts.append(Part(name=found.folder, locator=locator))
        return parts

    def index(self, part: Part, spool: Folder) -> Iterator[RunIndex]:
        given = part.locator["split"]
        folders = [readable(folder) for folder in part.name.split("/")[part.locator["above"] :]]
        level = folders[0] if folders and folders[0] else None
        listing, files = list_folder(self.path, part.name, EXTENSIONS, _WHAT)
        if listing.digest != part.locator["digest"]:
            raise SourceError(
                f"expected the same files in {self.path}/{readable(part.name)} as a moment ago, found others; run it "
                "again when nobody writes there"
            )
        if part.locator["left_out"]:
            yield left_out(part, len(files))
            return
        entries = []
        for position, (name, size) in enumerate(files):
            whole = f"{readable(part.name)}/{readable(name)}"
            split = given or split_by_fraction(whole, self.validation_fraction)
            entries.append(
                Entry(
                    position=position,
                    name=name,
                    level=level,
                    split="train" if split == "train" else "validation",
                    num_bytes=size,
                )
            )
        run = Run(name=readable(part.name), prefix="_".join(folders), locator={"folder": part.name})
        yield RunIndex(run=run, entries=entries, ignored=listing.ignored)

    def labels(self, levels: set[str]) -> dict[str, int] | None:
        return number_by_name(levels)

    def will_read(self, run: Run, entry: Entry) -> None:
        if entry.num_bytes <= MAX_MEMBER_BYTES:
            will_read(self._folder, _name(run, entry), 0, entry.num_bytes)

    def read(self, run: Run, entries: Sequence[Entry], spool: Folder) -> Iterator[SourceItem]:
        names = [_name(run, entry) for entry in entries]
        small = [name for name, entry in zip(names, entries, strict=True) if entry.num_bytes <= MAX_MEMBER_BYTES]
        files = read_files(self._folder, small)
        for name, entry in zip(names, entries, strict=True):
            facts = {"source": readable(name)}
            if entry.num_bytes > MAX_MEMBER_BYTES:
                fault = f"too many bytes: {entry.num_bytes} are more than {MAX_MEMBER_BYTES}"
                with open_source(self._folder, name) as file:
                    sha256 = hash_range(file, 0, file.size())
                yield SourceItem(position=entry.position, facts=facts, fault=fault, sha256=sha256)
                continue
            data = next(files)
            if isinstance(data, bytes) and len(data) != entry.num_bytes:
                raise SourceError(
                    f"expected {entry.num_bytes} bytes in {self.path}/{readable(name)}, found {len(data)}: it changed "
                    "since it was listed; run it again when nobody writes there"
                )
            if isinstance(data, bytes):
                yield SourceItem(position=entry.position, image=data, facts=facts)
            else:
                fault = f"cannot be read: {data.strerror or type(data).__name__}"
                yield SourceItem(position=entry.position, facts=facts, fault=fault)


def _name(run: Run, entry: Entry) -> str:
    return f"{run.locator['folder']}/{entry.name}".lstrip("/")
