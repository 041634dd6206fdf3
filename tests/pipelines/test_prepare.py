"""The images of a job: what it is told to read, what is held at a time, what becomes of each."""

import dataclasses
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipelines import prepare
from pipelines.config import ShardConfig
from pipelines.index import Entries, source_to_json
from pipelines.prepare import Prepared, Reject
from pipelines.shard import _Group
from pipelines.sources import ClassFoldersSource, ImageNetSource
from pipelines.sources.base import Entry, Run, SourceError, SourceItem
from pipelines.sources.files import forget_files
from tests.pipelines.data import frame, write_class_folders, write_imagenet
from vqvae_core.artifacts import hash_bytes
from vqvae_core.images import encode
from vqvae_core.storage import Folder

SMALL = ShardConfig(image_size=8)
EXACT = ShardConfig(image_size=8, resize="exact")


def original(image: bytes | np.ndarray | None = None, level: str | None = None, **more: object) -> prepare._Original:
    item = SourceItem(position=0, image=image, **more)  # type: ignore[arg-type]
    return prepare._Original(item=item, key="k", level=level, run="r", place=0)


def prepared(
    it: prepare._Original, config: ShardConfig = SMALL, labels: dict[str, int] | None = None
) -> Prepared | Reject:
    return prepare._prepare([it], config, labels)[0][1]


def test_what_a_job_reads_arrives_as_it_was_sent() -> None:
    names = [b"one.jpg", b"\xff\xfe not UTF-8.jpg", b"", "ü.png".encode()]
    table = pa.table(
        {
            "name": names,
            "level": pa.array(["cat", None, "dog", "cat"]).dictionary_encode(),
            "offset": pa.array([0, 2**40, 5, 6], pa.int64()),
            "num_bytes": pa.array([1, -1, 2**31 - 1, 0], pa.int32()),
            "run": pa.array([3, 3, 7, 7], pa.int32()),
            "position": pa.array([0, 9, 2, 4], pa.int32()),
            "renamed": [False, True, False, True],
        }
    )
    runs = {3: Run(name="a", prefix="p", locator={"file": "x"}), 7: Run(name="b")}
    zeros = np.zeros(4, np.int32)
    group = _Group(0, Entries(table), zeros, np.array([5, 2, 9, -1], np.int32), (zeros, zeros), runs)
    found, renamed, places = prepare.unpack(group.reads(np.array([0, 1, 3])))
    assert [(run, len(entries)) for run, entries in found] == [(runs[3], 2), (runs[7], 1)]
    assert [entry for _, entries in found for entry in entries] == [
        Entry(position=0, name="one.jpg", level="cat", offset=0, num_bytes=1),
        Entry(position=9, name=names[1].decode("utf-8", "surrogateescape"), level=None, offset=2**40, num_bytes=-1),
        Entry(position=4, name="ü.png", level="cat", offset=6, num_bytes=0),
    ]
    assert renamed == [False, True, True]
    assert places == [5, 2, -1]


def test_a_frame_of_another_size_is_rejected() -> None:
    pixels = np.arange(360, dtype=np.uint8).reshape(10, 12, 3)
    reason = "wrong size: is 12 x 10, expected 8 x 8 (--shard.resize crop accepts any size)"
    assert prepared(original(pixels), EXACT) == Reject("r", "k", reason, hash_bytes(pixels.tobytes()))
    found = prepared(original(pixels, "cat", facts={"step": 4}), labels={"ant": 0, "cat": 1})
    assert isinstance(found, Prepared)
    assert found.sample.facts == {"step": 4, "level": "cat", "label": 1}
    assert found.sample.pixels().shape == (8, 8, 3)
    assert (found.origin.width, found.origin.height, found.origin.kind) == (12, 10, "pixels RGB")
    assert found.origin.sums == found.sample.pixels().sum(axis=(0, 1), dtype=np.int64).tolist()


def test_rejects_name_their_place_and_their_bytes() -> None:
    assert prepared(original(b"none", facts={"source": "a/b.jpg"})) == Reject(
        "a/b.jpg", "k", "cannot be decoded: UnidentifiedImageError", hash_bytes(b"none")
    )
    assert prepared(original(fault="no image: a link")) == Reject("r", "k", "no image: a link", "")
    assert prepared(original(fault="too many bytes", sha256="ab")) == Reject("r", "k", "too many bytes", "ab")
    image = encode(frame(1, 8), "png")
    unlabeled = prepared(original(image), labels={"cat": 0})
    assert isinstance(unlabeled, Reject)
    assert unlabeled.reason == "no label: other images of the source have one"


def test_rejects_hold_no_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[weakref.ref[np.ndarray]] = []
    load = prepare.load

    def remembered(data: bytes):
        picture = load(data)
        decoded.append(weakref.ref(picture.pixels))
        return picture

    monkeypatch.setattr(prepare, "load", remembered)
    image = encode(frame(1, 40), "png")
    fitted = [prepare._fit(original(image).item, None, EXACT, None) for _ in range(3)]
    assert all(isinstance(reason, str) for reason in fitted)
    assert [pixels() for pixels in decoded] == [None] * 3


