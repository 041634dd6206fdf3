"""The shard stage: a source of images to WebDataset tars of one size, train and validation, with rejects counted.

Where a source can be read anywhere, each task reads the images of its shard. Where it can't (Parquet row groups, live
engines), a first pass reads each run once and stages its small images, sorted by shard; a second pass makes the shards.
"""

import dataclasses
import io
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.config import ShardConfig, recipe_of
from pipelines.progress import Progress
from pipelines.sources import SOURCES, AnySource
from pipelines.sources.base import Run, SourceError, SourceIndex, SourceItem
from pipelines.stage import Made, Pipeline, WorkClock, Workspace, check_space, fan_out, read_sidecar, write_sidecar
from pipelines.tracking import StageRun
from vqvae_core.artifacts import FileEntry, hash_bytes
from vqvae_core.checkpoint import config_from_json
from vqvae_core.errors import InputError
from vqvae_core.image_shards import KIND, ImageShards, Sample, write_tar
from vqvae_core.images import ImageError, decode, encode, resize_and_crop
from vqvae_core.storage import Folder
from vqvae_core.stream import permutation

VERSION = 1
SPLITS = ("train", "validation")
REJECTS = "rejects.parquet"
_STAGED = pa.schema(
    [("shard", pa.int32()), ("place", pa.int32()), ("key", pa.string()), ("data", pa.binary()), ("facts", pa.string())]
)
_REJECT = pa.schema([("source", pa.string()), ("key", pa.string()), ("reason", pa.string()), ("sha256", pa.string())])


class RejectedError(InputError):
    """More images were rejected than the recipe allows."""


