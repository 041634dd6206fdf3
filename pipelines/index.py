"""The index stage: what a source contains, one row an image, made in parallel and kept as Parquet.

`index-000000.parquet` and so on have a row group for each run, with its images in order; `runs.parquet` has a row for
each run; `renamed.parquet` names the images whose key an earlier image has.
"""

import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.cluster_check import check_source
from pipelines.config import recipe_of
from pipelines.progress import Progress
from pipelines.sources import SOURCES, AnySource
from pipelines.sources.base import Part, Run, RunIndex
from pipelines.sources.class_folders import EXTENSIONS
from pipelines.sources.files import forget_files
from pipelines.stage import Made, Pipeline, WorkClock, Workspace, fan_out, read_sidecar, write_sidecar
from vqvae_core.artifacts import Artifact, FileEntry, hash_bytes, hash_json
from vqvae_core.storage import Folder

KIND = "SourceIndex"
VERSION = 2
RUNS, RENAMED = "runs.parquet", "renamed.parquet"
SPOOL = "spool"
_PARTS_PER_FILE = 32
_HASHES_AT_ONCE = 1 << 23  # some 50 bytes each while they are sorted
_MOST_COMPARED = 1 << 28  # keys of a larger source are not compared: each gets a hash of its place
_MAX_BYTES = (1 << 31) - 1
KEY_CHARACTERS = 90
_UNSAFE = re.compile(r"[^A-Za-z0-9_-]")

_ENTRIES = pa.schema(
    [
        ("name", pa.binary()),
        ("level", pa.dictionary(pa.int32(), pa.string())),
        ("validation", pa.bool_()),
        ("offset", pa.int64()),
        ("num_bytes", pa.int32()),
        ("key_hash", pa.uint64()),
    ]
)
_COLUMNS = ["name", "level", "validation", "offset", "num_bytes"]  # what is held in memory
RUNS_SCHEMA = pa.schema(
    [
        ("file", pa.int32()),
        ("row_group", pa.int32()),
        ("train", pa.int32()),
        ("validation", pa.int32()),
        ("name", pa.string()),
        ("prefix", pa.string()),
        ("locator", pa.string()),
    ]
)
_RENAMED = pa.schema([("run", pa.int32()), ("position", pa.int32())])


def make_index(pipeline: Pipeline, source: AnySource) -> "SourceIndex":
    """The index of a source."""
    forget_files()
    source.check()
    recipe = {**recipe_of(source), **source.identity()}
    artifact = pipeline.make(
        "index",
        version=VERSION,
        kind=KIND,
        recipe=recipe,
        inputs={},
        build=lambda space, run: _build(pipeline, source, space),
    )
    return SourceIndex(artifact)


def source_to_json(source: AnySource) -> dict[str, Any]:
    name = next(name for name, kind in SOURCES.items() if isinstance(source, kind))
    return {"name": name, "config": asdict(source)}


def source_from_json(values: dict[str, Any]) -> AnySource:
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in values["config"].items()}
    return SOURCES[values["name"]](**fields)


