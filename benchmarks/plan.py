"""A plan of 5 million shards, for 5 billion images: made, stored and reopened. No image is read.

    python -m benchmarks.plan             # 5 million shards; about a minute
    python -m benchmarks.plan --quick     # 50,000

The index is one of 5 million runs (tars, say) of 1,000 images each, as the index stage stores it. The plan is made from
its counts, every planned shard becomes an entry of a manifest's table of files, both artifacts are committed, opened
again, and some shards are looked up. Bars: 60 s and 2 GiB for all of it, with the interpreter and libraries.
"""

import argparse
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from benchmarks.peers import Bar, report
from pipelines.config import ShardConfig
from pipelines.index import KIND as INDEX
from pipelines.index import RUNS, RUNS_SCHEMA, SourceIndex, to_parquet
from pipelines.plan import Plan, make_plan
from vqvae_core.artifacts import Artifact, FileEntry, commit, hash_bytes
from vqvae_core.image_shards import KIND as SHARDS
from vqvae_core.storage import Folder

IMAGES_PER_RUN = 1000


def make_index(folder: Folder, num_runs: int) -> SourceIndex:
    """The runs of an index: names and places as a bucket of tars has them."""
    numbers = np.arange(num_runs)
    validation = np.where(numbers % 1000 == 0, IMAGES_PER_RUN, 0)
    names = pa.array([f"part-{number // 1000:05d}/{number % 1000:05d}.tar" for number in range(num_runs)])
    columns = {
        "file": pa.array((numbers // 32).astype(np.int32)),
        "row_group": pa.array((numbers % 32).astype(np.int32)),
        "train": pa.array((IMAGES_PER_RUN - validation).astype(np.int32)),
        "validation": pa.array(validation.astype(np.int32)),
        "name": names,
        "prefix": pa.nulls(num_runs, pa.string()).fill_null(""),
        "locator": pa.array([f'{{"file": "part-{n // 1000:05d}/{n % 1000:05d}.tar"}}' for n in range(num_runs)]),
    }
    data = to_parquet(pa.table(columns, schema=RUNS_SCHEMA))
    del columns, names
    folder.write(RUNS, data)
    return SourceIndex(_commit(folder, INDEX, iter([FileEntry.of(RUNS, data, rows=num_runs)])))


def planned_files(plan: Plan) -> Iterator[FileEntry]:
    """An entry for each shard, in order, with a hash of its name in the place of that of its contents."""
    for split in range(2):
        for shard in (
            shard for group in range(plan.num_groups) for shard in plan.shards(group) if shard.split == split
        ):
            yield FileEntry(f"{shard.name}.tar", shard.count, 10_000 * shard.count, hash_bytes(shard.name.encode()))


def _commit(folder: Folder, kind: str, files: Iterator[FileEntry]) -> Artifact:
    return commit(folder, kind=kind, stage="benchmark", stage_version=1, fingerprint=kind, recipe={}, inputs={},
                  files=files, facts={}, provenance={})  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    num_runs = 50_000 if parser.parse_args().quick else 5_000_000
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as place:
        begin = last = time.perf_counter()

        def lap(name: str) -> None:
            nonlocal last
            now = time.perf_counter()
            seconds[name], last = round(now - last, 2), now

        index = make_index(Folder.of(Path(place) / "index"), num_runs)
        lap("index_stored")
        plan = make_plan(index.counts(), ShardConfig(images_per_shard=IMAGES_PER_RUN))
        num_shards = plan.num_shards(0) + plan.num_shards(1)
        num_groups, num_images = plan.num_groups, plan.num_images
        lap("plan_made")
        _commit(Folder.of(Path(place) / "shards"), SHARDS, planned_files(plan))
        lap("plan_stored")
        del index, plan
        index = SourceIndex(Artifact.open(Folder.of(Path(place) / "index")))
        plan = make_plan(index.counts(), ShardConfig(images_per_shard=IMAGES_PER_RUN))
        files = Artifact.open(Folder.of(Path(place) / "shards")).files
        for number in np.linspace(0, plan.num_shards(0) - 1, 1000).astype(int):
            assert files[f"{plan.name(0, int(number))}.tar"].rows > 0
        assert len(files) == num_shards
        order = plan.order(num_groups // 2, 0)
        assert np.bincount(order).max() == 1
        lap("reopened")
        total = time.perf_counter() - begin
    peak_bytes = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    bars = [Bar("seconds", total, 60.0, at_most=True), Bar("peak_gib", peak_bytes / 2**30, 2.0, at_most=True)]
    settings = {"runs": num_runs, "images": num_images, "shards": num_shards, "groups": num_groups}
    return report("plan", settings, bars, {"seconds": seconds})


if __name__ == "__main__":
    sys.exit(main())