def job(source: ClassFoldersSource | ImageNetSource, folder: Path) -> tuple[dict, dict, list[Entry]]:
    """What all jobs share, one that reads the whole source, and its images."""
    parts = [found for part in source.parts() for found in source.index(part, Folder.of(folder))]
    entries = [entry for found in parts for entry in found.entries]
    values = [
        {**dataclasses.asdict(entry), "name": entry.name.encode(), "renamed": False, "place": place}
        for place, entry in enumerate(entries)
    ]
    images = pa.Table.from_pylist(values, schema=prepare.IMAGES)
    reads = prepare.pack([found.run for found in parts], [len(found.entries) for found in parts], images)
    spec = {"config": dataclasses.asdict(SMALL), "source": source_to_json(source), "spool": str(folder)}
    return spec, reads, entries


@pytest.fixture
def no_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "_label_map", lambda spool: None)


@pytest.mark.usefixtures("no_labels")
def test_the_disk_is_told_of_some_images_ahead_and_of_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_class_folders(tmp_path / "source")
    source = ClassFoldersSource(path=str(tmp_path / "source"), validation_fraction=0.0)
    happened: list[str] = []
    monkeypatch.setattr(ClassFoldersSource, "will_read", lambda self, run, entry: happened.append("told"))
    monkeypatch.setattr(prepare, "_AHEAD_IMAGES", 3)
    monkeypatch.setattr(prepare, "_BATCH_IMAGES", 2)
    spec, reads, entries = job(source, tmp_path)
    for number, (place, _) in enumerate(prepare.prepare(spec, reads)):
        happened.append("read")
        assert place == number
    assert len(entries) > 8
    assert happened[:10] == ["told"] * 5 + ["read", "read", "told", "told", "read"]
    assert Counter(happened) == {"told": len(entries), "read": len(entries)}
    assert happened[-3:] == ["read"] * 3


def test_large_images_are_held_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "_BATCH_IMAGES", 3)
    monkeypatch.setattr(prepare, "_BATCH_BYTES", 100)
    images = [b"x" * 60, np.zeros((4, 4, 3), np.uint8), b"x" * 500, None, b"", b"", b""]
    batches = list(prepare._batched(map(original, images), extra_bytes=0))
    found = [each.item.image for batch in batches for each in batch]
    assert all(image is expected for image, expected in zip(found, images, strict=True))
    assert [len(batch) for batch in batches] == [2, 1, 3, 1]
    assert [len(batch) for batch in prepare._batched(map(original, images), extra_bytes=50)] == [1, 2, 2, 2]


@pytest.mark.usefixtures("no_labels")
def test_one_batch_is_given_up_before_the_next_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "_BATCH_IMAGES", 4)
    write_class_folders(tmp_path / "source")
    source = ClassFoldersSource(path=str(tmp_path / "source"), validation_fraction=0.0)
    items: list[weakref.ref[SourceItem]] = []
    fitted: list[weakref.ref[np.ndarray]] = []
    held: list[tuple[int, int]] = []
    read, fit = prepare._read, prepare._fit

    def reading(*arguments) -> Iterator[prepare._Original]:
        for each in read(*arguments):
            items.append(weakref.ref(each.item))
            held.append((sum(item() is not None for item in items), sum(pixels() is not None for pixels in fitted)))
            yield each

    def fitting(*arguments) -> prepare._Fitted | str:
        found = fit(*arguments)
        assert isinstance(found, prepare._Fitted)
        fitted.append(weakref.ref(found.pixels))
        return found

    monkeypatch.setattr(prepare, "_read", reading)
    monkeypatch.setattr(prepare, "_fit", fitting)
    spec, reads, entries = job(source, tmp_path)
    assert len(list(prepare.prepare(spec, reads))) == len(entries) > 8
    assert max(num_items for num_items, _ in held) <= 5  # of the batch, and the last of the one before in its reader
    assert max(num_pixels for _, num_pixels in held) == 0


@pytest.mark.usefixtures("no_labels")
def test_an_archive_that_is_cut_during_a_job(tmp_path: Path) -> None:
    write_imagenet(tmp_path / "s", num_synsets=4)
    source = ImageNetSource(path=str(tmp_path / "s"))
    spec, reads, _ = job(source, tmp_path)
    archive = tmp_path / "s" / "ILSVRC2012_img_train.tar"
    size = archive.stat().st_size
    found = [run for part in source.parts() for run in source.index(part, Folder.of(tmp_path))]
    assert len(list(source.read(found[0].run, found[0].entries, Folder.of(tmp_path)))) == len(found[0].entries)
    archive.write_bytes(archive.read_bytes()[: found[1].entries[0].offset + 10])
    with pytest.raises(SourceError, match=r"expected \d+ bytes at .*found 10: it was cut while it was read; run it"):
        list(source.read(found[1].run, found[1].entries, Folder.of(tmp_path)))
    with pytest.raises(SourceError, match="it changed since it was indexed"):  # by the next job, which opens it anew
        list(prepare.prepare(spec, reads))
    assert archive.stat().st_size < size
    forget_files()
