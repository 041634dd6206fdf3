"""Reading training images: the loader against the bare decode loop, webdataset's WebLoader and Ray Data.

    python -m benchmarks.stream            # 5 rounds
    python -m benchmarks.stream --quick

84x84 PNG frames and 128x128 JPEGs (quality 95, 4:4:4), in shards of 1,024 on a local disk, all in memory of the
operating system. All rivals decode with the loader's own decoder, into one image's memory a process, on 2 processes and
2 CPUs and give batches of 64; the process that takes them does nothing else. The bare loop decodes the same images out
of its memory and keeps none. Rates and CPU time are of the stretch after the first batches, without any start; those of
the loader of its second epoch, since in the first each file is hashed once, which is a figure beside them. Bars: at
least 90 % of the bare loop; CPU time an image beyond bare decoding at most half of WebLoader's; at least 1.5 times Ray
Data; memory that is bounded by the windows: with shards and windows of 128, peak memory and mapped shards that do not
grow with the images, and no more shards mapped than three a lane.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.peers import Bar, Memory, cpu_seconds, interleaved, mapped_bytes, median_ratio, pin, report
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
SMALL = 128  # samples of a shard and of a window where memory is measured
LANES = 8
KINDS = {"png84": (84, "png"), "jpg128": (128, "jpg")}
Rate = tuple[float, float]  # images/s, CPU seconds an image


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


def measured(batches: Iterator[Any], start: int, stop: int) -> Rate:
    """Rate and CPU time between batch `start` and batch `stop`."""
    begin = used = 0.0
    for number, _ in enumerate(batches, 1):
        if number == start:
            begin, used = time.perf_counter(), cpu_seconds()
        if number == stop:
            seconds, cpu = time.perf_counter() - begin, cpu_seconds() - used
            images = (stop - start) * BATCH
            return images / seconds, cpu / images
    raise RuntimeError(f"fewer than {stop} batches came")


def bare_rate(images: ImageShards) -> Rate:
    """Decoding alone, on as many processes: each has its part of the same images in memory and drops their pixels."""
    folder, paths = images.artifact.folder, images.shards("train")
    context = get_context("spawn")
    barrier, queue = context.Barrier(PROCESSES), context.Queue()
    processes = [
        context.Process(target=_decode_all, args=(folder, paths[number::PROCESSES], barrier, queue))
        for number in range(PROCESSES)
    ]
    for process in processes:
        process.start()
    found = [queue.get(timeout=600) for _ in processes]
    for process in processes:
        process.join()
    rate = sum(count / seconds for count, seconds, _ in found)
    return rate, sum(used for _, _, used in found) / sum(count for count, _, _ in found)


def _decode_all(folder: Folder, paths: list[str], barrier: Any, queue: Any) -> None:
    encoded: list[bytes] = []
    for path in paths:
        data = folder.read(path)
        index = index_tar(data, path)
        places = zip(index.offsets, index.num_bytes, strict=True)
        encoded += [data[start : start + num_bytes] for start, num_bytes in places]
    decoder = PlainDecoder()
    for data in encoded[:100]:
        decoder(data)
    barrier.wait()
    begin, used = time.perf_counter(), time.process_time()
    for data in encoded:
        decoder(data)
    queue.put((len(encoded), time.perf_counter() - begin, time.process_time() - used))


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
    loader = WebLoader(dataset, batch_size=None, num_workers=PROCESSES)
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


def ray_rate(images: ImageShards, count: int) -> Rate:
    """With Ray running only as long as this is measured."""
    import logging

    import ray
    import ray.data

    ray.init(num_cpus=PROCESSES, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    try:
        return measured(ray_batches(images, count), WARM, count)
    finally:
        ray.shutdown()


def compare(kind: str, folder: Path | None, quick: bool) -> tuple[list[Bar], dict[str, Any]]:
    num_images = 8 * PER_SHARD if quick else 32 * PER_SHARD
    count, rounds = num_images // BATCH, 1 if quick else 5
    encoded = pictures(kind, folder)
    with tempfile.TemporaryDirectory() as place:
        images = make_images(Folder.of(place) / "images", kind, encoded, num_images)
        cpu: dict[str, list[float]] = {"bare": [], "loader": [], "first_epoch": [], "web_loader": [], "ray_data": []}

        def rival(name: str, run: Callable[[], Rate]) -> Callable[[], float]:
            def measure() -> float:
                rate, seconds = run()
                cpu[name].append(seconds)
                return rate

            return measure

        rates = interleaved(
            {
                "bare": rival("bare", lambda: bare_rate(images)),
                "loader": rival("loader", lambda: measured(loader_batches(images, 2 * count), count, 2 * count)),
                "first_epoch": rival("first_epoch", lambda: measured(loader_batches(images, count), WARM, count)),
                "web_loader": rival("web_loader", lambda: measured(web_batches(images, count), WARM, count)),
                "ray_data": rival("ray_data", lambda: ray_rate(images, count)),
            },
            rounds,
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
    beyond = [
        max(ours - bare, 0.0) / (theirs - bare)
        for ours, bare, theirs in zip(cpu["loader"], cpu["bare"], cpu["web_loader"], strict=True)
    ]
    bars = [
        Bar(f"{kind}_share_of_bare_loop", median_ratio(rates["loader"], rates["bare"]), 0.9),
        Bar(f"{kind}_cpu_beyond_decoding_of_web_loader", statistics.median(beyond), 0.5, at_most=True),
        Bar(f"{kind}_times_ray_data", median_ratio(rates["loader"], rates["ray_data"]), 1.5),
        Bar(f"{kind}_peak_memory_times_that_of_a_quarter", peaks["whole"] / peaks["quarter"], 1.15, at_most=True),
        Bar(f"{kind}_mapped_times_that_of_a_quarter", mapped["whole"] / mapped["quarter"], 1.15, at_most=True),
        Bar(f"{kind}_mapped_of_three_shards_a_lane", mapped["whole"] / bound, 1.0, at_most=True),
    ]
    figures = {
        "images_per_second": {name: [round(rate, 1) for rate in values] for name, values in rates.items()},
        "cpu_microseconds_an_image": {name: [round(1e6 * one, 1) for one in values] for name, values in cpu.items()},
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
