"""The images of a job: read from the source, brought to the recipe's size and format, or rejected with a reason."""

import base64
import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from pipelines.config import ShardConfig
from pipelines.data_report import Origin
from pipelines.index import KEY_CHARACTERS, safe_key, source_from_json
from pipelines.sources import AnySource
from pipelines.sources.base import Entry, ReadsAhead, Run, SourceError, SourceItem, readable
from pipelines.sources.files import forget_files
from vqvae_core.artifacts import Artifact, hash_bytes
from vqvae_core.checkpoint import config_from_json
from vqvae_core.decoding import ImageError, Picture, load
from vqvae_core.image_shards import Sample
from vqvae_core.images import encode, resize_and_crop
from vqvae_core.storage import Folder

IMAGES = pa.schema(
    [
        ("name", pa.binary()),
        ("level", pa.string()),
        ("position", pa.int32()),
        ("offset", pa.int64()),
        ("num_bytes", pa.int32()),
        ("renamed", pa.bool_()),
        ("place", pa.int32()),
    ]
)
_AHEAD_IMAGES = 64  # that a disk is asked for before they are read: some megabytes
_BATCH_IMAGES, _BATCH_BYTES = 16, 4 << 20  # that are held at a time, as they were read and at their new size


@dataclass(frozen=True)
class Prepared:
    """A sample at the recipe's size, and what its image was before."""

    sample: Sample
    origin: Origin


@dataclass(frozen=True)
class Reject:
    """A row of rejects.parquet. source: its place in the source, relative; sha256: of its bytes, "" where there are
    none (a link, a file that may not be read)."""

    source: str
    key: str
    reason: str
    sha256: str


def pack(runs: list[Run], counts: list[int], images: pa.Table) -> dict[str, Any]:
    """The part of a job that says what to read, as JSON values. images: the columns of IMAGES, run by run; counts: how
    many of them each run has; place: in the shard."""
    table = images.select(IMAGES.names).cast(IMAGES)
    # Columns of JSON values would take three times as long.
    return {
        "runs": [vars(run) for run in runs],
        "counts": counts,
        "images": base64.b64encode(to_ipc(table)).decode(),
    }


def unpack(reads: dict[str, Any]) -> tuple[list[tuple[Run, list[Entry]]], list[bool], list[int]]:
    """The runs, each with its images; which images are renamed; their places. Names that are no UTF-8 have
    surrogates."""
    table = pa.ipc.open_stream(base64.b64decode(reads["images"])).read_all()
    columns = (table[name].to_pylist() for name in ("name", "level", "position", "offset", "num_bytes"))
    entries = (
        Entry(
            position=position,
            name=name.decode("utf-8", "surrogateescape"),
            level=level,
            offset=offset,
            num_bytes=num_bytes,
        )
        for name, level, position, offset, num_bytes in zip(*columns, strict=True)
    )
    counted = zip(reads["runs"], reads["counts"], strict=True)
    runs = [(Run(**values), list(itertools.islice(entries, count))) for values, count in counted]
    return runs, table["renamed"].to_pylist(), table["place"].to_pylist()


def to_ipc(table: pa.Table) -> pa.Buffer:
    """A table in Arrow's stream format."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def prepare(spec: dict[str, Any], reads: dict[str, Any]) -> Iterator[tuple[int, Prepared | Reject]]:
    """The images of a job, in its order, each with its place in its shard. spec: what all jobs of a stage share; reads:
    see `pack`. Raises `SourceError`, OSError."""
    forget_files()
    config, source = config_from_json(ShardConfig, spec["config"]), source_from_json(spec["source"])
    label_map, spool = _label_map(spec["spool"]), Folder(spec["spool"])
    batches = _batched(_read(source, spool, reads), extra_bytes=3 * config.image_size**2)
    try:
        # Not as a loop, whose variable would hold one batch while the next is read.
        of_batch = functools.partial(_prepare, config=config, label_map=label_map)
        yield from itertools.chain.from_iterable(map(of_batch, batches))
    finally:
        forget_files()


class _Original(NamedTuple):
    """An image of a job as it was read. place: in its shard."""

    item: SourceItem
    key: str
    level: str | None
    run: str
    place: int

    @property
    def num_bytes(self) -> int:
        image = self.item.image
        return image.nbytes if isinstance(image, np.ndarray) else len(image or b"")


class _Fitted(NamedTuple):
    """An image at the recipe's size: uint8 (size, size, 3), and as a file. What it was before: see `Origin`."""

    width: int
    height: int
    kind: str
    pixels: np.ndarray
    data: bytes


