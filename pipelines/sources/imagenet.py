"""The official ImageNet (ILSVRC2012) archives: a tar of one tar a synset for training, a flat tar for validation.

Nothing is unpacked: headers are walked once for the index, pictures are read by their offset.
"""

import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pyarrow as pa

from pipelines.sources.base import Run, SourceError, SourceIndex, SourceItem
from pipelines.sources.files import list_files, open_source
from vqvae_core.artifacts import hash_bytes

TRAIN = "ILSVRC2012_img_train.tar"
VALIDATION = "ILSVRC2012_img_val.tar"
VALIDATION_SYNSETS = "val_synsets.txt"
_MAX_IMAGE_BYTES = 256 << 20


@dataclass(frozen=True, kw_only=True)
class ImageNetSource:
    """ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and val_synsets.txt (a synset a line, in order of names)."""

    path: str | None = field(default=None, metadata={"hashed": False})
    """Folder with the archives, local or s3://. Never part of a fingerprint."""

    random_access: ClassVar[bool] = True

    def check(self) -> None:
        names = {name for name, _ in list_files(self.path, ".tar", f"the ImageNet archives {TRAIN} and {VALIDATION}")}
        for name in (TRAIN, VALIDATION):
            if name not in names:
                raise SourceError(
                    f"expected {TRAIN} and {VALIDATION} at {self.path}, found no {name}; the official archives come "
                    "from image-net.org"
                )
        open_source(self.path, VALIDATION_SYNSETS).close()

    def identity(self) -> dict[str, Any]:
        self.check()
        files = list_files(self.path, ".tar", "the ImageNet archives")
        with open_source(self.path, VALIDATION_SYNSETS) as file:
            synsets = hash_bytes(file.read())
        archives = [list(entry) for entry in files if entry[0] in (TRAIN, VALIDATION)]
        return {"kind": "imagenet", "files": archives, "validation_synsets": synsets}

    def index(self) -> SourceIndex:
        runs: list[tuple[Run, int, bool]] = []
        with open_source(self.path, TRAIN) as file:
            for synset, start, size in _members(file, 0, None, TRAIN):
                pictures = list(_members(file, start, size, f"{TRAIN}:{synset}"))
                locator = {"archive": TRAIN, "synset": synset.removesuffix(".tar"), "pictures": pictures}
                runs.append((Run(name=synset.removesuffix(".tar"), locator=locator), len(pictures), False))
        with open_source(self.path, VALIDATION_SYNSETS) as file:
            synsets = file.read().decode().split()
        with open_source(self.path, VALIDATION) as file:
            pictures = sorted(_members(file, 0, None, VALIDATION))
        if len(pictures) != len(synsets):
            raise SourceError(
                f"expected a synset a picture, found {len(pictures)} pictures in {VALIDATION} and {len(synsets)} lines "
                f"in {VALIDATION_SYNSETS}"
            )
        locator = {"archive": VALIDATION, "synsets": synsets, "pictures": pictures}
        runs.append((Run(name="validation", locator=locator), len(pictures), True))
        names = {run.locator["synset"] for run, _, validation in runs if not validation} | set(synsets)
        return SourceIndex.of_runs(runs, label_map={name: label for label, name in enumerate(sorted(names))})

    def read(self, run: Run, positions: Sequence[int] | None = None) -> Iterator[SourceItem]:
        pictures = run.locator["pictures"]
        archive = run.locator["archive"]
        with open_source(self.path, archive) as file:
            for position in range(len(pictures)) if positions is None else positions:
                name, start, size = pictures[position]
                synset = run.locator["synset"] if "synset" in run.locator else run.locator["synsets"][position]
                file.seek(start)
                yield SourceItem(
                    position=position,
                    key=name.rsplit(".", 1)[0],
                    image=file.read(size),
                    level=synset,
                    facts={"source": f"{archive}:{name}"},
                )


def _members(file: pa.NativeFile, start: int, size: int | None, where: str) -> Iterator[tuple[str, int, int]]:
    """(name, offset in `file`, bytes) of each plain file of the tar that begins at `start`. Reads headers only."""
    stop = file.size() if size is None else start + size
    position = start
    while position < stop:
        file.seek(position)
        header = file.read(tarfile.BLOCKSIZE)
        if header.count(0) == len(header) and header:
            return
        try:
            member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise SourceError(
                f"expected a tar at {where}, found a broken header at byte {position}: {error}"
            ) from error
        data = position + tarfile.BLOCKSIZE
        if member.size < 0 or data + member.size > stop or member.size > max(_MAX_IMAGE_BYTES, (size is None) * stop):
            raise SourceError(f"expected a complete tar at {where}, it ends inside {member.name!r}")
        if member.isreg():
            yield member.name, data, member.size
        position = data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