def _build(pipeline: Pipeline, source: AnySource, space: Workspace) -> Made:
    check_source(pipeline.session, source)
    parts = source.parts()
    spec = {"folder": space.folder.uri, "work": space.work, "source": source_to_json(source)}
    batches = [parts[start : start + _PARTS_PER_FILE] for start in range(0, len(parts), _PARTS_PER_FILE)]
    names = [f"index-{number:06d}" for number in range(len(batches))]
    done = _finished(space, dict(zip(names, batches, strict=True)))
    jobs = (
        {**spec, "name": name, "parts": [asdict(part) for part in batch]}
        for name, batch in zip(names, batches, strict=True)
        if name not in done
    )
    clock = WorkClock()
    with Progress("index", len(parts), "parts", done=_PARTS_PER_FILE * len(done)) as progress:
        for result in fan_out(pipeline.session, index_parts, jobs):
            clock.add(result)
            done.add(result["name"])
            progress.advance_to(min(len(parts), progress.done + _PARTS_PER_FILE))
    files = []
    levels: set[str] = set()
    ignored: Counter[str] = Counter()
    for record in space.records(names):
        files += [FileEntry(**record["file"]), *(FileEntry(**file) for file in record["spooled"])]
        levels.update(record["levels"])
        ignored.update(record["ignored"])
    runs, num_runs = _write_runs(space, names)
    counts = _counts(runs)
    compared = counts.sum() <= _MOST_COMPARED
    renamed, num_renamed = _write_renamed(space.folder, names if compared else [], runs)
    facts = {
        "runs": num_runs,
        "images": {"train": int(counts[:, 0].sum()), "validation": int(counts[:, 1].sum())},
        "label_map": source.labels(levels),
        "renamed": num_renamed if compared else int(counts.sum()),
        "ignored": dict(sorted(ignored.items())),
    }
    files += [
        _written(space.folder, RUNS, runs, num_runs),
        _written(space.folder, RENAMED, renamed, num_renamed),
    ]
    return Made(files, facts, clock.seconds)


def _finished(space: Workspace, batches: dict[str, list[Part]]) -> set[str]:
    """The files of the index that are there, each of the same parts as now: a folder without images is in no
    fingerprint, and where one came or went the parts have moved from file to file."""
    there = [name for name, found in zip(batches, space.finished_parts(batches), strict=True) if found]
    return {
        record["name"]
        for record in space.records(there)
        if record.get("parts") == hash_json([asdict(part) for part in batches[record["name"]]])
    }


def _written(folder: Folder, name: str, table: pa.Table, rows: int) -> FileEntry:
    data = to_parquet(table)
    folder.write(name, data)
    return FileEntry.of(name, data, rows=rows)