def _read(source: AnySource, spool: Folder, reads: dict[str, Any]) -> Iterator[_Original]:
    runs, renamed, places = unpack(reads)
    more = zip(renamed, places, strict=True)
    tell = source.will_read if isinstance(source, ReadsAhead) else lambda run, entry: None
    ahead = ((run, entry) for run, entries in runs for entry in entries)
    for told in itertools.islice(ahead, _AHEAD_IMAGES):
        tell(*told)
    for run, entries in runs:
        items = source.read(run, entries, spool)
        for entry in entries:
            for told in itertools.islice(ahead, 1):
                tell(*told)
            item = next(items, None)
            if item is None or item.position != entry.position:
                raise SourceError(
                    f"expected image {entry.position} ({readable(entry.name)}) in {run.name}, it is not there; did "
                    "the source change while it was read?"
                )
            is_renamed, place = next(more)
            key = key_of(run, entry, renamed=is_renamed)
            yield _Original(item=item, key=key, level=entry.level, run=run.name, place=place)


def _batched(images: Iterator[_Original], *, extra_bytes: int) -> Iterator[list[_Original]]:
    """Some images at a time, fewer where they are large. extra_bytes: what becomes of each."""
    batch: list[_Original] = []
    num_bytes = 0
    for image in images:
        batch.append(image)
        num_bytes += image.num_bytes + extra_bytes
        if len(batch) == _BATCH_IMAGES or num_bytes >= _BATCH_BYTES:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


def _prepare(
    batch: list[_Original], config: ShardConfig, label_map: dict[str, int] | None
) -> list[tuple[int, Prepared | Reject]]:
    # One step for all of them, then the next: the code of a single step stays in a processor's caches.
    fitted = [_fit(original.item, original.level, config, label_map) for original in batch]
    return [
        (original.place, _finish(original, result, config, label_map))
        for original, result in zip(batch, fitted, strict=True)
    ]


def _fit(item: SourceItem, level: str | None, config: ShardConfig, label_map: dict[str, int] | None) -> _Fitted | str:
    """An item at the recipe's size, or the reason why it is rejected. Not the error, which would hold the pixels."""
    try:
        if item.fault or item.image is None:
            raise ImageError(item.fault)
        if label_map and level is None:
            raise ImageError("no label: other images of the source have one")
        if level is not None and label_map and level not in label_map:
            raise ImageError(f"label out of range: {level!r} among whole numbers")
        picture = _picture(item.image)
        height, width = picture.pixels.shape[:2]
        size = config.image_size
        if config.resize == "exact" and (width, height) != (size, size):
            raise ImageError(
                f"wrong size: is {width} x {height}, expected {size} x {size} (--shard.resize crop accepts any size)"
            )
        if min(height, width) < 2:
            raise ImageError(f"too small: is {width} x {height}")
        small = resize_and_crop(picture.pixels, size)
        kind = f"{picture.file_format} {picture.mode}"
        return _Fitted(picture.width, picture.height, kind, small, encode(small, config.image_format))
    except ImageError as error:
        return str(error)


def _finish(
    original: _Original, fitted: _Fitted | str, config: ShardConfig, label_map: dict[str, int] | None
) -> Prepared | Reject:
    item, level = original.item, original.level
    source_bytes = item.image.tobytes() if isinstance(item.image, np.ndarray) else item.image
    if isinstance(fitted, str) or source_bytes is None:
        sha256 = item.sha256 if source_bytes is None else hash_bytes(source_bytes)
        return Reject(item.facts.get("source") or original.run, original.key, str(fitted), sha256)
    facts = {**item.facts}
    if level is not None:
        facts["level"] = level
        facts["label"] = label_map[level] if label_map else None
    origin = Origin.of(fitted.width, fitted.height, fitted.kind, source_bytes, fitted.pixels)
    return Prepared(Sample(key=original.key, image_format=config.image_format, data=fitted.data, facts=facts), origin)


def _picture(image: bytes | np.ndarray) -> Picture:
    if isinstance(image, bytes):
        return load(image)
    height, width = image.shape[:2]
    return Picture(image, width, height, "pixels", "RGB")


def key_of(run: Run, entry: Entry, *, renamed: bool) -> str:
    """A sample's key: safe, and another one for each image of a source."""
    key = safe_key(run.prefix, entry.name)
    if not renamed:
        return key
    return f"{key[: KEY_CHARACTERS - 17]}-{hash_bytes(f'{run.name}#{entry.position}'.encode())[:16]}"


@functools.lru_cache(maxsize=1)
def _label_map(spool: str) -> dict[str, int] | None:
    """Of the index whose spool this is: read by each worker, since it is too long to go with every job."""
    return Artifact.open(Folder(spool.rpartition("/")[0])).facts["label_map"]
