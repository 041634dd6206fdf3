"""Batches of a loader are those of the order, for any number of processes, whatever dies or is broken."""

import contextlib
import dataclasses
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.faults import faulty
from tests.vqvae_core.shards import key_of, make_images, picture
from vqvae_core import loader as loading
from vqvae_core.artifacts import Artifact, ArtifactError
from vqvae_core.augment import AugmentConfig
from vqvae_core.errors import InputError
from vqvae_core.image_shards import ImageShards, index_tar
from vqvae_core.loader import ImageLoader, LoaderError, _Process, _Processes
from vqvae_core.order import OrderConfig
from vqvae_core.storage import Folder

ROWS = [7, 12, 3, 18]
CONFIG = OrderConfig(batch_size=8, num_lanes=4, shuffle_window=5, seed=1)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageShards:
    return make_images(Folder.of(tmp_path_factory.mktemp("images")), ROWS)


def numbers(loader: ImageLoader, start: int, stop: int) -> list[list[int]]:
    """The numbers of the pictures in each batch, recognized by their pixels."""
    known = {picture(number).tobytes(): number for number in range(sum(ROWS))}
    return [[known[pixels.numpy().tobytes()] for pixels in batch] for batch in loader.batches(start, stop)]


def expected(loader: ImageLoader, start: int, stop: int) -> list[list[int]]:
    starts = np.cumsum([0, *ROWS])
    places = [loader.order.batch(step, loader.lanes) for step in range(start, stop)]
    return [(starts[place.files] + place.rows).tolist() for place in places]


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_batches_are_those_of_the_order(images: ImageShards, num_workers: int) -> None:
    loader = ImageLoader(images, CONFIG, AugmentConfig(), num_workers=num_workers)
    assert numbers(loader, 0, 17) == expected(loader, 0, 17)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_batch_wider_than_windows(tmp_path: Path, num_workers: int) -> None:
    """Its shards are open, however many windows it reaches into."""
    images = make_images(Folder.of(tmp_path), [2] * 20)
    config = OrderConfig(batch_size=16, num_lanes=1, shuffle_window=2)
    loader = ImageLoader(images, config, AugmentConfig(), num_workers=num_workers)
    known = {picture(number).tobytes(): number for number in range(40)}
    for step, batch in enumerate(loader.batches(0, 6)):
        places = loader.order.batch(step, loader.lanes)
        assert [known[pixels.numpy().tobytes()] for pixels in batch] == (2 * places.files + places.rows).tolist()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_ranks_and_a_resume(images: ImageShards, num_workers: int) -> None:
    whole = expected(ImageLoader(images, CONFIG, AugmentConfig()), 0, 12)
    parts = [
        numbers(ImageLoader(images, CONFIG, AugmentConfig(), rank=rank, world_size=2, num_workers=num_workers), 7, 12)
        for rank in range(2)
    ]
    assert [one + other for one, other in zip(*parts, strict=True)] == whole[7:]


@pytest.mark.parametrize("most_of_indexes", [1 << 20, 0])
def test_a_shard_is_walked_once_as_long_as_indexes_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most_of_indexes: int
) -> None:
    walks: list[str] = []
    monkeypatch.setattr(loading, "_MOST_OF_INDEXES", most_of_indexes)
    monkeypatch.setattr(loading, "index_tar", lambda data, where: (walks.append(where), index_tar(data, where))[1])
    images = make_images(Folder.of(tmp_path), [2] * 20)
    loader = ImageLoader(images, OrderConfig(batch_size=4, num_lanes=2, shuffle_window=3), AugmentConfig())
    known = {picture(number).tobytes(): number for number in range(40)}
    for step, batch in enumerate(loader.batches(0, 30)):  # three epochs
        places = loader.order.batch(step, loader.lanes)
        assert [known[pixels.numpy().tobytes()] for pixels in batch] == (2 * places.files + places.rows).tolist()
    assert len(walks) == 20 if most_of_indexes else len(walks) > 40


@pytest.mark.slow
def test_eight_processes_and_a_batch_smaller_than_their_number(images: ImageShards) -> None:
    config = OrderConfig(batch_size=4, num_lanes=4, shuffle_window=5)
    loader = ImageLoader(images, config, AugmentConfig(), num_workers=8)
    assert numbers(loader, 0, 3) == expected(loader, 0, 3)


def test_augmentation_is_the_same_for_any_number_of_processes(images: ImageShards) -> None:
    augment = AugmentConfig(flip=True, crop_size=4)
    made = [
        [batch.numpy().tobytes() for batch in ImageLoader(images, CONFIG, augment, num_workers=count).batches(0, 12)]
        for count in (0, 2)
    ]
    assert made[0] == made[1]
    loader = ImageLoader(images, CONFIG, augment)
    for step, batch in enumerate(loader.batches(0, 12)):
        for number, pixels in zip(expected(loader, step, step + 1)[0], batch, strict=True):
            epoch = step // loader.order.steps_per_epoch
            wanted = augment.apply(picture(number), key=key_of(number), seed=1, epoch=epoch)
            assert np.array_equal(pixels.numpy(), wanted)