def shard(pipeline: Pipeline, source: AnySource, config: ShardConfig) -> ImageShards:
    """The image shards of a source."""
    source.check()
    recipe = {"source": {**recipe_of(source), **source.identity()}, "shard": recipe_of(config)}
    artifact = pipeline.make(
        "shard",
        version=VERSION,
        kind=KIND,
        recipe=recipe,
        inputs={},
        build=lambda space, run: _build(pipeline, source, config, space, run),
    )
    return ImageShards(artifact)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which image goes where: shard (index into names) and place of each image of the index, -1 for one left out."""

    names: list[str]
    shard: np.ndarray
    place: np.ndarray

    def images_of(self, shard: int) -> np.ndarray:
        """The images of a shard, in its order."""
        images = np.flatnonzero(self.shard == shard)
        return images[np.argsort(self.place[images])]


def make_plan(index: SourceIndex, config: ShardConfig) -> Plan:
    """A pure function of the index and the recipe: each split is permuted by the seed and cut into shards."""
    names: list[str] = []
    shard = np.full(index.num_images, -1, np.int32)
    place = np.full(index.num_images, -1, np.int32)
    limits = (config.max_train_images, config.max_validation_images)
    for number, (split, limit) in enumerate(zip(SPLITS, limits, strict=True)):
        images = np.flatnonzero(index.validation == (split == "validation"))
        images = images[permutation(len(images), config.seed, number)][:limit]
        order = np.arange(len(images))
        shard[images] = len(names) + order // config.images_per_shard
        place[images] = order % config.images_per_shard
        count = -(-len(images) // config.images_per_shard)
        names += [f"{split}-{position:06d}" for position in range(count)]
    return Plan(names, shard, place)


def _build(pipeline: Pipeline, source: AnySource, config: ShardConfig, space: Workspace, run: StageRun) -> Made:
    index = source.index()
    plan = make_plan(index, config)
    planned = Counter(name.split("-")[0] for name in plan.names)
    if not planned["train"]:
        raise SourceError(
            f"expected images to train on, the source has {index.num_images} images and none in the train split"
        )
    num_images = int((plan.shard >= 0).sum())
    spec = {
        "folder": space.folder.uri,
        "work": space.work,
        "config": dataclasses.asdict(config),
        "source": {"name": _name_of(source), "config": dataclasses.asdict(source)},
        "label_map": index.label_map,
    }
    clock = WorkClock()
    missing = [number for number, name in enumerate(plan.names) if space.finished(name) is None]
    num_missing = int(np.isin(plan.shard, missing).sum())
    passes = 1 if source.random_access else 2  # staged images and shards lie there at the same time
    image_bytes = config.image_size**2 * 3 // 2  # half of the raw pixels: lossless frames take less, noise more
    check_space(space.folder, passes * num_missing * image_bytes, f"{num_missing} images in shards")
    limit = config.max_rejected_fraction * num_images
    if missing and not source.random_access:
        with Progress("shard (1 of 2: reading)", num_images, "images") as progress:
            _follow(fan_out(pipeline.session, stage_run, _stage_jobs(index, plan, spec)), clock, limit, progress)
    jobs = _shard_jobs(index, plan, spec, missing, source.random_access)
    done = num_images - sum(job["count"] for job in jobs)
    with Progress("shard", num_images, "images", done=done) as progress:
        _follow(fan_out(pipeline.session, make_shard, jobs), clock, limit, progress)
    records = [space.finished(name) for name in plan.names]
    made = _collect(space, index, config, plan, [record for record in records if record], clock.seconds)
    _check_rejects(_all_rejects(records), limit, num_images)
    space.folder.delete_folder("staging")
    return made


def _follow(results: Iterator[dict[str, Any]], clock: WorkClock, limit: float, progress: Progress) -> None:
    """Take results as they come: time, progress, and an early stop where too much is rejected."""
    rejects: list[dict[str, Any]] = []
    for result in results:
        clock.add(result)
        rejects += result["rejects"]
        _check_rejects(rejects, limit, progress.total)
        progress.advance_to(progress.done + result["file"]["rows"] + len(result["rejects"]))


def _name_of(source: AnySource) -> str:
    return next(name for name, kind in SOURCES.items() if isinstance(source, kind))


def _stage_jobs(index: SourceIndex, plan: Plan, spec: dict[str, Any]) -> list[dict[str, Any]]:
    """One job for each run: where each of its images goes."""
    order = np.argsort(index.run, kind="stable")
    bounds = np.searchsorted(index.run[order], np.arange(len(index.runs) + 1))
    jobs = []
    for number, run in enumerate(index.runs):
        images = order[bounds[number] : bounds[number + 1]]
        images = images[plan.shard[images] >= 0]
        if len(images):
            jobs.append(
                {
                    "spec": spec,
                    "number": number,
                    "run": dataclasses.asdict(run),
                    "positions": index.position[images].tolist(),
                    "shards": plan.shard[images].tolist(),
                    "places": plan.place[images].tolist(),
                }
            )
    return jobs


def _shard_jobs(
    index: SourceIndex, plan: Plan, spec: dict[str, Any], missing: list[int], random_access: bool
) -> list[dict[str, Any]]:
    """One job for each missing shard: the runs it takes from, and for random access the positions in each."""
    jobs = []
    for number in missing:
        images = plan.images_of(number)
        job: dict[str, Any] = {"spec": spec, "number": number, "name": plan.names[number], "count": len(images)}
        if random_access:
            by_run: dict[int, list[tuple[int, int]]] = defaultdict(list)
            for place, image in enumerate(images):
                by_run[int(index.run[image])].append((int(index.position[image]), place))
            job["reads"] = [
                {
                    "run": _without_others(index.runs[run], [position for position, _ in sorted(wanted)]),
                    "wanted": sorted(wanted),
                }
                for run, wanted in sorted(by_run.items())
            ]
        else:
            job["staged"] = sorted({int(run) for run in index.run[images]})
        jobs.append(job)
    return jobs


def _without_others(run: Run, positions: list[int]) -> dict[str, Any]:
    """The run with only the entries of its per-image lists that a job needs, so that jobs stay small."""
    locator = dict(run.locator)
    for name, value in run.locator.items():
        if isinstance(value, list):
            locator[name] = {str(position): value[position] for position in positions}
    return {"name": run.name, "locator": locator}


def _source_of(spec: dict[str, Any]) -> AnySource:
    values = {
        name: tuple(value) if isinstance(value, list) else value for name, value in spec["source"]["config"].items()
    }
    return SOURCES[spec["source"]["name"]](**values)


def _run_of(values: dict[str, Any]) -> Run:
    locator = {
        name: {int(position): entry for position, entry in value.items()} if isinstance(value, dict) else value
        for name, value in values["locator"].items()
    }
    return Run(name=values["name"], locator=locator)


def stage_run(job: dict[str, Any]) -> dict[str, Any]:
    """First pass: read one run, and write its images at their final size, sorted by shard, into one staged file."""
    spec = job["spec"]
    folder, name = Folder(spec["folder"]) / "staging", f"run-{job['number']:06d}"
    done = read_sidecar(folder, spec["work"], name)
    if done is not None:
        return done
    goal = {position: goal for position, *goal in zip(job["positions"], job["shards"], job["places"], strict=True)}
    config = config_from_json(ShardConfig, spec["config"])
    rows, rejects = [], []
    for item in _source_of(spec).read(_run_of(job["run"]), sorted(goal)):
        shard, place = goal[item.position]
        sample, reject = prepare(item, config, spec["label_map"], job["run"]["name"])
        if sample is not None:
            rows.append(
                {
                    "shard": shard,
                    "place": place,
                    "key": sample.key,
                    "data": sample.data,
                    "facts": json.dumps(sample.facts),
                }
            )
        else:
            rejects.append({**reject, "shard": shard})
    rows.sort(key=lambda row: (row["shard"], row["place"]))
    buffer = io.BytesIO()
    table = pa.Table.from_pylist(rows, schema=_STAGED)
    reject_table = json.dumps(rejects)
    table = table.replace_schema_metadata({"rejects": reject_table})
    # Small row groups: a shard reads only those that hold its images.
    pq.write_table(table, buffer, compression="none", row_group_size=64)
    data = buffer.getvalue()
    folder.write(f"{name}.parquet", data)
    file = FileEntry.of(f"{name}.parquet", data, rows=len(rows))
    return write_sidecar(folder, spec["work"], name, file, rejects=rejects)


def make_shard(job: dict[str, Any]) -> dict[str, Any]:
    """Make one shard from the source or from staged runs, and its sidecar after it."""
    spec = job["spec"]
    folder, name = Folder(spec["folder"]), job["name"]
    samples: dict[int, Sample] = {}
    rejects: list[dict[str, Any]] = []
    if "reads" in job:
        config, source = config_from_json(ShardConfig, spec["config"]), _source_of(spec)
        for read in job["reads"]:
            places = dict(read["wanted"])
            for item in source.read(_run_of(read["run"]), list(places)):
                sample, reject = prepare(item, config, spec["label_map"], read["run"]["name"])
                if sample is not None:
                    samples[places[item.position]] = sample
                else:
                    rejects.append(reject)
    else:
        for run in job["staged"]:
            found, refused = _staged(folder, run, job["number"], spec["config"]["image_format"])
            samples.update(found)
            rejects += refused
    if len(samples) + len(rejects) != job["count"]:
        raise SourceError(
            f"expected {job['count']} images for {name}, the source gave {len(samples)} and {len(rejects)} were "
            "rejected; did it change while it was read?"
        )
    data = write_tar(samples[place] for place in sorted(samples))
    folder.write(f"{name}.tar", data)
    file = FileEntry.of(f"{name}.tar", data, rows=len(samples))
    return write_sidecar(folder, spec["work"], name, file, rejects=rejects)


def _staged(folder: Folder, run: int, shard: int, image_format: str) -> tuple[dict[int, Sample], list[dict[str, Any]]]:
    with (folder / "staging").open(f"run-{run:06d}.parquet") as file:
        parquet = pq.ParquetFile(file)
        groups = [group for group in range(parquet.num_row_groups) if _holds(parquet, group, shard)]
        rows = parquet.read_row_groups(groups).to_pylist() if groups else []
        rejects = json.loads((parquet.schema_arrow.metadata or {}).get(b"rejects", b"[]"))
    samples = {
        row["place"]: Sample(
            key=row["key"], image_format=image_format, data=row["data"], facts=json.loads(row["facts"])
        )
        for row in rows
        if row["shard"] == shard
    }
    return samples, [
        {name: value for name, value in reject.items() if name != "shard"}
        for reject in rejects
        if reject["shard"] == shard
    ]


def _holds(parquet: pq.ParquetFile, group: int, shard: int) -> bool:
    statistics = parquet.metadata.row_group(group).column(0).statistics
    return statistics is None or statistics.min <= shard <= statistics.max


def prepare(
    item: SourceItem, config: ShardConfig, label_map: dict[str, int] | None, run: str
) -> tuple[Sample | None, dict[str, Any]]:
    """The sample of an item at the recipe's size, or None and the record of its rejection."""
    try:
        pixels = item.image if isinstance(item.image, np.ndarray) else decode(item.image)
        height, width = pixels.shape[:2]
        size = config.image_size
        if config.resize == "exact" and (height, width) != (size, size):
            raise ImageError(f"is {width} x {height}, expected {size} x {size} (--shard.resize crop accepts any size)")
        if min(height, width) < 2:
            raise ImageError(f"is too small: {width} x {height}")
        data = encode(resize_and_crop(pixels, size), config.image_format)
    except ImageError as error:
        raw = item.image.tobytes() if isinstance(item.image, np.ndarray) else item.image
        return None, {"source": run, "key": item.key, "reason": str(error), "sha256": hash_bytes(raw)}
    facts = {**item.facts}
    if item.level is not None:
        facts["level"] = item.level
        facts["label"] = label_map[item.level] if label_map else None
    return Sample(key=safe_key(item.key), image_format=config.image_format, data=data, facts=facts), {}


