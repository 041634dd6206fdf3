"""What a data set costs in memory on a cluster: the objects in Ray's stores, and the driver.

    python -m benchmarks.cluster_memory            # 512 shards, then ten times as many
    python -m benchmarks.cluster_memory --quick    # 128 shards, then ten times as many: does it run?

Pictures of 84x84 in class folders are sharded to 64x64, four a shard, and tokenized on a local cluster of a head and
three nodes, each amount by a driver of its own. Ray is given work by waves of at least 512 shards: below that the
stores hold more with more shards. Bytes in the object
stores of all nodes are looked at ten times a second; a driver's memory is its own peak in each stage. Bars: with ten
times the data the stores hold at most twice as much at their peak (less than a MiB counts as one), and the driver at
most 1 kB more for each image more.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from benchmarks.peers import Bar, report
from benchmarks.tokenize import frames, make_model
from cluster.local import LocalCluster
from vqvae_core.storage import Folder

CLASSES, PER_SHARD, SHARDS, QUICK, TIMES, NODES = 8, 4, 512, 128, 10, 3
STAGES = ("shard", "tokenize")


def make_pictures(folder: Path, count: int) -> None:
    pictures = frames(256)
    for number in range(count):
        place = folder / f"class{number % CLASSES}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number:06d}.webp").write_bytes(pictures[number * 7 % len(pictures)])


class Peaks:
    """The peaks, in bytes, while something runs: of this process's memory, and of what is in Ray's object stores."""

    def __init__(self, session: Any) -> None:
        self._session = session

    def __enter__(self) -> Peaks:
        self.stores = self.driver = self.looks = 0
        self._failure: BaseException | None = None
        Path("/proc/self/clear_refs").write_text("5")  # the peak of this process begins anew
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        assert self.looks, "nobody looked at the stores"
        lines = Path("/proc/self/status").read_text().splitlines()
        self.driver = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

    def _watch(self) -> None:
        try:
            while not self._stop.wait(0.1):
                self.stores = max(self.stores, self._session.object_store_bytes())
                self.looks += 1
        except BaseException as error:
            self._failure = error


def drive(pictures: str, model: str, root: str) -> dict[str, dict[str, int]]:
    """Shard and tokenize, and what it cost."""
    from cluster.session import Session
    from pipelines.config import Resources, ShardConfig
    from pipelines.shard import shard
    from pipelines.sources import ClassFoldersSource
    from pipelines.stage import Pipeline
    from pipelines.tokenize_images import tokenize_images
    from pipelines.tracking import Tracker
    from vqvae_core.artifacts import Artifact

    session, folder = Session(), Folder.of(root)
    pipeline = Pipeline(folder, Resources(), session, Tracker(folder, "benchmark", {}, "", enabled=False))
    session.connect()
    try:
        with Peaks(session) as sharding:
            config = ShardConfig(image_size=64, images_per_shard=PER_SHARD)
            images = shard(pipeline, ClassFoldersSource(path=pictures), config)
        with Peaks(session) as tokenizing:
            tokenize_images(pipeline, images, Artifact.open(Folder(model)))
    finally:
        session.close()
    found = zip(STAGES, (sharding, tokenizing), strict=True)
    return {name: {"stores": peaks.stores, "driver": peaks.driver} for name, peaks in found}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--drive", nargs=3, metavar=("PICTURES", "MODEL", "ROOT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.drive:
        print(json.dumps(drive(*options.drive)))
        return 0
    small = PER_SHARD * (QUICK if options.quick else SHARDS)
    found: dict[int, dict[str, dict[str, int]]] = {}
    with tempfile.TemporaryDirectory() as place:
        make_model(Folder.of(Path(place) / "model"), "bf16")
        for count in (small, TIMES * small):
            make_pictures(Path(place) / f"pictures-{count}", count)
            cluster = LocalCluster(NODES)
            try:
                done = subprocess.run(
                    [sys.executable, "-m", "benchmarks.cluster_memory", "--drive", f"{place}/pictures-{count}",
                     f"{place}/model", f"{place}/root-{count}"],
                    stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, "RAY_ADDRESS": cluster.address},
                )  # fmt: skip
            finally:
                cluster.close()
            found[count] = json.loads(done.stdout.splitlines()[-1])
            print(f"{count} images: {found[count]}", flush=True)
    few, many = found[small], found[TIMES * small]
    bars = []
    for stage in STAGES:
        stores = many[stage]["stores"] / max(few[stage]["stores"], 1 << 20)
        driver = (many[stage]["driver"] - few[stage]["driver"]) / ((TIMES - 1) * small)
        bars.append(Bar(f"{stage}_times_object_store", stores, 2.0, at_most=True))
        bars.append(Bar(f"{stage}_driver_bytes_an_image", driver, 1024.0, at_most=True))
    settings = {"images": [small, TIMES * small], "nodes": NODES, "images_per_shard": PER_SHARD}
    return report("cluster_memory", settings, bars, {"peak_bytes": {str(count): found[count] for count in found}})


if __name__ == "__main__":
    sys.exit(main())
