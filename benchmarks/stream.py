"""Reading training images: the loader against the bare decode loop, webdataset's WebLoader and Ray Data.

    python -m benchmarks.stream            # 60 turns of the loader and of the bare loop
    python -m benchmarks.stream --quick

84x84 PNG frames and 128x128 JPEGs (quality 95, 4:4:4), in shards of 1,024 on a local disk, all in memory of the
operating system. All rivals decode with the loader's own decoder, into one image's memory a process, on 2 processes
and 2 CPUs and give batches of 64; the process that takes them does nothing else. The bare loop decodes the same images
out of its memory and keeps none. All are started once and take turns of a second, in which the processes of the others
are stopped, so that a slow moment of the machine hits all; WebLoader and Ray Data take every third. The loader is
measured from its second epoch on, since in the first each file is hashed once, which is a figure beside the others.
Bars: at least 90 % of the bare loop; CPU time an image beyond bare decoding at most half of WebLoader's; at least 1.5
times Ray Data; memory that is bounded by the windows: with shards and windows of 128, peak memory and mapped shards
that do not grow with the images, and no more shards mapped than three a lane.
"""

import argparse
import itertools
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.peers import Bar, Memory, counted, in_turns, mapped_bytes, pin, report
from benchmarks.shard import photographs
from vqvae_core.artifacts import FileEntry, commit
from vqvae_core.augment import AugmentConfig
from vqvae_core.decoder import PlainDecoder
from vqvae_core.decoding import decode
from vqvae_core.image_shards import KIND, ImageShards, Sample, index_tar, write_tar
from vqvae_core.images import encode, resize_and_crop
from vqvae_core.loader import ImageLoader
from vqvae_core.order import OrderConfig
from vqvae_core.storage import Folder

PROCESSES, BATCH, PER_SHARD, WARM = 2, 64, 1024, 32  # batches before the clock runs
TURNS, QUICK_TURNS, TURN_SECONDS, EVERY, ENDLESS = 60, 9, 1.0, 3, 1_000_000
SMALL = 128  # samples of a shard and of a window where memory is measured
LANES = 8
KINDS = {"png84": (84, "png"), "jpg128": (128, "jpg")}


def pictures(kind: str, folder: Path | None) -> list[bytes]:
    """256 encoded images of a kind."""
    size, image_format = KINDS[kind]
    if image_format == "jpg":
        originals, _ = photographs(folder)
        return [encode(resize_and_crop(decode(data), size), "jpg") for data in originals] * 3
    rng, made = np.random.default_rng(0), []
    for _ in range(256):  # walls, edges and some grain, as frames of an engine have
        walls = rng.integers(0, 256, (7, 7, 3)).repeat(12, axis=0).repeat(12, axis=1)
        grain = rng.integers(-3, 4, (size, size, 3))
        made.append(encode((walls + grain).clip(0, 255).astype(np.uint8), "png"))
    return made


