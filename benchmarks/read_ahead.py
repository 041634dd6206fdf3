"""Reading pictures from all over an archive that is on disk and not in memory, as a shard does: with the disk told of
the next ones, and without.

    python -m benchmarks.read_ahead           # 5 rounds, seven minutes on 2 CPUs
    python -m benchmarks.read_ahead --quick   # one short round: does it run?

The archive (see benchmarks/shard.py) is dropped from the operating system's memory before each rival; for the one from
memory, which is the limit, it is read once after that. All read, decode, scale and encode the images of the same shards
on 2 processes, by the code of the shard stage, and write nothing. Bars, medians over the rounds: told ahead, at least
1.1 times as fast as one image read after the other, as a script by hand does it; at least 93 % of the rate from memory;
and faster than the same batches of reads without being told. It is the disk of this machine that is measured.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers import Bar, in_processes, interleaved, median_ratio, pin, report, warm_codec
from benchmarks.shard import PER_SHARD, PROCESSES, SIZE, into_memory, make_archive, photographs


def jobs_of(place: Path, root: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What the shard stage would hand out: the part that all jobs share, and what each reads."""
    import dataclasses

    from cluster.session import Session
    from pipelines.config import Resources, ShardConfig
    from pipelines.index import make_index, source_to_json
    from pipelines.plan import make_plan
    from pipelines.shard import _Group
    from pipelines.sources import ImageNetSource
    from pipelines.stage import Pipeline
    from pipelines.tracking import Tracker
    from vqvae_core.storage import Folder

    folder, source = Folder.of(root), ImageNetSource(path=str(place))
    config = ShardConfig(image_size=SIZE, image_format="jpg", images_per_shard=PER_SHARD)
    session = Session(PROCESSES)
    try:
        tracker = Tracker(folder, "benchmark", {}, "", enabled=False)
        index = make_index(Pipeline(folder, Resources(), session, tracker), source)
    finally:
        session.close()
    plan = make_plan(index.counts(), config)
    group = _Group.load(index, plan, 0)
    spec = {"config": dataclasses.asdict(config), "source": source_to_json(source), "spool": index.spool.uri}
    return spec, [group.reads(np.sort(group.rows(shard))) for shard in plan.shards(0)]


def prepared(spec: dict[str, Any], jobs: list[dict[str, Any]], ahead: int, batch: int) -> int:
    """Prepare the images of some shards, `batch` of them read in a row, with `ahead` of them told to the disk. Returns
    how many they are."""
    from pipelines import prepare

    prepare._AHEAD_IMAGES = ahead  # of this process; at 0 the hint comes with the read itself
    prepare._BATCH_IMAGES = batch
    return sum(1 for job in jobs for _ in prepare.prepare(spec, job))


def forget(path: Path) -> None:
    """Drop a file from the operating system's memory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short round; its ratio means little")
    parser.add_argument("--images", type=int, default=20_000, help="in the archive; about 110 kB each")
    parser.add_argument("--photographs", type=Path, help="folder with ILSVRC2012_img_val.tar")
    parser.add_argument("--place", type=Path, help="where the data is made (the temporary folder)")
    options = parser.parse_args()
    pin(PROCESSES)
    num_images = 2_000 if options.quick else options.images
    pictures, what = photographs(options.photographs)
    with tempfile.TemporaryDirectory(dir=options.place) as folder:
        place = Path(folder)
        make_archive(place / "data", pictures, num_images)
        spec, jobs = jobs_of(place / "data", place / "root")

        archive = place / "data" / "ILSVRC2012_img_train.tar"

        from pipelines.prepare import _AHEAD_IMAGES, _BATCH_IMAGES

        def rate(ahead: int, batch: int = _BATCH_IMAGES, *, in_memory: bool = False) -> float:
            forget(archive)
            if in_memory:
                into_memory(str(archive))
            halves = [(spec, jobs[number::PROCESSES], ahead, batch) for number in range(PROCESSES)]
            seconds, counts = in_processes(prepared, halves, PROCESSES, warm_codec)
            return sum(counts) / seconds

        rivals = {
            "from_memory": lambda: rate(_AHEAD_IMAGES, in_memory=True),
            "told_ahead": lambda: rate(_AHEAD_IMAGES),
            "alone": lambda: rate(0),
            "one_at_a_time": lambda: rate(0, 1),
        }
        rates = interleaved(rivals, 1 if options.quick else 5)
    bars = [
        Bar("times_one_at_a_time", median_ratio(rates["told_ahead"], rates["one_at_a_time"]), 1.1),
        Bar("share_of_rate_from_memory", median_ratio(rates["told_ahead"], rates["from_memory"]), 0.93),
        Bar("times_reading_alone", median_ratio(rates["told_ahead"], rates["alone"]), 1.0),
    ]
    figures = {"images_per_second": {name: [round(rate, 1) for rate in found] for name, found in rates.items()}}
    settings = {"images": num_images, "what": what, "processes": PROCESSES, "images_ahead": _AHEAD_IMAGES}
    return report("read_ahead", settings, bars, figures)


if __name__ == "__main__":
    sys.exit(main())