def safe_key(key: str) -> str:
    """A WebDataset key: letters, digits, - and _ only, so that it is no path and has no extension."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", key)[:120]


def _check_rejects(rejects: list[dict[str, Any]], limit: float, num_images: int) -> None:
    if len(rejects) > limit:
        first = "; ".join(f"{reject['source']} {reject['key']} {reject['reason']}" for reject in rejects[:10])
        raise RejectedError(
            f"expected at most {int(limit)} rejected images of {num_images} (--shard.max-rejected-fraction), found "
            f"{len(rejects)} so far: {first}"
        )


def _all_rejects(records: Iterable[dict[str, Any] | None]) -> list[dict[str, Any]]:
    return [reject for record in records if record for reject in record["rejects"]]


def _collect(
    space: Workspace,
    index: SourceIndex,
    config: ShardConfig,
    plan: Plan,
    records: list[dict[str, Any]],
    work_seconds: float,
) -> Made:
    if len(records) != len(plan.names):
        raise RuntimeError(f"{len(plan.names) - len(records)} shards are missing after the fan-out")
    files = [FileEntry(**record["file"]) for record in records if record["file"]["rows"]]
    rejects = _all_rejects(records)
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rejects, schema=_REJECT), buffer, compression="zstd")
    space.folder.write(REJECTS, buffer.getvalue())
    files.append(FileEntry.of(REJECTS, buffer.getvalue(), rows=len(rejects)))
    facts = {
        "size": config.image_size,
        "image_format": config.image_format,
        "splits": dict(_splits(files)),
        "label_map": index.label_map,
        "rejects": dict(sorted(Counter(reject["reason"] for reject in rejects).items())),
    }
    return Made(files, facts, work_seconds)


def _splits(files: list[FileEntry]) -> Iterator[tuple[str, dict[str, int]]]:
    for split in SPLITS:
        shards = [file for file in files if file.path.startswith(f"{split}-")]
        yield split, {"shards": len(shards), "images": sum(file.rows for file in shards)}


if __name__ == "__main__":
    from pipelines import cli, full

    cli.run(lambda arguments: full.main(arguments, until="shard"))
