"""The shard stage: a source of images to WebDataset tars of one size, split by split, with rejects counted.

Where a source can be read anywhere, each task reads the images of its shard. Where it can't (Parquet row groups, live
engines), a first pass reads each run once and stages its small images, sorted by shard; a second pass makes the shards.
"""

import dataclasses
import io
import itertools
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.cluster_check import check_source
from pipelines.config import ShardConfig, recipe_of
from pipelines.data_report import REPORT, SHEET, DataReport, Origin, contact_sheet, summarize
from pipelines.index import (
    Entries,
    SourceIndex,
    make_index,
    source_to_json,
    to_parquet,
)
from pipelines.plan import SPLITS, Plan, PlannedShard, make_plan
from pipelines.prepare import Prepared, Reject, pack, prepare, to_ipc
from pipelines.progress import Progress
from pipelines.sources import AnySource
from pipelines.sources.base import Run, SourceError
from pipelines.stage import Made, Pipeline, WorkClock, Workspace, check_space, fan_out, read_sidecar, write_sidecar
from vqvae_core.artifacts import Artifact, FileEntry, FileTable
from vqvae_core.errors import InputError
from vqvae_core.image_shards import KIND, ImageShards, Sample, read_tar, write_tar
from vqvae_core.storage import Folder

VERSION = 4
REJECTS = "rejects.parquet"
STAGING = "staging"
_STAGED = pa.schema(
    [
        ("place", pa.int32()),
        ("key", pa.string()),
        ("data", pa.binary()),
        ("facts", pa.string()),
        ("origin", pa.string()),
    ]
)
_REJECT = pa.schema([("source", pa.string()), ("key", pa.string()), ("reason", pa.string()), ("sha256", pa.string())])


class RejectedError(InputError):
    """More images were rejected than the recipe allows."""


def shard(pipeline: Pipeline, source: AnySource, config: ShardConfig) -> ImageShards:
    """The image shards of a source."""
    _check_holdout(source, config)
    index = make_index(pipeline, source)
    artifact = pipeline.make(
        "shard",
        version=VERSION,
        kind=KIND,
        recipe=recipe_of(config),
        inputs={"index": index.artifact},
        build=lambda space, run: _Build(pipeline, source, config, index, space).made(),
    )
    _check_reused(artifact, config.max_rejected_fraction)
    return ImageShards(artifact)


def _check_holdout(source: AnySource, config: ShardConfig) -> None:
    """Frames of an episode look alike: drawn one by one, those held back would be known from training."""
    if config.holdout_images and source.has_episodes:
        raise InputError(
            f"expected a source of single images to hold some back, found {type(source).__name__}, whose episodes are "
            f"never split, and --shard.holdout-images {config.holdout_images}; set it to 0: whole episodes are the "
            "validation split"
        )


def _check_reused(artifact: Artifact, max_rejected_fraction: float) -> None:
    """The limit is no part of the recipe, so shards that were made under a wider one are found again."""
    rejected, num_images = sum(artifact.facts["rejects"].values()), artifact.facts["source_images"]
    if rejected > max_rejected_fraction * num_images:
        raise RejectedError(
            f"expected at most {int(max_rejected_fraction * num_images)} rejected images of {num_images} "
            f"(--shard.max-rejected-fraction), found {rejected} in {artifact.folder.uri}, which was made with a wider "
            f"limit: see {artifact.folder.path(REJECTS)}"
        )