@pytest.mark.slow
def test_a_thread_decodes_ahead_while_ranks_wait_for_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(CONFIG, batch_size=16, num_lanes=1)
    images = make_images(Folder.of(tmp_path), [40] * 4)
    decoded: list[int] = []
    decode = loading.Decoder.decode

    def counting(self: Any, epoch: int, shards: Any, rows: Any, out: np.ndarray) -> None:
        decode(self, epoch, shards, rows, out)
        decoded.append(len(rows))

    def comes(number: int) -> None:
        deadline = time.monotonic() + 20
        while sum(decoded) < number and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)  # for those that should not
        assert sum(decoded) == number

    monkeypatch.setattr(loading.Decoder, "decode", counting)
    loader = ImageLoader(images, config, AugmentConfig())
    with contextlib.closing(loader.batches(0, 8)) as batches:
        next(batches)
        comes(5 * 16)  # all that there is memory for
    decoded.clear()
    wait = loader.during(lambda _: comes(5 * 16))
    with contextlib.closing(loader.batches(0, 8)) as batches:
        next(batches)
        comes(3 * 16)  # the batch that is used, and two that are ready
        wait(torch.zeros(1))
        next(batches)
        comes(5 * 16)  # three are ready
        list(batches)
    decoded.clear()
    with contextlib.closing(loader.batches(0, 8)) as batches:
        next(batches)
        comes(3 * 16)  # left while it rests
    time.sleep(0.2)
    assert sum(decoded) == 3 * 16
    assert not any(thread.name == "loader" for thread in threading.enumerate())


def test_skipping_reads_nothing(images: ImageShards, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    whole = loading.MappedFile.open

    def counted(artifact: Artifact, path: str, known: dict) -> loading.MappedFile:
        opened.append(path)
        return whole(artifact, path, known)

    monkeypatch.setattr(loading.MappedFile, "open", counted)
    loader = ImageLoader(images, CONFIG, AugmentConfig(), rank=3, world_size=4)
    list(loader.batches(4, 5))
    assert {loader.order.files.index((path, images.artifact.files[path].rows)) for path in opened} == set(
        loader.order.near(4, loader.lanes)
    )


def test_a_file_is_hashed_again_only_where_it_was_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = make_images(Folder.of(tmp_path), ROWS)
    hashed, whole = [], Artifact.check
    monkeypatch.setattr(Artifact, "check", lambda self, path, data: hashed.append(path) or whole(self, path, data))
    loader = ImageLoader(images, CONFIG, AugmentConfig())
    list(loader.batches(0, 3 * loader.order.steps_per_epoch))
    assert sorted(hashed) == images.shards("train")
    path = tmp_path / "train-000001.tar"
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match="expected sha256"):
        list(loader.batches(0, loader.order.steps_per_epoch))


def test_from_s3(images: ImageShards, s3_bucket: str) -> None:
    remote = make_images(Folder.of(f"{s3_bucket}/loader"), ROWS)
    for num_workers in (0, 2):
        loader = ImageLoader(remote, CONFIG, AugmentConfig(), num_workers=num_workers)
        assert numbers(loader, 0, 6) == expected(loader, 0, 6)


