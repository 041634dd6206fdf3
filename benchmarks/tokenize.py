"""Tokenizing image shards: the pipeline against the bare loop and a webdataset script.

    python -m benchmarks.tokenize            # 3 rounds
    python -m benchmarks.tokenize --quick    # one short round: does it run?

84x84 frames (made here, lossless WebP as the demo has them) in shards of 1,024, and the demo's encoder (128 channels,
K=512) with random weights. The bare loop decodes and encodes on 2 processes with a thread each and writes nothing; the
script is a webdataset pipeline with a loader process and 2 threads for the model, and writes a Parquet file a shard.
Bars: at least 85 % of the bare loop's rate, faster than the script, memory that does not grow with the images.
"""

import argparse
import functools
import io
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.peers import Bar, Memory, in_processes, interleaved, median_ratio, pin, report
from vqvae_core.artifacts import FileEntry, commit
from vqvae_core.checkpoint import save_model
from vqvae_core.image_shards import KIND, Sample, read_tar, write_tar
from vqvae_core.images import encode
from vqvae_core.storage import Folder
from vqvae_core.train_config import best_precision
from vqvae_core.vqvae import VQVAE

SIZE, PER_SHARD, BATCH, PROCESSES = 84, 1024, 16, 2


def frames(count: int) -> list[bytes]:
    """Encoded pictures with flat walls, edges and some grain, as frames of an engine have."""
    rng, made = np.random.default_rng(0), []
    for _ in range(count):
        walls = rng.integers(0, 256, (7, 7, 3)).repeat(12, axis=0).repeat(12, axis=1)
        shade = np.linspace(0.5, 1.0, SIZE)[:, None, None]
        pixels = walls * shade + rng.integers(-3, 4, (SIZE, SIZE, 3))
        made.append(encode(pixels.clip(0, 255).astype(np.uint8), "webp"))
    return made


