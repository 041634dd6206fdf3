"""CIFAR-10's binary archive, `cifar-10-binary.tar.gz`: records of a label byte and 3,072 pixel bytes (three planes).

A gzip stream can only be read from its begin, so the index task unpacks it once, and images are read from there.
"""

import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from pipelines.sources.base import Entry, Part, Run, RunIndex, SourceError, SourceItem
from pipelines.sources.files import list_files, open_source, place_of
from vqvae_core.storage import Folder

ARCHIVE = "cifar-10-binary.tar.gz"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_RECORD_BYTES = 1 + 3 * 32 * 32
_BATCHES = (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch")
_MAX_BATCH_BYTES = 1 << 28  # the official ones have 30 MB


@dataclass(frozen=True, kw_only=True)
class Cifar10Source:
    """cifar-10-binary.tar.gz (Krizhevsky 2009): data_batch_*.bin are train images, test_batch.bin held-out ones."""

    path: str | None = field(default=None, metadata={"hashed": False})
    """Folder with the archive, local or s3://. Never part of a fingerprint."""

    random_access: ClassVar[bool] = True
    has_episodes: ClassVar[bool] = False

    @cached_property
    def _folder(self) -> Folder:
        return place_of(self.path, ARCHIVE)

    def _file(self) -> tuple[str, int]:
        files = [entry for entry in list_files(self.path, ".tar.gz", ARCHIVE) if entry[0] == ARCHIVE]
        if not files:
            raise SourceError(f"expected {ARCHIVE} at {self.path}, found no file of that name")
        return files[0]

    def check(self) -> None:
        self._file()

    def identity(self) -> dict[str, Any]:
        return {"kind": "cifar10", "files": [list(self._file())]}

    def parts(self) -> list[Part]:
        return [Part(name="cifar10")]

    def index(self, part: Part, spool: Folder) -> Iterator[RunIndex]:
        batches: dict[str, bytes] = {}
        for name, data in self._unpacked(part, spool):
            if name in batches:
                raise SourceError(f"expected each batch once in {ARCHIVE}, found {name}.bin twice; fetch it again")
            batches[name] = data
        if "test_batch" not in batches or not any(name.startswith("data_batch") for name in batches):
            raise SourceError(
                f"expected data_batch_1.bin to data_batch_5.bin and test_batch.bin in {ARCHIVE}, found "
                f"{', '.join(sorted(batches)) or 'none of them'}"
            )
        for name, data in sorted(batches.items()):
            yield RunIndex(
                run=Run(name=name, locator={"spool": f"{part.name}-{name}.bin"}),
                entries=[
                    Entry(
                        position=position,
                        name=f"{name}-{position:05d}",
                        level=CLASSES[label] if label < len(CLASSES) else None,
                        split="validation" if name == "test_batch" else "train",
                        offset=position * _RECORD_BYTES,
                        num_bytes=_RECORD_BYTES,
                    )
                    for position, label in enumerate(data[::_RECORD_BYTES])
                ],
            )

    def _unpacked(self, part: Part, spool: Folder) -> Iterator[tuple[str, bytes]]:
        """(name, contents) of each batch; each is also written to the spool."""
        try:
            with (
                open_source(self._folder, ARCHIVE) as file,
                tarfile.open(fileobj=file, mode="r|gz", encoding="utf-8") as tar,
            ):
                for member in tar:
                    name = member.name.rpartition("/")[2].removesuffix(".bin")
                    if not (member.isreg() and member.name.endswith(".bin") and "batch" in name):
                        continue
                    if name not in _BATCHES:
                        raise SourceError(
                            f"expected data_batch_1.bin to data_batch_5.bin and test_batch.bin in {ARCHIVE}, found "
                            f"{member.name!r}; fetch it again"
                        )
                    stream = tar.extractfile(member) if member.size <= _MAX_BATCH_BYTES else None
                    data = stream.read() if stream else b""
                    if not data or len(data) % _RECORD_BYTES:
                        raise SourceError(
                            f"expected records of {_RECORD_BYTES} bytes in {member.name} of {ARCHIVE}, found "
                            f"{member.size} bytes; fetch the archive again"
                        )
                    spool.write(f"{part.name}-{name}.bin", data)
                    yield name, data
        except (tarfile.TarError, EOFError, OSError) as error:
            raise SourceError(
                f"expected a complete gzipped tar at {self.path}/{ARCHIVE}, found: {error}; fetch it again"
            ) from error

    def labels(self, levels: set[str]) -> dict[str, int] | None:
        return {name: label for label, name in enumerate(CLASSES)}

    def read(self, run: Run, entries: Sequence[Entry], spool: Folder) -> Iterator[SourceItem]:
        with open_source(spool, run.locator["spool"]) as file:
            for entry in entries:
                record = file.read_at(entry.offset, entry.num_bytes)
                label, last = record[0], len(CLASSES) - 1
                pixels = np.frombuffer(record, np.uint8, offset=1).reshape(3, 32, 32).transpose(1, 2, 0)
                yield SourceItem(
                    position=entry.position,
                    image=np.ascontiguousarray(pixels),
                    facts={"source": f"{ARCHIVE}/{run.name}.bin#{entry.position}"},
                    fault="" if label <= last else f"label out of range: {label} is not 0 to {last}",
                )