@pytest.mark.slow
def test_from_s3_with_faults(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """503s, resets and cut bodies, each of which came up: the pictures are the same."""
    proxy = faulty(monkeypatch)
    remote = make_images(Folder.of(f"{s3_bucket}/loader-faults"), ROWS)
    try:
        for _ in range(3):
            loader = ImageLoader(remote, CONFIG, AugmentConfig())
            assert numbers(loader, 0, 6) == expected(loader, 0, 6)
    finally:
        proxy.stop()
    assert min(proxy.counts.values()) > 0, proxy.counts


def open_files() -> int:
    return len([*Path("/proc/self/fd").iterdir()])


def children() -> list[int]:
    """The loader's processes that live. Threads and processes may end while they are looked at."""
    found = []
    for task in Path(f"/proc/{os.getpid()}/task").iterdir():
        with contextlib.suppress(OSError):
            found += [int(pid) for pid in (task / "children").read_text().split()]
    return [pid for pid in found if is_loader(pid)]


def is_loader(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return b"loader_worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def test_a_process_that_stood_still_is_asked_again() -> None:
    """However slow it was, it keeps a part of what the quickest gets, and its share comes back."""
    crew = object.__new__(_Processes)
    asked: list[int] = []

    class Process(_Process):
        def __init__(self, rates: list[float]) -> None:
            self._rates = rates

        def tell(self, message: dict[str, Any], file: int | None = None) -> None:
            asked.append(len(message["rows"]))

        def answer(self) -> dict[str, Any]:
            return {"error": "", "rate": self._rates.pop(0)}

    still = [0.0] + [0.001] * 60 + [100.0] * 60
    crew._processes, crew._rates = [Process([0.0] + [100.0] * 120), Process(still)], [1.0, 1.0]  # type: ignore[list-item]
    rows = np.arange(64)
    for _ in range(121):
        crew.decode(0, rows, rows, 0)
        crew.wait()
    shares = asked[1::2]
    assert [one + other for one, other in zip(asked[::2], shares, strict=True)] == [64] * 121
    assert shares[1] == 32 and 10 <= min(shares) <= 16 and shares[-1] >= 31


def test_a_killed_process_is_replaced_and_nothing_is_lost(images: ImageShards) -> None:
    said: list[str] = []
    loader = ImageLoader(images, CONFIG, AugmentConfig(), num_workers=2, warn=said.append)
    known = {picture(number).tobytes(): number for number in range(sum(ROWS))}
    found = []
    for step, batch in enumerate(loader.batches(0, 120)):
        found.append([known[pixels.numpy().tobytes()] for pixels in batch])
        if step in (2, 40):
            os.kill(children()[0], signal.SIGKILL)
    assert found == expected(loader, 0, 120)
    assert [line.split(";")[0] for line in said] == [
        "a process that decodes training images ended by signal SIGKILL"
    ] * 2
    assert not children()


@pytest.mark.slow
def test_a_process_that_is_killed_while_its_shards_are_closed(tmp_path: Path) -> None:
    """It hangs, so that many questions wait whose shards are closed behind them; another one answers them all."""
    rows = [2] * 24
    images = make_images(Folder.of(tmp_path), rows)
    config = OrderConfig(batch_size=8, num_lanes=4, shuffle_window=2, seed=1)
    loader = ImageLoader(images, config, AugmentConfig(), num_workers=2, warn=lambda line: None)
    known = {picture(number).tobytes(): number for number in range(sum(rows))}
    found = []
    before = open_files()
    for step, batch in enumerate(loader.batches(0, 30)):
        found.append([known[pixels.numpy().tobytes()] for pixels in batch])
        if step in (3, 15):
            hung = children()[0]
            os.kill(hung, signal.SIGSTOP)
            threading.Timer(0.5, os.kill, (hung, signal.SIGKILL)).start()
    del batch  # the last one holds its map
    starts = np.cumsum([0, *rows])
    places = [loader.order.batch(step, loader.lanes) for step in range(30)]
    assert found == [(starts[place.files] + place.rows).tolist() for place in places]
    assert open_files() <= before


@pytest.mark.slow
def test_processes_that_die_again_and_again_end_training(images: ImageShards) -> None:
    loader = ImageLoader(images, CONFIG, AugmentConfig(), num_workers=1, warn=lambda line: None)
    with pytest.raises(
        LoaderError, match=r"ended by signal SIGKILL, as 3 did before it; is memory short\? Lower --res"
    ):
        for _ in loader.batches(0, 400):
            for pid in children():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_flipped_byte_and_a_missing_file_are_named(tmp_path: Path, num_workers: int) -> None:
    images = make_images(Folder.of(tmp_path), ROWS)
    loader = ImageLoader(images, CONFIG, AugmentConfig(), num_workers=num_workers)
    path = tmp_path / "train-000003.tar"
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"expected sha256 \w+ for train-000003.tar of .*, found \w+; restore"):
        list(loader.batches(0, 12))
    path.write_bytes(data[:-512])
    with pytest.raises(ArtifactError, match=r"expected \d+ bytes for train-000003.tar"):
        list(loader.batches(0, 12))
    path.unlink()
    with pytest.raises(ArtifactError, match="for train-000003.tar of .*, found nothing; restore the file"):
        list(loader.batches(0, 12))
    assert not children()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_image_that_is_none_is_named(tmp_path: Path, num_workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.vqvae_core import shards

    monkeypatch.setattr(shards, "encode", lambda pixels, kind: b"not a picture")
    images = make_images(Folder.of(tmp_path), [16])
    loader = ImageLoader(images, CONFIG, AugmentConfig(), num_workers=num_workers)
    with pytest.raises(InputError, match=r"expected an image for k\d+ in .*train-000000.tar, but it cannot be decoded"):
        list(loader.batches(0, 2))


def test_a_stream_that_is_left_early_leaves_nothing_behind(images: ImageShards) -> None:
    before = open_files()
    for num_workers in (0, 2):
        stream = ImageLoader(images, CONFIG, AugmentConfig(), num_workers=num_workers).batches(0, 400)
        next(stream)
        stream.close()  # type: ignore[attr-defined]
    assert not children()
    assert open_files() <= before


def test_the_index_of_a_tar(images: ImageShards) -> None:
    data = images.artifact.read("train-000001.tar")
    index = index_tar(data, "here")
    samples = images.read("train-000001.tar")
    assert index.keys == [sample.key for sample in samples]
    pairs = zip(index.offsets, index.num_bytes, strict=True)
    assert [data[start : start + size] for start, size in pairs] == [sample.data for sample in samples]
    cut = int(index.offsets[3] + -(-index.num_bytes[3] // 512) * 512)
    for broken, words in ((data[:cut], "the tar ends before it"), (b"x" * 1024, "plain files")):
        with pytest.raises(ArtifactError, match=words):
            index_tar(broken, "here")