def make_images(folder: Folder, num_images: int) -> None:
    """An ImageShards artifact."""
    pictures, files = frames(512), []
    for number in range(num_images // PER_SHARD):
        samples = [
            Sample(
                key=f"k{number * PER_SHARD + place}",
                image_format="webp",
                data=pictures[(place * 7 + number) % len(pictures)],
                facts={"label": place % 7},
            )
            for place in range(PER_SHARD)
        ]
        data = write_tar(samples)
        folder.write(f"train-{number:06d}.tar", data)
        files.append(FileEntry.of(f"train-{number:06d}.tar", data, rows=PER_SHARD))
    facts = {
        "size": SIZE,
        "splits": {"train": {"shards": len(files), "images": num_images}, "validation": {"shards": 0, "images": 0}},
        "label_map": {str(label): label for label in range(7)},
    }
    _commit(folder, KIND, files, facts)


def make_model(folder: Folder, precision: str) -> None:
    """A VQVAEModel artifact with the demo's config."""
    from pipelines.config import recipe_of
    from pipelines.presets import DOOM84

    torch.manual_seed(0)
    files = {"model.safetensors": save_model(VQVAE(DOOM84.vqvae)), "config.json": json.dumps(recipe_of(DOOM84.vqvae))}
    entries = []
    for name, value in files.items():
        data = value if isinstance(value, bytes) else value.encode()
        folder.write(name, data)
        entries.append(FileEntry.of(name, data))
    facts = {"K": DOOM84.vqvae.quantizer.num_codes, "precision": precision, "image_size": SIZE}
    _commit(folder, "VQVAEModel", entries, facts)


def _commit(folder: Folder, kind: str, files: list[FileEntry], facts: dict[str, Any]) -> None:
    commit(folder, kind=kind, stage="benchmark", stage_version=1, fingerprint=kind, recipe={}, inputs={}, files=files,
           facts=facts, provenance={"mlflow_run": None})  # fmt: skip


@functools.cache
def load(model: str, threads: int) -> tuple[VQVAE, bool]:
    """The model with channels last, and whether it runs in bf16."""
    from vqvae_core.artifacts import Artifact

    torch.set_num_threads(threads)
    artifact = Artifact.open(Folder(model))
    loaded = VQVAE.of(artifact).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return loaded, artifact.facts["precision"] == "bf16"


@torch.no_grad()
def bare(model: str, paths: list[str]) -> int:
    """Decode and encode on one thread, and throw the tokens away."""
    vqvae, bf16 = load(model, 1)
    count = 0
    for path in paths:
        samples = list(read_tar(Path(path).read_bytes(), path))
        for start in range(0, len(samples), BATCH):
            pixels = torch.from_numpy(np.stack([sample.pixels() for sample in samples[start : start + BATCH]]))
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                count += len(vqvae.encode(pixels))
    return count


def _to_pixels(sample: dict[str, Any]) -> tuple[str, np.ndarray]:
    return sample["__key__"], np.asarray(Image.open(io.BytesIO(sample["webp"])).convert("RGB"))


@torch.no_grad()
def script(model: str, paths: list[str], out: str) -> int:
    """What one would write by hand with the webdataset library."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from webdataset.compat import WebDataset, WebLoader

    vqvae, bf16 = load(model, PROCESSES)
    Path(out).mkdir(parents=True)

    data = WebDataset(paths, shardshuffle=False).map(_to_pixels).batched(BATCH)
    loader = WebLoader(data, batch_size=None, num_workers=1)
    keys: list[str] = []
    rows: list[np.ndarray] = []
    count = 0
    for names, pixels in loader:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            tokens = vqvae.encode(torch.as_tensor(pixels))
        keys += names
        rows += list(tokens.to(torch.int16).flatten(1).numpy())
        count += len(names)
        if len(keys) >= PER_SHARD:
            table = pa.table({"key": keys, "tokens": [row.tolist() for row in rows]})
            pq.write_table(table, f"{out}/{count:08d}.parquet")
            keys, rows = [], []
    return count


class Ours:
    """The tokenize stage, as `python pipelines/tokenize_images.py` runs it, from the first shard read to the commit.
    The start of Ray and its workers is taken apart."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.start_seconds: list[float] = []
        self.seconds: list[float] = []
        self.peak_bytes: list[int] = []

    def __call__(self, images: str, model: str) -> float:
        from cluster.session import Session
        from pipelines import tokenize_images as stage
        from pipelines.config import Resources
        from pipelines.stage import Pipeline, encode_shards
        from pipelines.tracking import Tracker
        from vqvae_core.artifacts import Artifact
        from vqvae_core.image_shards import ImageShards

        root, begins = Folder.of(self._root), []

        def clocked(*arguments: Any) -> Any:
            for result in encode_shards(*arguments):
                begins.append(result["begin"])
                yield result

        session, tracker = Session(PROCESSES), Tracker(root, "benchmark", {}, "", enabled=False)
        stage.encode_shards = clocked
        try:
            with Memory() as memory:
                begin = time.time()
                session.connect()
                pipeline = Pipeline(root, Resources(), session, tracker)
                tokens = stage.tokenize_images(pipeline, ImageShards.open(Folder(images)), Artifact.open(Folder(model)))
                self.seconds.append(time.time() - min(begins))
                self.start_seconds.append(min(begins) - begin)
                session.close()
        finally:
            stage.encode_shards = encode_shards
        self.peak_bytes.append(memory.peak_bytes)
        num_images = tokens.num_images("train")
        shutil.rmtree(self._root)
        return num_images / self.seconds[-1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short round; its ratios mean little")
    parser.add_argument("--shards", type=int, default=120, help="of 1,024 images")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    pin(PROCESSES)
    num_shards, rounds = (4, 1) if options.quick else (options.shards, options.rounds)
    precision = best_precision("cpu")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        print(f"making {num_shards} shards", flush=True)
        make_images(Folder.of(place / "images"), num_shards * PER_SHARD)
        make_images(Folder.of(place / "small"), max(PROCESSES, num_shards // 4) * PER_SHARD)
        make_model(Folder.of(place / "model"), precision)
        return _compare(place, rounds, precision)


def _compare(place: Path, rounds: int, precision: str) -> int:
    paths = sorted(map(str, (place / "images").glob("*.tar")))
    model, ours = str(place / "model"), Ours(place / "root")

    def loop() -> float:
        halves = [(model, paths[number::PROCESSES]) for number in range(PROCESSES)]
        seconds, counts = in_processes(bare, halves, PROCESSES, functools.partial(load, model, 1))
        return sum(counts) / seconds

    def by_hand() -> float:
        warm = functools.partial(load, model, PROCESSES)
        seconds, counts = in_processes(script, [(model, paths, str(place / "hand"))], 1, warm)
        shutil.rmtree(place / "hand")
        return sum(counts) / seconds

    rivals = {"bare_loop": loop, "pipeline": lambda: ours(str(place / "images"), model), "script": by_hand}
    rates = interleaved(rivals, rounds)
    seconds, large_peak = min(ours.seconds), max(ours.peak_bytes)
    starts = [round(value, 2) for value in ours.start_seconds]
    ours.peak_bytes.clear()
    ours(str(place / "small"), model)
    bars = [
        Bar("share_of_bare_loop", median_ratio(rates["pipeline"], rates["bare_loop"]), 0.85),
        Bar("times_script", median_ratio(rates["pipeline"], rates["script"]), 1.0),
        Bar("seconds_of_work_in_a_round", seconds, 60.0),
        Bar("peak_memory_times_that_of_a_quarter", large_peak / ours.peak_bytes[0], 1.15, at_most=True),
    ]
    figures = {
        "images_per_second": {name: [round(rate, 1) for rate in found] for name, found in rates.items()},
        "start_seconds_of_ray_and_workers": starts,
        "peak_memory_mib": round(large_peak / 2**20),
        "peak_memory_mib_of_a_quarter": round(ours.peak_bytes[0] / 2**20),
    }
    settings = {"images": len(paths) * PER_SHARD, "size": SIZE, "precision": precision, "processes": PROCESSES}
    return report("tokenize", settings, bars, figures)


if __name__ == "__main__":
    sys.exit(main())
