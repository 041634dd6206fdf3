"""Sharding photographs: the pipeline against the bare loop, a ShardWriter script, and img2dataset.

    python -m benchmarks.shard                        # 3 rounds, some minutes each
    python -m benchmarks.shard --quick                # one short round: does it run?
    python -m benchmarks.shard --img2dataset PYTHON   # with a Python that has img2dataset 1.47 (it needs its own)

An archive in ImageNet's layout is made of real photographs (--photographs, a folder with ILSVRC2012_img_val.tar), or of
synthetic ones where there are none. All rivals read it, or its unpacked files, from memory (it is read once before
each), make 128x128 JPEGs of quality 95 (4:4:4 but for img2dataset, which has no setting for it) on 2 CPUs, and write
WebDataset tars. The bare loop runs on 2 processes with the pipeline's codec and resize, and writes nothing. The scripts
are loops around a ShardWriter with Pillow for the images, as one writes them by hand: one process; a pool of 2
processes beside the writer, which uses both CPUs; and that pool with the pipeline's codec and resize, which is the bare
loop again with a writer beside it, and is printed without a bar. Bars: at least 85 % of the bare loop's rate, faster
than the scripts with Pillow and img2dataset, and peak memory that does not grow with the number of images.
"""

import argparse
import io
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.peers import (
    Bar,
    Memory,
    decode_resize_encode,
    decode_resize_encode_fast,
    free_memory_bytes,
    in_processes,
    inner_archives,
    interleaved,
    median_ratio,
    pin,
    report,
    use_codec,
    warm_codec,
)

SIZE, QUALITY = 128, {"quality": 95, "subsampling": 0}
PROCESSES = 2
PER_SHARD = 1024


def photographs(folder: Path | None) -> tuple[list[bytes], str]:
    """Encoded JPEGs, and what they are."""
    archive = folder / "ILSVRC2012_img_val.tar" if folder else None
    if archive and archive.is_file():
        with tarfile.open(archive) as tar:
            return [tar.extractfile(member).read() for member in tar], "100 ImageNet photographs"  # type: ignore[union-attr]
    rng, made = np.random.default_rng(0), []
    for _ in range(100):  # smooth noise with grain: about 100 kB at 500x375, as a photograph has
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((500, 375))
        pixels = np.asarray(coarse).astype(float) + rng.normal(0, 18, (375, 500, 3))
        buffer = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=92)
        made.append(buffer.getvalue())
    return made, "100 synthetic photographs"