def make_images(
    folder: Folder, kind: str, encoded: list[bytes], num_images: int, per_shard: int = PER_SHARD
) -> ImageShards:
    """An ImageShards artifact."""
    size, image_format = KINDS[kind]
    files = []
    for number in range(num_images // per_shard):
        samples = [
            Sample(
                key=f"k{number * per_shard + place}",
                image_format=image_format,
                data=encoded[(place * 7 + number) % len(encoded)],
                facts={"label": 0},
            )
            for place in range(per_shard)
        ]
        data = write_tar(samples)
        folder.write(f"train-{number:06d}.tar", data)
        files.append(FileEntry.of(f"train-{number:06d}.tar", data, rows=per_shard))
    facts = {"size": size, "splits": {}, "label_map": {"a": 0}}
    return ImageShards(commit(
        folder, kind=KIND, stage="shard", stage_version=1, fingerprint="f", recipe={}, inputs={}, files=files,
        facts=facts, provenance={},
    ))  # fmt: skip


def decode_bare(images_uri: str, number: int, path: str) -> None:
    """Decoding alone: one of the processes, with its part of the images in memory, whose pixels it drops."""
    images, encoded = ImageShards.open(Folder(images_uri)), []
    for shard in images.shards("train")[number::PROCESSES]:
        data = images.artifact.folder.read(shard)
        index = index_tar(data, shard)
        places = zip(index.offsets, index.num_bytes, strict=True)
        encoded += [data[start : start + num_bytes] for start, num_bytes in places]
    decoder = PlainDecoder()
    for number in counted(itertools.count(), path, BATCH):
        for place in range(BATCH):
            decoder(encoded[(number * BATCH + place) % len(encoded)])


def take_all(rival: Callable[[ImageShards, int], Iterator[Any]], images_uri: str, path: str) -> None:
    """Take a rival's batches and do nothing else."""
    for _ in counted(rival(ImageShards.open(Folder(images_uri)), ENDLESS), path, BATCH):
        pass


def first_epoch_rate(images: ImageShards, count: int) -> float:
    """Images/s of the loader's first epoch, after its first batches."""
    batches = loader_batches(images, count)
    for _ in range(WARM):
        next(batches)
    begin = time.perf_counter()
    taken = sum(1 for _ in batches)
    return taken * BATCH / (time.perf_counter() - begin)


def loader_batches(images: ImageShards, count: int, window: int = 1024) -> Iterator[Any]:
    config = OrderConfig(batch_size=BATCH, num_lanes=LANES, shuffle_window=window)
    loader = ImageLoader(images, config, AugmentConfig(), num_workers=PROCESSES)
    batches = loader.batches(0, count)
    try:
        yield from batches
    finally:
        batches.close()  # type: ignore[attr-defined]


def web_batches(images: ImageShards, count: int) -> Iterator[Any]:
    """As the library's guide does it, with the same decoder and a shuffle as wide as a lane's window."""
    import torch
    from webdataset import WebDataset, WebLoader  # pyright: ignore[reportAttributeAccessIssue]

    urls = [images.artifact.folder.path(path) for path in images.shards("train")]
    image_format = next(iter(images.read(images.shards("train")[0]))).image_format
    decoder = PlainDecoder()
    dataset = (
        WebDataset(urls, shardshuffle=len(urls), seed=0)
        .shuffle(1024)
        .to_tuple(image_format)
        .batched(BATCH, collation_fn=lambda samples: torch.from_numpy(_stacked(decoder, [one for (one,) in samples])))
    )
    loader = WebLoader(dataset, batch_size=None, num_workers=PROCESSES, multiprocessing_context="fork")
    number = 0
    while number < count:  # a worker drops what does not fill its last batch
        for batch in loader:
            yield batch
            number += 1


def _stacked(decoder: PlainDecoder, encoded: list[bytes]) -> np.ndarray:
    """Pixels (N, S, S, 3), each image copied once, as the loader does it."""
    first = decoder(encoded[0])
    out = np.empty((len(encoded), *first.shape), np.uint8)
    out[0] = first
    for number, data in enumerate(encoded[1:], 1):
        out[number] = decoder(data)
    return out


def ray_batches(images: ImageShards, count: int) -> Iterator[Any]:
    import ray.data

    image_format = next(iter(images.read(images.shards("train")[0]))).image_format
    urls = [images.artifact.folder.path(path) for path in images.shards("train")]

    def decoded(batch: Any) -> Any:
        return {"pixels": _stacked(PlainDecoder(), list(batch[image_format]))}

    number = 0
    while number < count:
        data = ray.data.read_webdataset(urls, decoder=None).map_batches(decoded, batch_size=BATCH)
        for batch in data.iter_torch_batches(batch_size=BATCH, local_shuffle_buffer_size=1024, local_shuffle_seed=0):
            yield batch
            number += 1


def with_ray(images_uri: str, path: str) -> None:
    import logging

    import ray
    import ray.data

    from benchmarks import stream  # by this name Ray's workers find the functions too

    ray.init(num_cpus=PROCESSES, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # so that it leaves nothing behind
    try:
        take_all(stream.ray_batches, images_uri, path)
    finally:
        ray.shutdown()


def compare(kind: str, folder: Path | None, quick: bool) -> tuple[list[Bar], dict[str, Any]]:
    num_images = 8 * PER_SHARD if quick else 32 * PER_SHARD
    encoded = pictures(kind, folder)
    with tempfile.TemporaryDirectory() as place:
        images = make_images(Folder.of(place) / "images", kind, encoded, num_images)
        uri, counts = images.artifact.folder.uri, Path(place)
        bare = [str(counts / f"bare-{number}") for number in range(PROCESSES)]
        loader, web, ray = (str(counts / name) for name in ("loader", "web_loader", "ray_data"))
        first_epoch = first_epoch_rate(images, num_images // BATCH)
        turns = in_turns(
            {
                "bare": ([(decode_bare, (uri, number, path)) for number, path in enumerate(bare)], bare, WARM * BATCH),
                "loader": ([(take_all, (loader_batches, uri, loader))], [loader], num_images),
                "web_loader": ([(take_all, (web_batches, uri, web))], [web], WARM * BATCH),
                "ray_data": ([(with_ray, (uri, ray))], [ray], WARM * BATCH),
            },
            QUICK_TURNS if quick else TURNS,
            TURN_SECONDS,
            far=("web_loader", "ray_data"),
            every=EVERY,
        )
        small = Folder.of(place) / "small"
        peaks, mapped, bound = {}, {}, 0
        for name, part in (("whole", num_images), ("quarter", num_images // 4)):
            few = make_images(small / name, kind, encoded, part, SMALL)
            bound = 3 * LANES * max(file.bytes for file in few.artifact.files.values())
            mapped[name] = 0
            with Memory() as memory:
                for _ in loader_batches(few, part // BATCH, SMALL):
                    time.sleep(0.02)  # a step: what is read ahead piles up
                    mapped[name] = max(mapped[name], mapped_bytes(few.artifact.folder.uri))
            peaks[name] = memory.peak_bytes
    rates, cpu = {}, {}
    for name, found in turns.items():
        images_done = sum(turn.count for turn in found)
        rates[name] = images_done / sum(turn.seconds for turn in found)
        cpu[name] = sum(turn.cpu_seconds for turn in found) / images_done
    beyond = max(cpu["loader"] - cpu["bare"], 0.0) / (cpu["web_loader"] - cpu["bare"])
    bars = [
        Bar(f"{kind}_share_of_bare_loop", rates["loader"] / rates["bare"], 0.9),
        Bar(f"{kind}_cpu_beyond_decoding_of_web_loader", beyond, 0.5, at_most=True),
        Bar(f"{kind}_times_ray_data", rates["loader"] / rates["ray_data"], 1.5),
        Bar(f"{kind}_peak_memory_times_that_of_a_quarter", peaks["whole"] / peaks["quarter"], 1.15, at_most=True),
        Bar(f"{kind}_mapped_times_that_of_a_quarter", mapped["whole"] / mapped["quarter"], 1.15, at_most=True),
        Bar(f"{kind}_mapped_of_three_shards_a_lane", mapped["whole"] / bound, 1.0, at_most=True),
    ]
    figures = {
        "images_per_second": {name: round(rate, 1) for name, rate in rates.items()},
        "images_per_second_of_the_first_epoch": round(first_epoch, 1),
        "cpu_microseconds_an_image": {name: round(1e6 * one, 1) for name, one in cpu.items()},
        "share_of_bare_loop_by_turn": [
            round(ours.count / ours.seconds * bare.seconds / bare.count, 3)
            for ours, bare in zip(turns["loader"], turns["bare"], strict=True)
        ],
        "peak_memory_mib": {name: peak >> 20 for name, peak in peaks.items()},
        "peak_mapped_mib": {name: round(peak / 2**20, 1) for name, peak in mapped.items()},
    }
    return bars, figures


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--photographs", type=Path, help="a folder with ILSVRC2012_img_val.tar")
    options = parser.parse_args()
    pin(PROCESSES)
    Image.init()
    decode(encode(np.zeros((8, 8, 3), np.uint8), "jpg"))
    bars: list[Bar] = []
    figures: dict[str, Any] = {}
    for kind in KINDS:
        found, figures[kind] = compare(kind, options.photographs, options.quick)
        bars += found
    settings = {"processes": PROCESSES, "batch": BATCH, "images_a_shard": PER_SHARD, "window": 1024, "lanes": LANES}
    return report("stream", settings, bars, figures)


if __name__ == "__main__":
    sys.exit(main())