class _Build:
    """The driver's side: plans, hands out the work group by group, and gathers what came of it."""

    def __init__(
        self, pipeline: Pipeline, source: AnySource, config: ShardConfig, index: SourceIndex, space: Workspace
    ) -> None:
        self._session, self._source, self._config = pipeline.session, source, config
        self._index, self._space = index, space
        self._plan = make_plan(index.counts(), config)
        self._spec = {
            "folder": space.folder.uri,
            "work": space.work,
            "config": dataclasses.asdict(config),
            "source": source_to_json(source),
            "spool": index.spool.uri,
        }
        self._clock = WorkClock()
        self._rejected: list[list[str]] = []
        self._limit = config.max_rejected_fraction * self._plan.num_images

    def made(self) -> Made:
        plan, space = self._plan, self._space
        if not plan.num_shards(0):
            raise SourceError(
                f"expected images to train on, the source has {int(self._index.counts().sum())} images and none in "
                "the train split"
            )
        check_source(self._session, self._source)
        # Shards one by one and never all of them: there may be millions.
        done = space.finished_parts(shard.name for shard in self._shards())
        num_missing = sum(shard.count for shard, there in zip(self._shards(), done, strict=True) if not there)
        self._check_space(num_missing)
        missing = itertools.compress(self._shards(), ~done)
        with Progress("shard", plan.num_images, "images", done=plan.num_images - num_missing) as progress:
            for number, shards in itertools.groupby(missing, key=lambda shard: shard.group):
                self._make_group(number, list(shards), progress)
        space.folder.delete_folder(STAGING)
        return self._collect()

    def _shards(self) -> Iterator[PlannedShard]:
        return itertools.chain.from_iterable(map(self._plan.shards, range(self._plan.num_groups)))

    def _check_space(self, num_images: int) -> None:
        # Half of the raw pixels without loss, a quarter as JPEG: frames take less, noise more.
        image_bytes = self._config.image_size**2 * 3 // (4 if self._config.image_format == "jpg" else 2)
        staged = 0 if self._source.random_access else min(num_images, self._config.mix_images)  # beside the shards
        check_space(self._space.folder, (num_images + staged) * image_bytes, f"{num_images} images in shards")

    def _make_group(self, number: int, missing: list[PlannedShard], progress: Progress) -> None:
        group = _Group.load(self._index, self._plan, number)
        if self._source.random_access:
            jobs = (self._shard_job(shard, reads=group.reads(np.sort(group.rows(shard)))) for shard in missing)
        else:
            staged = self._stage(group)
            jobs = (
                self._shard_job(
                    shard,
                    segments=[
                        [record["file"]["path"], *place]
                        for record in staged
                        if (place := record["segments"].get(shard.name))
                    ],
                    rejects=[reject for record in staged for reject in record["rejects"] if reject[0] == shard.name],
                )
                for shard in missing
            )
        for result in fan_out(self._session, make_shard, jobs):
            self._clock.add(result)
            if self._source.random_access:
                self._check(result["rejects"])
            progress.advance_to(progress.done + result["file"]["rows"] + len(result["rejects"]))
        self._space.folder.delete_folder(STAGING)

    def _shard_job(self, shard: PlannedShard, **how: Any) -> dict[str, Any]:
        return {"spec": self._spec, "name": shard.name, "count": shard.count, **how}

    def _stage(self, group: "_Group") -> list[dict[str, Any]]:
        """The first pass over a group: the records of its staged files, in order."""
        shards = [shard.name for shard in self._plan.shards(group.number)]
        batches = group.batches(len(shards))
        names = [f"g{group.number:06d}-{number:06d}" for number in range(len(batches))]
        done = set(itertools.compress(names, self._space.finished_parts(names, STAGING)))
        total = sum(shard.count for shard in self._plan.shards(group.number))

        def jobs() -> Iterator[dict[str, Any]]:
            for name, rows in zip(names, batches, strict=True):
                if name not in done:
                    goals = [shards[number] for number in group.shard[rows].tolist()]
                    yield {"spec": self._spec, "name": name, "reads": group.reads(rows), "shards": goals}

        first = sum(len(rows) for name, rows in zip(names, batches, strict=True) if name in done)
        with Progress("shard: reading first", total, "images", done=first) as reading:
            for result in fan_out(self._session, stage_runs, jobs()):
                self._clock.add(result)
                self._check(result["rejects"])
                reading.advance_to(reading.done + result["file"]["rows"] + len(result["rejects"]))
        return list(self._space.records(names, STAGING))

    def _check(self, rejects: list[list[str]]) -> None:
        """An early stop where too much is rejected."""
        self._rejected += rejects
        if len(self._rejected) > self._limit:
            first = _first([reject[-4:] for reject in self._rejected])
            raise RejectedError(
                f"expected at most {int(self._limit)} rejected images of {self._plan.num_images} "
                f"(--shard.max-rejected-fraction), found {len(self._rejected)} so far: {first}"
            )

    def _collect(self) -> Made:
        """The files and facts, out of all sidecars: those of an earlier run as well."""
        rejects: list[list[str]] = []
        report = DataReport()
        files = FileTable.of(self._gather(report, rejects))
        rejects.sort()
        self._rejected = []
        self._check(rejects)
        splits = dict(_splits(files))
        report.ignored.update(self._index.ignored)
        if not splits["train"]["images"]:
            raise SourceError(f"expected images to train on, all {len(rejects)} were rejected: {_first(rejects)}")
        summary = report.to_json()
        facts = {
            "size": self._config.image_size,
            "image_format": self._config.image_format,
            "splits": splits,
            "label_map": self._index.label_map,
            "source_images": self._plan.num_images,
            **{name: summary[name] for name in ("rejects", "ignored", "exact_duplicates", "mean", "deviation")},
        }
        extra = [
            (REJECTS, to_parquet(_reject_table(rejects)), len(rejects)),
            (REPORT, (json.dumps({**summary, "splits": splits}, indent=1) + "\n").encode(), 0),
            (SHEET, self._sheet(files), 0),
        ]
        for name, data, _ in extra:
            self._space.folder.write(name, data)
        more = [FileEntry.of(name, data, rows=rows) for name, data, rows in extra]
        return Made(itertools.chain(files.values(), more), facts, self._clock.seconds)

    def _gather(self, report: DataReport, rejects: list[list[str]]) -> Iterator[FileEntry]:
        """The files of the shards, one by one; what else their sidecars say is added to the report and the rejects."""
        for record in self._space.records(shard.name for shard in self._shards()):
            rejects += record["rejects"]
            report.rejects.update(_kind(reject[2]) for reject in record["rejects"])
            report.add(record["name"].split("-")[0], record["images"])
            if record["file"]["rows"]:
                yield FileEntry(**record["file"])

    def _sheet(self, files: FileTable) -> bytes:
        first = next(file for file in files.values() if file.path.startswith(SPLITS[0]))
        samples = read_tar(self._space.folder.read(first.path), first.path)
        return contact_sheet([sample.pixels() for sample, _ in zip(samples, range(64), strict=False)])