def make_archive(place: Path, pictures: list[bytes], num_images: int) -> None:
    """ImageNet's three files: inner tars of 100 pictures each, and a validation archive of 100."""
    place.mkdir()
    per_synset = 100
    with tarfile.open(place / "ILSVRC2012_img_train.tar", "w", format=tarfile.GNU_FORMAT) as outer:
        for synset in range(num_images // per_synset):
            files = [
                (f"n{synset:08d}_{number}.JPEG", pictures[(7 * synset + number) % len(pictures)])
                for number in range(per_synset)
            ]
            inner = _tar(files)
            member = tarfile.TarInfo(f"n{synset:08d}.tar")
            member.size = len(inner)
            outer.addfile(member, io.BytesIO(inner))
    validation = [(f"ILSVRC2012_val_{number:08d}.JPEG", data) for number, data in enumerate(pictures[:100])]
    (place / "ILSVRC2012_img_val.tar").write_bytes(_tar(validation))
    (place / "val_synsets.txt").write_text("n00000000\n" * len(validation))


def _tar(files: list[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def bare(archive: str, places: list[tuple[str, int, int]]) -> int:
    """Decode, resize and encode, and throw the result away. Headers are read as the pipeline reads them."""
    from pipelines.sources.tars import _Header

    count = 0
    with Path(archive).open("rb") as file:
        for _, offset, size in places:
            file.seek(offset)
            with tarfile.open(fileobj=io.BytesIO(file.read(size)), tarinfo=_Header) as tar:
                for member in tar:
                    data = tar.extractfile(member).read()  # type: ignore[union-attr]
                    count += len(decode_resize_encode_fast(data, SIZE, "JPEG", QUALITY)) > 0
    return count


def shard_writer(
    archive: str, places: list[tuple[str, int, int]], out: str, pool: bool, codec: Callable[..., bytes]
) -> float:
    """What one would write by hand: samples made one by one, or by a pool, and one writer. Returns images/s."""
    from webdataset.writer import ShardWriter

    jobs = [(archive, *place, codec) for place in places]
    Path(out).mkdir(parents=True)
    with ShardWriter(f"{out}/%06d.tar", maxcount=PER_SHARD, encoder=False, verbose=0) as writer:
        if not pool:
            return _written(writer, map(_samples, jobs))
        with get_context("spawn").Pool(PROCESSES) as processes:
            processes.map(_warm_process, [codec] * PROCESSES)  # started and warm before the clock is
            return _written(writer, processes.imap(_samples, jobs))


def _written(writer: Any, made: Iterable[list[dict[str, Any]]]) -> float:
    begin, count = time.perf_counter(), 0
    for samples in made:
        for sample in samples:
            writer.write(sample)
        count += len(samples)
    return count / (time.perf_counter() - begin)


def _warm_process(codec: Callable[..., bytes]) -> None:
    if codec is decode_resize_encode_fast:
        warm_codec()
    time.sleep(1.0)  # so that each process gets one


def _samples(job: tuple[str, str, int, int, Callable[..., bytes]]) -> list[dict[str, Any]]:
    archive, name, offset, size, codec = job
    made = []
    with Path(archive).open("rb") as file:
        file.seek(offset)
        with tarfile.open(fileobj=io.BytesIO(file.read(size))) as tar:
            for member in tar:
                data = tar.extractfile(member).read()  # type: ignore[union-attr]
                picture = codec(data, SIZE, "JPEG", QUALITY)
                facts = json.dumps({"level": name, "source": member.name}).encode()
                made.append({"__key__": member.name.split(".")[0], "jpg": picture, "json": facts})
    return made


def _warm(job: dict[str, Any]) -> dict[str, Any]:
    from pipelines import shard

    use_codec()
    time.sleep(1.0)  # so that each process gets one
    return {"stage": shard.__name__}


class Ours:
    """The index and shard stages, as `python pipelines/shard.py` runs them, with the start of Ray taken apart."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self.start_seconds: list[float] = []
        self.index_seconds: list[float] = []
        self.seconds: list[float] = []
        self.peak_bytes: list[int] = []

    def __call__(self, archive: Path, num_images: int) -> float:
        from cluster.session import Session
        from pipelines.config import Resources, ShardConfig
        from pipelines.index import make_index
        from pipelines.shard import shard
        from pipelines.sources import ImageNetSource
        from pipelines.stage import Pipeline, fan_out
        from pipelines.tracking import Tracker
        from vqvae_core.storage import Folder

        root = Folder.of(self._place)
        config = ShardConfig(image_size=SIZE, image_format="jpg", images_per_shard=PER_SHARD)
        source = ImageNetSource(path=str(archive))
        session, tracker = Session(PROCESSES), Tracker(root, "benchmark", {}, "", enabled=False)
        with Memory() as memory:
            begin = time.perf_counter()
            session.connect()
            list(fan_out(session, _warm, [{}] * PROCESSES))  # as the rivals' processes are
            self.start_seconds.append(time.perf_counter() - begin)
            pipeline = Pipeline(root, Resources(), session, tracker)
            begin = time.perf_counter()
            make_index(pipeline, source)
            self.index_seconds.append(time.perf_counter() - begin)
            images = shard(pipeline, source, config)
            seconds = time.perf_counter() - begin
            session.close()
        self.seconds.append(seconds)
        self.peak_bytes.append(memory.peak_bytes)
        made = images.num_images("train") + images.num_images("validation")
        assert made == num_images + 100, f"{made} images came out"
        shutil.rmtree(self._place)
        return made / seconds


def img2dataset(python: str, files: Path, out: Path) -> float:
    """Its local-file path: file:// addresses of unpacked pictures. Returns seconds, with its own start."""
    script = (
        "import sys; from img2dataset import download; download(url_list=sys.argv[1], output_folder=sys.argv[2], "
        f"processes_count={PROCESSES}, thread_count=8, image_size={SIZE}, resize_mode='center_crop', "
        f"encode_quality=95, output_format='webdataset', number_sample_per_shard={PER_SHARD}, enable_wandb=False)"
    )
    begin = time.perf_counter()
    done = subprocess.run(
        [python, "-c", script, str(files), str(out)],
        capture_output=True,
        text=True,
        env={"NO_ALBUMENTATIONS_UPDATE": "1"},
    )
    seconds = time.perf_counter() - begin
    if done.returncode:
        raise SystemExit(f"img2dataset ended with {done.returncode}: {done.stderr[-500:]}")
    return seconds


def unpack(archive: Path, place: Path) -> int:
    """Half of the pictures as files, which are enough for a rate, and a list of their addresses beside them."""
    place.mkdir()
    addresses = []
    places = inner_archives(archive)
    with archive.open("rb") as file:
        for name, offset, size in places[: len(places) // 2]:
            file.seek(offset)
            (place / name).mkdir()
            with tarfile.open(fileobj=io.BytesIO(file.read(size))) as tar:
                for member in tar:
                    path = place / name / member.name
                    path.write_bytes(tar.extractfile(member).read())  # type: ignore[union-attr]
                    addresses.append(f"file://{path}")
    (place / "addresses.txt").write_text("\n".join(addresses))
    return len(addresses)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short round; its ratios mean little")
    parser.add_argument("--images", type=int, default=96_000, help="in the archive; about 110 kB each")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--photographs", type=Path, help="folder with ILSVRC2012_img_val.tar")
    parser.add_argument("--img2dataset", metavar="PYTHON", help="a Python that can import img2dataset")
    parser.add_argument("--place", type=Path, help="where the data is made (the temporary folder)")
    options = parser.parse_args()
    pin(PROCESSES)
    num_images = 2_000 if options.quick else options.images
    rounds = 1 if options.quick else options.rounds
    pictures, what = photographs(options.photographs)
    with tempfile.TemporaryDirectory(dir=options.place) as folder:
        place = Path(folder)
        print(f"making an archive of {num_images} images", flush=True)
        make_archive(place / "data", pictures, num_images)
        archive = str(place / "data" / "ILSVRC2012_img_train.tar")
        needed, found = 2 * Path(archive).stat().st_size, free_memory_bytes()
        if needed > found:
            raise SystemExit(
                f"expected {needed / 2**30:.1f} GiB of free memory, so that all is read from there, found "
                f"{found / 2**30:.1f} GiB: give fewer --images; below a minute of work the ratios mean little"
            )
        return _compare(place, archive, num_images, rounds, pictures, what, options.img2dataset)


def into_memory(*paths: str) -> None:
    """Read files into the operating system's memory, which forgets them while other rivals run: the speed of the disk
    is not what is measured."""
    for path in paths:
        with Path(path).open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass


def _compare(
    place: Path, archive: str, num_images: int, rounds: int, pictures: list[bytes], what: str, python: str | None
) -> int:
    places = inner_archives(Path(archive))
    halves = [places[number::PROCESSES] for number in range(PROCESSES)]
    ours = Ours(place / "root")

    def loop() -> float:
        into_memory(archive)
        seconds, counts = in_processes(bare, [(archive, half) for half in halves], PROCESSES, warm_codec)
        return sum(counts) / seconds

    def by_hand(pool: bool, codec: Callable[..., bytes] = decode_resize_encode) -> float:
        into_memory(archive)
        # A quarter for one process: it is measured for as long.
        rate = shard_writer(archive, places if pool else places[: len(places) // 4], str(place / "hand"), pool, codec)
        shutil.rmtree(place / "hand")
        return rate

    def pipeline() -> float:
        into_memory(archive)
        return ours(Path(archive).parent, num_images)

    rivals: dict[str, Any] = {
        "bare_loop": loop,
        "pipeline": pipeline,
        "shard_writer": lambda: by_hand(False),
        "shard_writer_and_pool": lambda: by_hand(True),
        "shard_writer_and_pool_with_the_codec": lambda: by_hand(True, decode_resize_encode_fast),
    }
    if python:
        count = unpack(Path(archive), place / "files")
        unpacked = [str(path) for path in sorted((place / "files").glob("*/*"))]
        few = place / "files" / "few.txt"
        few.write_text("\n".join((place / "files" / "addresses.txt").read_text().split("\n")[:2]))
        start_seconds = img2dataset(python, few, place / "few")  # its own start, which is taken off

        def other() -> float:
            into_memory(*unpacked)
            seconds = img2dataset(python, place / "files" / "addresses.txt", place / "other") - start_seconds
            made = len(list((place / "other").glob("*.tar")))
            assert made == -(-count // PER_SHARD), f"img2dataset made {made} shards"
            shutil.rmtree(place / "other")
            return count / seconds

        rivals["img2dataset"] = other
    rates = interleaved(rivals, rounds)
    times_codec = median_ratio(rates["pipeline"], rates["shard_writer_and_pool_with_the_codec"])
    large_peak = max(ours.peak_bytes)
    seconds, starts = min(ours.seconds), [round(value, 2) for value in ours.start_seconds]
    index_seconds = [round(value, 2) for value in ours.index_seconds]
    ours.peak_bytes.clear()
    make_archive(place / "small", pictures, num_images // 4)
    ours(place / "small", num_images // 4)
    bars = [
        Bar("share_of_bare_loop", median_ratio(rates["pipeline"], rates["bare_loop"]), 0.85),
        Bar("times_shard_writer", median_ratio(rates["pipeline"], rates["shard_writer"]), 1.0),
        Bar("times_shard_writer_and_pool", median_ratio(rates["pipeline"], rates["shard_writer_and_pool"]), 1.0),
        Bar("seconds_of_work_in_a_round", seconds, 60.0),
        Bar("peak_memory_times_that_of_a_quarter", large_peak / ours.peak_bytes[0], 1.15, at_most=True),
    ]
    if "img2dataset" in rates:
        bars.append(Bar("times_img2dataset", median_ratio(rates["pipeline"], rates["img2dataset"]), 1.0))
    figures = {
        "images_per_second": {name: [round(rate, 1) for rate in found] for name, found in rates.items()},
        "times_shard_writer_and_pool_with_the_codec": round(times_codec, 3),
        "ray_start_seconds": starts,
        "index_seconds": index_seconds,
        "peak_memory_mib": round(large_peak / 2**20),
        "peak_memory_mib_of_a_quarter": round(ours.peak_bytes[0] / 2**20),
    }
    if python is None:
        figures["not_measured"] = ["img2dataset: name a Python that has it with --img2dataset"]
    settings = {
        "images": num_images,
        "images_of_slower_rivals": {"shard_writer": num_images // 4, "img2dataset": num_images // 2},
        "what": what,
        "processes": PROCESSES,
        "output": f"{SIZE}x{SIZE} JPEG q95 4:4:4",
    }
    return report("shard", settings, bars, figures)


if __name__ == "__main__":
    sys.exit(main())
