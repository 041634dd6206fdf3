"""Artifacts: what a stage makes. A folder with files, and a manifest that is written last and is the commit.

Readers read only what a manifest names and never list a folder. See docs/formats.md for the fields.
"""

import builtins
import dataclasses
import hashlib
import io
import itertools
import json
import mmap
import operator
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vqvae_core.errors import InputError
from vqvae_core.storage import Folder

MANIFEST_VERSION = 1
MANIFEST = "manifest.json"
FILES = "files.parquet"
_FILES_SCHEMA = pa.schema(
    [
        pa.field("path", pa.string(), nullable=False),
        pa.field("rows", pa.int64(), nullable=False),
        pa.field("bytes", pa.int64(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
    ]
)


class ArtifactError(InputError):
    """An artifact is missing, of another kind or version, or not what its manifest says."""


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces; dataclasses become objects. Raises ValueError for NaN and infinity."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, default=_plain)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    raise TypeError(f"expected a JSON value or a dataclass, found {type(value).__name__}")


def hash_json(value: Any) -> str:
    """sha256 of the canonical JSON, in hex."""
    return hash_bytes(canonical_json(value).encode())


def hash_bytes(data: bytes) -> str:
    """sha256 in hex."""
    return hashlib.sha256(data).hexdigest()


@dataclass(frozen=True)
class FileEntry:
    """One file of an artifact: its path in the folder, its rows (samples, or 0), its size and hash."""

    path: str
    rows: int
    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: str, data: builtins.bytes, *, rows: int = 0) -> "FileEntry":
        return cls(path, rows, len(data), hash_bytes(data))


class FileTable(Mapping[str, FileEntry]):
    """The files of an artifact by path, in order. Kept as columns: there may be millions."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table

    @classmethod
    def of(cls, files: Iterable[FileEntry]) -> "FileTable":
        """The table of some files, put in order. They may come one by one; only their columns are kept."""
        row = operator.attrgetter(*_FILES_SCHEMA.names)
        batches = [
            pa.RecordBatch.from_arrays(
                [
                    pa.array(values, field.type)
                    for values, field in zip(zip(*map(row, entries), strict=True), _FILES_SCHEMA, strict=True)
                ],
                schema=_FILES_SCHEMA,
            )
            for entries in _batches(files, _CHUNK)
        ]
        table = pa.Table.from_batches(batches, schema=_FILES_SCHEMA)
        paths = table["path"]
        in_order = pc.call_function("less", [paths.slice(0, max(0, len(paths) - 1)), paths.slice(1)])
        if not pc.call_function("all", [in_order]).as_py() and len(paths) > 1:
            table = table.take(pc.call_function("sort_indices", [paths]))
        return cls(table)

    def __len__(self) -> int:
        return self.table.num_rows

    def __iter__(self) -> Iterator[str]:
        for batch in self.table.to_batches(max_chunksize=_CHUNK):
            yield from batch["path"].to_pylist()

    def __getitem__(self, path: str) -> FileEntry:
        row = bisect_left(range(len(self)), path, key=self._path)
        if row == len(self) or self._path(row) != path:
            raise KeyError(path)
        return FileEntry(**self.table.slice(row, 1).to_pylist()[0])

    def _path(self, row: int) -> str:
        return self.table["path"][row].as_py()

    def __contains__(self, path: object) -> bool:
        return isinstance(path, str) and self.get(path) is not None

    def values(self) -> Any:
        """Every entry, in order, made as it is asked for."""
        return itertools.starmap(FileEntry, self.rows())

    def rows(self) -> Iterator[tuple[str, int, int, str]]:
        """(path, rows, bytes, sha256) of every file, in order."""
        for batch in self.table.to_batches(max_chunksize=_CHUNK):
            yield from zip(*(batch[field.name].to_pylist() for field in _FILES_SCHEMA), strict=True)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FileTable) and self.table.equals(other.table)

    __hash__ = None  # type: ignore[assignment]


_CHUNK = 1 << 16
Item = TypeVar("Item")


def _batches(entries: Iterable[Item], size: int) -> Iterator[list[Item]]:
    waiting = iter(entries)
    while batch := list(itertools.islice(waiting, size)):
        yield batch


def content_digest(files: "Iterable[FileEntry] | FileTable") -> str:
    """A hash of all file hashes with their paths: what the artifact contains, whatever its provenance."""
    table = files if isinstance(files, FileTable) else FileTable.of(files)
    digest = hashlib.sha256()
    for chunk in _batches(table.rows(), _CHUNK):
        digest.update("".join(f"{path}\0{rows}\0{sha256}\n" for path, rows, _, sha256 in chunk).encode())
    return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What `manifest.json` holds. recipe, inputs, facts: JSON values."""

    kind: str
    stage: str
    stage_version: int
    fingerprint: str
    recipe: Mapping[str, Any]
    inputs: Mapping[str, Mapping[str, str]]  # name -> {"fingerprint", "content"}
    files: Mapping[str, str]  # {"name", "sha256"} of files.parquet
    content: str
    facts: Mapping[str, Any]
    provenance: Mapping[str, Any]
    version: int = MANIFEST_VERSION

    def dump(self) -> bytes:
        return (json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True, allow_nan=False) + "\n").encode()

    @classmethod
    def load(cls, data: bytes, where: str) -> "Manifest":
        """Raises `ArtifactError` where the text is no manifest, or one of another version."""
        try:
            fields = json.loads(data)
            version = fields["version"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ArtifactError(
                f"expected a manifest at {where}, found something else; move that folder away to make it again"
            ) from error
        if version != MANIFEST_VERSION:
            raise ArtifactError(
                f"expected manifest version {MANIFEST_VERSION} at {where}, found {version!r}; "
                "use the release that wrote it, or another --root"
            )
        missing = {field.name for field in dataclasses.fields(cls)} - fields.keys()
        if missing:
            raise ArtifactError(
                f"expected the fields {', '.join(sorted(missing))} in the manifest at {where}, they are missing; "
                "move that folder away to make it again"
            )
        return cls(**{field.name: fields[field.name] for field in dataclasses.fields(cls)})


@dataclass(frozen=True)
class Artifact:
    """A committed artifact: its folder and its manifest."""

    folder: Folder
    manifest: Manifest

    @classmethod
    def open(cls, folder: Folder, kind: str | None = None) -> "Artifact":
        """Raises `ArtifactError` where there is no manifest, or one of another kind or version."""
        where = folder.path(MANIFEST)
        try:
            data = folder.read(MANIFEST)
        except (FileNotFoundError, NotADirectoryError):
            raise ArtifactError(
                f"expected a finished artifact at {folder.uri}, found no {MANIFEST}; run the stage that makes it"
            ) from None
        manifest = Manifest.load(data, where)
        if kind is not None and manifest.kind != kind:
            raise ArtifactError(f"expected an artifact of kind {kind} at {folder.uri}, found {manifest.kind}")
        return cls(folder, manifest)

    @property
    def facts(self) -> Mapping[str, Any]:
        return self.manifest.facts

    @cached_property
    def files(self) -> "FileTable":
        """path -> entry of every file. The table's own hash is checked here."""
        name, expected = self.manifest.files["name"], self.manifest.files["sha256"]
        try:
            data = self.folder.read(name)
        except FileNotFoundError:
            raise self.broken(name, "the file", "nothing") from None
        found = hash_bytes(data)
        if found != expected:
            raise self.broken(name, f"sha256 {expected[:12]}", f"{found[:12]}")
        return FileTable(pq.read_table(io.BytesIO(data), schema=_FILES_SCHEMA))

    def check_files(self) -> None:
        """Every file is there with its size. Cheap: no file is read. Raises `ArtifactError` for the first fault."""
        for entries in _batches(self.files.values(), _CHUNK):
            sizes = self.folder.sizes([entry.path for entry in entries])
            for entry, size in zip(entries, sizes, strict=True):
                if size != entry.bytes:
                    found = "nothing" if size is None else f"{size} bytes"
                    raise self.broken(entry.path, f"{entry.bytes} bytes", found)

    def read(self, path: str) -> bytes:
        """A whole file, checked against its hash. Raises `ArtifactError` where it differs."""
        entry = self.files.get(path)
        if entry is None:
            raise ArtifactError(f"expected the file {path} in the manifest of {self.folder.uri}, it is not named there")
        try:
            data = self.folder.read(path)
        except FileNotFoundError:
            raise self.broken(path, f"{entry.bytes} bytes", "nothing") from None
        self.check(path, data)
        return data

    def check(self, path: str, data: "builtins.bytes | mmap.mmap") -> None:
        """Whether this is the content of a file. Raises `ArtifactError` where size or hash differ."""
        entry = self.files[path]
        if len(data) != entry.bytes:
            raise self.broken(path, f"{entry.bytes} bytes", f"{len(data)} bytes")
        found = hashlib.sha256(data).hexdigest()
        if found != entry.sha256:
            raise self.broken(path, f"sha256 {entry.sha256[:12]}", found[:12])

    def broken(self, path: str, expected: str, found: str) -> ArtifactError:
        """The error of a file that is not what the manifest says."""
        return ArtifactError(
            f"expected {expected} for {path} of {self.folder.uri}, found {found}; "
            "restore the file, or move that folder away to make it again"
        )


def commit(
    folder: Folder,
    *,
    kind: str,
    stage: str,
    stage_version: int,
    fingerprint: str,
    recipe: Mapping[str, Any],
    inputs: Mapping[str, Artifact],
    files: Iterable[FileEntry],
    facts: Mapping[str, Any],
    provenance: Mapping[str, Any],
) -> Artifact:
    """Write the table of files, then the manifest: from here on the artifact exists."""
    table = FileTable.of(files)
    buffer = io.BytesIO()
    pq.write_table(table.table, buffer, compression="zstd")
    folder.write(FILES, buffer.getvalue())
    manifest = Manifest(
        kind=kind,
        stage=stage,
        stage_version=stage_version,
        fingerprint=fingerprint,
        recipe=json.loads(canonical_json(recipe)),
        inputs={name: reference(artifact) for name, artifact in inputs.items()},
        files={"name": FILES, "sha256": hash_bytes(buffer.getvalue())},
        content=content_digest(table),
        facts=json.loads(canonical_json(facts)),
        provenance=json.loads(canonical_json(provenance)),
    )
    folder.write(MANIFEST, manifest.dump())
    return Artifact(folder, manifest)


def reference(artifact: Artifact) -> dict[str, str]:
    """How a later manifest names this artifact: by what was asked for and by what it contains."""
    return {"fingerprint": artifact.manifest.fingerprint, "content": artifact.manifest.content}