def to_parquet(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", row_group_size=1 << 16)
    return buffer.getvalue()


def index_parts(job: dict[str, Any]) -> dict[str, Any]:
    """Index some parts of a source into one file, a row group a run; its sidecar has the runs."""
    folder, name = Folder(job["folder"]), job["name"]
    done = read_sidecar(folder, job["work"], name)
    parts = hash_json(job["parts"])
    if done is not None and done.get("parts") == parts:
        return done
    forget_files()
    source, spool = source_from_json(job["source"]), folder / SPOOL
    runs: list[dict[str, Any]] = []
    levels: set[str] = set()
    ignored: Counter[str] = Counter()
    buffer = io.BytesIO()
    num_images = 0
    with pq.ParquetWriter(buffer, _ENTRIES, compression="zstd") as writer:
        for values in job["parts"]:
            for found in source.index(Part(**values), spool):
                ignored.update(found.ignored)
                if not found.entries:
                    continue
                writer.write_table(_table(found), row_group_size=len(found.entries))
                levels.update(entry.level for entry in found.entries if entry.level is not None)
                validation = sum(entry.split == "validation" for entry in found.entries)
                num_images += len(found.entries)
                runs.append(
                    {
                        "train": len(found.entries) - validation,
                        "validation": validation,
                        "name": found.run.name,
                        "prefix": found.run.prefix,
                        "locator": json.dumps(found.run.locator),
                    }
                )
    data = buffer.getvalue()
    folder.write(f"{name}.parquet", data)
    file = FileEntry.of(f"{name}.parquet", data, rows=num_images)
    spooled = [asdict(_spooled(folder, run)) for run in runs if "spool" in json.loads(run["locator"])]
    return write_sidecar(folder, job["work"], name, file, parts=parts, runs=runs, levels=sorted(levels),
                         ignored=ignored, spooled=spooled)  # fmt: skip


def _spooled(folder: Folder, run: dict[str, Any]) -> FileEntry:
    path = f"{SPOOL}/{json.loads(run['locator'])['spool']}"
    return FileEntry.of(path, folder.read(path))


def _table(found: RunIndex) -> pa.Table:
    entries = found.entries
    keys = [safe_key(found.run.prefix, entry.name) for entry in entries]
    columns = {
        "name": pa.array([os.fsencode(entry.name) for entry in entries], pa.binary()),
        "level": pa.array([entry.level for entry in entries], pa.string()).dictionary_encode(),
        "validation": pa.array([entry.split == "validation" for entry in entries]),
        "offset": pa.array([entry.offset for entry in entries], pa.int64()),
        "num_bytes": pa.array([min(entry.num_bytes, _MAX_BYTES) for entry in entries], pa.int32()),
        "key_hash": pa.array([int(hash_bytes(key.encode())[:16], 16) for key in keys], pa.uint64()),
    }
    return pa.table(columns, schema=_ENTRIES)


def safe_key(prefix: str, name: str) -> str:
    """A WebDataset key: letters, digits, - and _ only, so that it is no path and has no extension."""
    stem, dot, extension = name.rpartition(".")
    stem = stem if dot + extension.lower() in EXTENSIONS else name
    text = stem if stem.startswith(prefix) else f"{prefix}_{stem}"
    return _UNSAFE.sub("_", text)[:KEY_CHARACTERS] or "_"


def _write_runs(space: Workspace, names: Sequence[str]) -> tuple[pa.Table, int]:
    """The table of all runs, in order."""

    def rows() -> Iterator[dict[str, Any]]:
        for number, record in enumerate(space.records(names)):
            for row_group, run in enumerate(record["runs"]):
                yield {"file": number, "row_group": row_group, **run}

    table = table_of(rows(), RUNS_SCHEMA)
    return table, table.num_rows


def table_of(rows: Iterable[dict[str, Any]], schema: pa.Schema, chunk_rows: int = 1 << 16) -> pa.Table:
    """A table of rows that come one by one, without all of them as Python objects at the same time."""
    batches, waiting = [], []
    for row in rows:
        waiting.append(row)
        if len(waiting) == chunk_rows:
            batches.append(pa.RecordBatch.from_pylist(waiting, schema=schema))
            waiting = []
    batches.append(pa.RecordBatch.from_pylist(waiting, schema=schema))
    return pa.Table.from_batches(batches, schema=schema)


def _counts(runs: pa.Table) -> np.ndarray:
    return np.stack([runs["train"].to_numpy(), runs["validation"].to_numpy()], axis=1).astype(np.int64)


def _write_renamed(folder: Folder, names: Sequence[str], runs: pa.Table) -> tuple[pa.Table, int]:
    """The images whose key an earlier one has already. Keys are compared by 64 bits of their hash, as many at a time
    as fit a fixed part of memory."""
    counts = _counts(runs).sum(axis=1)
    starts = np.cumsum(counts) - counts
    num_passes = max(1, -(-int(counts.sum()) // _HASHES_AT_ONCE))
    later: list[np.ndarray] = []
    for number in range(num_passes):
        hashes, rows = [], []
        first = 0
        for name in names:
            found = pq.read_table(io.BytesIO(folder.read(f"{name}.parquet")), columns=["key_hash"])["key_hash"]
            values = found.to_numpy()
            mine = np.flatnonzero(values % np.uint64(num_passes) == number)
            hashes.append(values[mine])
            rows.append(mine + first)
            first += len(values)
        later.append(_repeated(np.concatenate(hashes), np.concatenate(rows)) if hashes else np.zeros(0, np.int64))
    images = np.sort(np.concatenate(later))
    run = np.searchsorted(starts, images, side="right") - 1
    position = images - starts[run]
    table = pa.table({"run": run.astype(np.int32), "position": position.astype(np.int32)}, schema=_RENAMED)
    return table, len(images)


def _repeated(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The rows whose value an earlier row has."""
    order = np.argsort(values, kind="stable")
    same = values[order][1:] == values[order][:-1]
    return rows[order[1:][same]]


@dataclass(frozen=True)
class Entries:
    """Some images of an index: `table` has a row for each, with the columns of _COLUMNS and `run`, `position`,
    `renamed`."""

    table: pa.Table

    @property
    def num_bytes_in_memory(self) -> int:
        return self.table.nbytes

    def take(self, rows: np.ndarray) -> "Entries":
        return Entries(self.table.take(pa.array(rows)))


@dataclass(frozen=True)
class SourceIndex:
    """The artifact of the index stage. Facts: runs, images {split: count}, label_map, renamed, ignored {extension:
    files that are no images}."""

    artifact: Artifact

    @property
    def label_map(self) -> dict[str, int] | None:
        return self.artifact.facts["label_map"]

    @property
    def ignored(self) -> dict[str, int]:
        return self.artifact.facts["ignored"]

    @property
    def spool(self) -> Folder:
        return self.artifact.folder / SPOOL

    def counts(self) -> np.ndarray:
        """int64 (R, 2): images of each run in the source's train and validation split."""
        return _counts(self._columns(["train", "validation"]))

    def _columns(self, names: list[str]) -> pa.Table:
        return pq.read_table(io.BytesIO(self.artifact.read(RUNS)), columns=names)

    @cached_property
    def _names(self) -> pa.Table:
        """Name, prefix and locator of each run: about 100 bytes, which is nothing an image."""
        return self._columns(["name", "prefix", "locator"])

    @cached_property
    def _places(self) -> tuple[np.ndarray, np.ndarray]:
        places = self._columns(["file", "row_group"])
        return places["file"].to_numpy(), places["row_group"].to_numpy()

    def runs(self, numbers: Iterable[int]) -> dict[int, Run]:
        """Some runs by their number."""
        wanted = sorted(set(numbers))
        rows = self._names.take(pa.array(wanted, pa.int64())).to_pylist()
        return {
            number: Run(name=row["name"], prefix=row["prefix"], locator=json.loads(row["locator"]))
            for number, row in zip(wanted, rows, strict=True)
        }

    def entries(self, runs: np.ndarray) -> Entries:
        """The images of some runs (ascending), in the order of the index. At most 64 bytes an image for names of up to
        32 bytes."""
        files, row_groups = self._places
        tables, per_run = [], []
        for file in np.unique(files[runs]):
            mine = runs[files[runs] == file]
            data = pq.ParquetFile(io.BytesIO(self.artifact.read(f"index-{file:06d}.parquet")))
            per_run += [data.metadata.row_group(group).num_rows for group in row_groups[mine].tolist()]
            tables.append(data.read_row_groups(row_groups[mine].tolist(), columns=_COLUMNS))
        counts = np.array(per_run, np.int64)
        table = pa.concat_tables(tables).unify_dictionaries().combine_chunks()
        starts = np.repeat(np.cumsum(counts) - counts, counts)
        run = np.repeat(runs.astype(np.int32), counts)
        position = (np.arange(len(run)) - starts).astype(np.int32)
        table = table.append_column("run", pa.array(run)).append_column("position", pa.array(position))
        renamed = self._is_renamed(runs, np.cumsum(counts) - counts, len(run))
        return Entries(table.append_column("renamed", pa.array(renamed)))

    def _is_renamed(self, runs: np.ndarray, starts: np.ndarray, num_images: int) -> np.ndarray:
        """bool (num_images,) for the images of some runs (ascending), which start at these places."""
        if self.artifact.facts["renamed"] == sum(self.artifact.facts["images"].values()):
            return np.ones(num_images, bool)
        table = pq.read_table(io.BytesIO(self.artifact.read(RENAMED)))
        mine = np.isin(table["run"].to_numpy(), runs)
        run, position = table["run"].to_numpy()[mine], table["position"].to_numpy()[mine]
        found = np.zeros(num_images, bool)
        found[starts[np.searchsorted(runs, run)] + position] = True
        return found