def _kind(reason: str) -> str:
    return reason.split(":")[0]


def _first(rejects: list[list[str]]) -> str:
    return "; ".join(f"{source} {key} {reason}" for source, key, reason, _ in sorted(rejects)[:10])


def _reject_table(rejects: list[list[str]]) -> pa.Table:
    columns = list(zip(*rejects, strict=True)) or [()] * len(_REJECT)
    return pa.table([pa.array(column, pa.string()) for column in columns], schema=_REJECT)


def _splits(files: FileTable) -> Iterator[tuple[str, dict[str, int]]]:
    for split in SPLITS:
        rows = [file.rows for file in files.values() if file.path.startswith(f"{split}-")]
        if rows or split != "test":  # most sources have no test split
            yield split, {"shards": len(rows), "images": sum(rows)}


@dataclass(frozen=True)
class _Group:
    """One group of the plan with its images, at most 64 bytes each. shard: int32 (N,), the number of each image's shard
    in the group, -1 for one that is left out; place: its place in that shard; order: of each split, its images in the
    order of its shards."""

    number: int
    entries: Entries
    shard: np.ndarray
    place: np.ndarray
    order: tuple[np.ndarray, ...]
    runs: dict[int, Run]

    @classmethod
    def load(cls, index: SourceIndex, plan: Plan, number: int) -> "_Group":
        entries = index.entries(plan.runs_of(number))
        held_out = entries.table["validation"].to_numpy()
        shard, place = np.full(len(held_out), -1, np.int32), np.full(len(held_out), -1, np.int32)
        order, first = [], 0
        for split, origin in enumerate(plan.origins):
            images = np.flatnonzero(held_out == bool(origin)).astype(np.int32)[plan.order(number, split)]
            numbers = np.arange(len(images))
            shard[images] = first + numbers // plan.images_per_shard
            place[images] = numbers % plan.images_per_shard
            first += -(-len(images) // plan.images_per_shard)
            order.append(images)
        return cls(number, entries, shard, place, tuple(order), index.runs(plan.runs_of(number)))

    def rows(self, shard: PlannedShard) -> np.ndarray:
        """Of `entries`: the images of a shard, in its order."""
        return self.order[shard.split][shard.first : shard.first + shard.count]

    def reads(self, rows: np.ndarray) -> dict[str, Any]:
        """What a task reads of `entries`, at ascending rows: see `pack`."""
        table = self.entries.take(rows).table.append_column("place", pa.array(self.place[rows]))
        runs, counts = np.unique(table["run"].to_numpy(), return_counts=True)
        return pack([self.runs[number] for number in runs.tolist()], counts.tolist(), table)

    def batches(self, num_shards: int) -> list[np.ndarray]:
        """Rows of `entries`, cut at the ends of runs into what one staging task reads: some images for each shard, so
        that the second pass reads stretches and not single images. A run is never cut, it is read in one go."""
        wanted = np.flatnonzero(self.shard >= 0)
        runs = self.entries.table["run"].to_numpy()[wanted]
        size = int(np.clip(8 * num_shards, 512, 16384))
        ends = np.flatnonzero(np.diff(runs, append=-1)) + 1
        batches, begin = [], 0
        for end in ends.tolist():
            if end - begin >= size or end == len(wanted):
                batches.append(wanted[begin:end])
                begin = end
        return batches


def stage_runs(job: dict[str, Any]) -> dict[str, Any]:
    """First pass: read some runs, and write their images at their final size, sorted by shard, into one file."""
    spec = job["spec"]
    folder, name = Folder(spec["folder"]) / STAGING, job["name"]
    done = read_sidecar(folder, spec["work"], name)
    if done is not None:
        return done
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    rejects = []
    for (place, prepared), shard in zip(prepare(spec, job["reads"]), job["shards"], strict=True):
        if isinstance(prepared, Reject):
            rejects.append([shard, *dataclasses.astuple(prepared)])
            continue
        rows[shard].append(
            {
                "place": place,
                "key": prepared.sample.key,
                "data": prepared.sample.data,
                "facts": json.dumps(prepared.sample.facts),
                "origin": json.dumps(dataclasses.asdict(prepared.origin)),
            }
        )
    buffer, segments = io.BytesIO(), {}
    for shard in sorted(rows):
        begin = buffer.tell()
        table = pa.Table.from_pylist(sorted(rows[shard], key=lambda row: row["place"]), schema=_STAGED)
        buffer.write(to_ipc(table))
        segments[shard] = [begin, buffer.tell() - begin]
    data = buffer.getvalue()
    folder.write(f"{name}.arrows", data)
    file = FileEntry.of(f"{name}.arrows", data, rows=sum(map(len, rows.values())))
    return write_sidecar(folder, spec["work"], name, file, segments=segments, rejects=rejects)


def make_shard(job: dict[str, Any]) -> dict[str, Any]:
    """Make one shard from the source or from staged images, and its sidecar after it."""
    spec = job["spec"]
    folder, name = Folder(spec["folder"]), job["name"]
    done = read_sidecar(folder, spec["work"], name)
    if done is not None:
        return done
    made: dict[int, Prepared] = {}
    rejects: list[list[str]] = []
    if "reads" in job:
        for place, prepared in prepare(spec, job["reads"]):
            if isinstance(prepared, Reject):
                rejects.append(list(dataclasses.astuple(prepared)))
            else:
                made[place] = prepared
    else:
        rejects = [reject[1:] for reject in job["rejects"]]
        for path, offset, num_bytes in job["segments"]:
            made |= _staged(folder.read(f"{STAGING}/{path}", offset, num_bytes), spec["config"]["image_format"])
    if len(made) + len(rejects) != job["count"]:
        raise SourceError(
            f"expected {job['count']} images for {name}, the source gave {len(made)} and {len(rejects)} were "
            "rejected; did it change while it was read?"
        )
    in_order = [made[place] for place in sorted(made)]
    data = write_tar(prepared.sample for prepared in in_order)
    images = summarize(
        (prepared.origin for prepared in in_order),
        (prepared.sample.facts.get("level") for prepared in in_order),
        spec["config"]["image_size"],
    )
    folder.write(f"{name}.tar", data)
    file = FileEntry.of(f"{name}.tar", data, rows=len(made))
    return write_sidecar(folder, spec["work"], name, file, rejects=sorted(rejects), images=images)


def _staged(data: bytes, image_format: str) -> dict[int, "Prepared"]:
    rows = pa.ipc.open_stream(data).read_all().to_pylist()
    return {
        row["place"]: Prepared(
            Sample(key=row["key"], image_format=image_format, data=row["data"], facts=json.loads(row["facts"])),
            Origin(**json.loads(row["origin"])),
        )
        for row in rows
    }


if __name__ == "__main__":
    from pipelines import cli, full

    cli.run(lambda arguments: full.main(arguments, until="shard"))
