"""Image shards: WebDataset tars that are a pure function of their samples, and a reader that runs no member's code.

A sample is `<key>.png|webp|jpg` and `<key>.json`, next to each other. Any WebDataset reader can read them.
"""

import io
import json
import mmap
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vqvae_core.artifacts import Artifact, ArtifactError, canonical_json
from vqvae_core.decoding import IMAGE_FORMATS, decode
from vqvae_core.storage import Folder

KIND = "ImageShards"
KEY_PATTERN = re.compile(r"[A-Za-z0-9_-]{1,90}")  # 100 with the extension: a plain tar header


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One image in a shard: encoded bytes, and its facts (label, source, level, episode...) as JSON values."""

    key: str
    image_format: str
    data: bytes
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> int | None:
        return self.facts.get("label")

    def pixels(self) -> np.ndarray:
        """uint8 (H, W, 3)."""
        return decode(self.data)


def write_tar(samples: Iterable[Sample]) -> bytes:
    """A finished tar. Same samples, same bytes: fixed time, owner and mode. Raises ValueError for a key that does not
    fit KEY_PATTERN."""
    blocks: list[bytes | bytearray] = []
    for sample in samples:
        if not KEY_PATTERN.fullmatch(sample.key):
            raise ValueError(f"key must be 1 to 90 letters, digits, - and _, was {sample.key!r}")
        _add(blocks, f"{sample.key}.{sample.image_format}", sample.data)
        _add(blocks, f"{sample.key}.json", canonical_json(sample.facts).encode())
    num_bytes = sum(map(len, blocks)) + 2 * tarfile.BLOCKSIZE
    return b"".join([*blocks, bytes(2 * tarfile.BLOCKSIZE + -num_bytes % tarfile.RECORDSIZE)])


def _add(blocks: list[bytes | bytearray], name: str, data: bytes) -> None:
    # Plain headers differ in three fields. The tarfile module needs five times as long for one.
    header = bytearray(_HEADER)
    header[: len(name)] = encoded = name.encode("ascii")
    header[124:135] = size = b"%011o" % len(data)
    header[148:155] = b"%06o\0" % (_HEADER_SUM + sum(encoded) + sum(size))
    blocks += (header, data, bytes(-len(data) % tarfile.BLOCKSIZE))


def _plain_header() -> bytes:
    """The header of a file without name or size; its checksum field is blank, as for the sum of its bytes."""
    member = tarfile.TarInfo("x")
    member.mode, member.uname, member.gname = 0o644, "root", "root"
    header = bytearray(member.tobuf(tarfile.USTAR_FORMAT))
    header[0:1], header[124:135], header[148:156] = b"\0", bytes(11), b" " * 8
    return bytes(header)


_HEADER = _plain_header()
_HEADER_SUM = sum(_HEADER)


def read_tar(data: bytes, where: str) -> Iterator[Sample]:
    """The samples of a shard, in order. Raises `ArtifactError` where the tar is none of ours."""
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            picture: tuple[str, str, bytes] | None = None
            for member in tar:
                key, _, extension = member.name.rpartition(".")
                content = _content(tar, member)
                if extension in IMAGE_FORMATS and picture is None:
                    picture = (key, extension, content)
                elif extension == "json" and picture is not None and picture[0] == key:
                    yield Sample(
                        key=key, image_format=picture[1], data=picture[2], facts=_facts(content, member.name, where)
                    )
                    picture = None
                else:
                    raise ArtifactError(
                        f"expected pairs of an image and a .json in {where}, found {member.name!r}; "
                        "is it a shard of this project?"
                    )
            if picture is not None:
                raise ArtifactError(f"expected {picture[0]}.json at the end of {where}, the tar ends before it")
    except tarfile.TarError as error:
        raise ArtifactError(f"expected a complete tar at {where}, found: {error}") from error


@dataclass(frozen=True)
class TarIndex:
    """Where the images of a shard lie: their keys, and the offset and bytes of each."""

    keys: list[str]
    offsets: list[int]
    num_bytes: list[int]


def index_tar(data: "bytes | memoryview | mmap.mmap", where: str) -> TarIndex:
    """The images of a shard, in order, by a walk over its headers: no picture is copied, no facts are read.

    Raises `ArtifactError` where the tar is none of ours.
    """
    keys, offsets, sizes, position, key = [], [], [], 0, ""
    while position + tarfile.BLOCKSIZE <= len(data):
        header = bytes(data[position : position + tarfile.BLOCKSIZE])
        if not header[0]:
            break
        name = header[:100].rstrip(b"\0").decode("ascii", "replace")
        size = int(header[124:135], 8) if header[124:135].isdigit() else -1
        stem, _, extension = name.rpartition(".")
        start = position + tarfile.BLOCKSIZE
        if header[156:157] != b"0" or size < 0 or start + size > len(data):
            raise ArtifactError(f"expected plain files in {where}, found {name!r}; is it a shard of this project?")
        if extension in IMAGE_FORMATS and not key:
            key = stem
            keys.append(stem)
            offsets.append(start)
            sizes.append(size)
        elif extension == "json" and stem == key:
            key = ""
        else:
            raise ArtifactError(
                f"expected pairs of an image and a .json in {where}, found {name!r}; is it a shard of this project?"
            )
        position = start + size + -size % tarfile.BLOCKSIZE
    if key:
        raise ArtifactError(f"expected {key}.json at the end of {where}, the tar ends before it")
    return TarIndex(keys, offsets, sizes)


def _facts(content: bytes, name: str, where: str) -> dict[str, Any]:
    try:
        facts = json.loads(content)
    except (ValueError, RecursionError):
        facts = None
    if not isinstance(facts, dict):
        raise ArtifactError(f"expected a JSON object in {name} of {where}, found something else")
    return facts


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member) if member.isfile() else None
    if file is None:
        raise ArtifactError(f"expected plain files in the tar, found {member.name!r} of another type")
    return file.read()


@dataclass(frozen=True)
class ImageShards:
    """The artifact of the shard stage. Facts: size, splits {split: {shards, images}}, label_map, rejects."""

    artifact: Artifact

    @classmethod
    def open(cls, folder: Folder) -> "ImageShards":
        return cls(Artifact.open(folder, KIND))

    @property
    def size(self) -> int:
        """Height and width of every image, in pixels."""
        return self.artifact.facts["size"]

    @property
    def label_map(self) -> dict[str, int] | None:
        return self.artifact.facts["label_map"]

    def shards(self, split: str) -> list[str]:
        """The files of a split, in order."""
        return sorted(path for path in self.artifact.files if path.startswith(f"{split}-") and path.endswith(".tar"))

    def num_images(self, split: str) -> int:
        return sum(
            file.rows
            for file in self.artifact.files.values()
            if file.path.startswith(f"{split}-") and file.path.endswith(".tar")
        )

    def read(self, path: str) -> list[Sample]:
        """The samples of one shard, checked against the manifest's hash and count."""
        samples = list(read_tar(self.artifact.read(path), self.artifact.folder.path(path)))
        expected = self.artifact.files[path].rows
        if len(samples) != expected:
            raise ArtifactError(
                f"expected {expected} samples in {path} of {self.artifact.folder.uri}, found {len(samples)}"
            )
        return samples
