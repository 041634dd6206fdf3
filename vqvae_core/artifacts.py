"""Artifacts: what a stage makes. A folder with files, and a manifest that is written last and is the commit.

Readers read only what a manifest names and never list a folder. See docs/formats.md for the fields.
"""

import builtins
import dataclasses
import hashlib
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa
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


def content_digest(files: Iterable[FileEntry]) -> str:
    """A hash of all file hashes with their paths: what the artifact contains, whatever its provenance."""
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda file: file.path):
        digest.update(f"{file.path}\0{file.rows}\0{file.sha256}\n".encode())
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
        except (ValueError, KeyError, TypeError) as error:
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
    def files(self) -> dict[str, FileEntry]:
        """path -> entry of every file. The table's own hash is checked here."""
        name, expected = self.manifest.files["name"], self.manifest.files["sha256"]
        try:
            data = self.folder.read(name)
        except FileNotFoundError:
            raise self._broken(name, "the file", "nothing") from None
        found = hash_bytes(data)
        if found != expected:
            raise self._broken(name, f"sha256 {expected[:12]}", f"{found[:12]}")
        rows = pq.read_table(io.BytesIO(data), schema=_FILES_SCHEMA).to_pylist()
        return {row["path"]: FileEntry(**row) for row in rows}

    def check_files(self) -> None:
        """Every file is there with its size. Cheap: no file is read. Raises `ArtifactError` for the first fault."""
        for entry in self.files.values():
            size = self.folder.size(entry.path)
            if size != entry.bytes:
                found = "nothing" if size is None else f"{size} bytes"
                raise self._broken(entry.path, f"{entry.bytes} bytes", found)

    def read(self, path: str) -> bytes:
        """A whole file, checked against its hash. Raises `ArtifactError` where it differs."""
        entry = self.files.get(path)
        if entry is None:
            raise ArtifactError(f"expected the file {path} in the manifest of {self.folder.uri}, it is not named there")
        try:
            data = self.folder.read(path)
        except FileNotFoundError:
            raise self._broken(path, f"{entry.bytes} bytes", "nothing") from None
        if len(data) != entry.bytes:
            raise self._broken(path, f"{entry.bytes} bytes", f"{len(data)} bytes")
        found = hash_bytes(data)
        if found != entry.sha256:
            raise self._broken(path, f"sha256 {entry.sha256[:12]}", found[:12])
        return data

    def _broken(self, path: str, expected: str, found: str) -> ArtifactError:
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
    entries = sorted(files, key=lambda entry: entry.path)
    table = pa.Table.from_pylist([dataclasses.asdict(entry) for entry in entries], schema=_FILES_SCHEMA)
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    folder.write(FILES, buffer.getvalue())
    manifest = Manifest(
        kind=kind,
        stage=stage,
        stage_version=stage_version,
        fingerprint=fingerprint,
        recipe=json.loads(canonical_json(recipe)),
        inputs={name: reference(artifact) for name, artifact in inputs.items()},
        files={"name": FILES, "sha256": hash_bytes(buffer.getvalue())},
        content=content_digest(entries),
        facts=json.loads(canonical_json(facts)),
        provenance=json.loads(canonical_json(provenance)),
    )
    folder.write(MANIFEST, manifest.dump())
    return Artifact(folder, manifest)


def reference(artifact: Artifact) -> dict[str, str]:
    """How a later manifest names this artifact: by what was asked for and by what it contains."""
    return {"fingerprint": artifact.manifest.fingerprint, "content": artifact.manifest.content}
