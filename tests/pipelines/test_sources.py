"""Each source by itself: what its index says, and what it reads."""

import dataclasses
import gzip
import io
import json
import os
import shutil
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.sources import (
    SOURCES,
    AnySource,
    Cifar10Source,
    ClassFoldersSource,
    DMLabSource,
    HuggingFaceSource,
    ImageNetSource,
    RecordedFramesSource,
    ViZDoomSource,
    WebDatasetSource,
    base,
    class_folders,
    files,
    tars,
    vizdoom,
)
from pipelines.sources.base import RunIndex, SourceError, SourceItem, given_split, number_by_name, splits_of
from pipelines.sources.files import forget_files, open_source
from tests.pipelines.data import (
    WRITERS,
    frame,
    tar_of,
    write_cifar10,
    write_class_folders,
    write_frames,
    write_huggingface,
    write_imagenet,
    write_webdataset,
)
from vqvae_core.artifacts import hash_bytes
from vqvae_core.decoding import decode
from vqvae_core.storage import Folder


def indexed(source: AnySource, spool: Path) -> list[RunIndex]:
    return [found for part in source.parts() for found in source.index(part, Folder.of(spool))]


def read(source: AnySource, found: RunIndex, spool: Path, positions: list[int] | None = None) -> list[SourceItem]:
    entries = found.entries if positions is None else [found.entries[position] for position in positions]
    return list(source.read(found.run, entries, Folder.of(spool)))


def levels(found: list[RunIndex]) -> set[str]:
    return {entry.level for run in found for entry in run.entries if entry.level is not None}


def count(found: list[RunIndex], split: str | None = None) -> int:
    return sum(split in (None, entry.split) for run in found for entry in run.entries)


def test_recorded_frames(tmp_path: Path) -> None:
    write_frames(tmp_path)
    source = RecordedFramesSource(path=str(tmp_path))
    source.check()
    found = indexed(source, tmp_path)
    assert (count(found), count(found, "validation")) == (72, 24)
    assert source.labels(levels(found)) == {"cave": 0, "tower": 1}
    items = [item for run in found for item in read(source, run, tmp_path)]
    assert len({entry.name for run in found for entry in run.entries}) == 72
    assert all(np.array_equal(decode(item.image), frame(100 * item.facts["episode"] + item.facts["step"]))
               for item in items)  # fmt: skip
    some = read(source, found[1], tmp_path, [2, 5])
    assert [item.image for item in some] == [read(source, found[1], tmp_path)[n].image for n in (2, 5)]


def test_an_episode_is_in_one_split(tmp_path: Path) -> None:
    write_frames(tmp_path, validation=False)
    source = RecordedFramesSource(path=str(tmp_path), validation_fraction=0.4)
    splits: dict[int, set[str]] = {}
    for run in indexed(source, tmp_path):
        for entry, item in zip(run.entries, read(source, run, tmp_path), strict=True):
            splits.setdefault(item.facts["episode"], set()).add(entry.split)
    assert all(len(found) == 1 for found in splits.values())
    assert set().union(*splits.values()) == {"train", "validation"}


def test_imagenet(tmp_path: Path) -> None:
    write_imagenet(tmp_path)
    source = ImageNetSource(path=str(tmp_path))
    source.check()
    found = indexed(source, tmp_path)
    assert (count(found), count(found, "validation")) == (17, 5)
    assert source.labels(levels(found)) == {"n00000000": 0, "n00000001": 1, "n00000002": 2}
    items = read(source, found[1], tmp_path)
    assert [entry.name for entry in found[1].entries] == [f"n00000001_{n}.JPEG" for n in range(4)]
    assert [decode(item.image).shape for item in items] == [(24 + 8 * n,) * 2 + (3,) for n in range(4)]
    assert items[1].facts == {"source": "ILSVRC2012_img_train.tar/n00000001.tar/n00000001_1.JPEG"}
    assert [found[-1].entries[n].level for n in (0, 3)] == ["n00000001", "n00000002"]


def test_class_folders(tmp_path: Path) -> None:
    write_class_folders(tmp_path, num_images=40)
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "cat" / ".hidden.png").write_text("no image")
    source = ClassFoldersSource(path=str(tmp_path), validation_fraction=0.25)
    found = indexed(source, tmp_path)
    assert count(found) == 80
    assert 8 <= count(found, "validation") <= 35
    assert source.labels(levels(found)) == {"cat": 0, "dog": 1}
    items = read(source, found[1], tmp_path, [0, 2])
    assert [item.facts["source"] for item in items] == [f"dog/{found[1].entries[n].name}" for n in (0, 2)]
    assert found[1].run.prefix == "dog"


def test_class_folders_with_splits(tmp_path: Path) -> None:
    write_class_folders(tmp_path, splits=("train", "val"))
    source = ClassFoldersSource(path=str(tmp_path))
    found = indexed(source, tmp_path)
    assert (count(found, "train"), count(found, "validation")) == (12, 12)
    assert levels(found) == {"cat", "dog"}
    assert {run.run.name for run in found} == {"train/cat", "train/dog", "val/cat", "val/dog"}


def test_files_that_are_no_images_are_counted_by_extension(tmp_path: Path) -> None:
    write_class_folders(tmp_path)
    (tmp_path / "owl").mkdir()
    for place in ("cat/a.HEIC", "owl/a.heic", "owl/b.heic", "owl/README", "list.txt", "owl/.hidden"):
        (tmp_path / place).write_bytes(b"x")
    source = ClassFoldersSource(path=str(tmp_path))
    found = indexed(source, tmp_path)
    assert sum((Counter(each.ignored) for each in found), Counter()) == {".heic": 3, "none": 1, ".txt": 1}
    assert count(found) == 12
    assert "owl" not in levels(found)


def test_the_driver_keeps_folders_and_no_files(tmp_path: Path) -> None:
    write_class_folders(tmp_path, num_images=40)
    parts = ClassFoldersSource(path=str(tmp_path)).parts()
    assert [part.name for part in parts] == ["cat", "dog"]
    assert len(json.dumps([dataclasses.asdict(part) for part in parts])) < 400


def test_a_folder_that_changes_while_it_is_indexed(tmp_path: Path) -> None:
    write_class_folders(tmp_path)
    source = ClassFoldersSource(path=str(tmp_path))
    part = source.parts()[0]
    (tmp_path / "cat" / "late.png").write_bytes(b"x")
    with pytest.raises(SourceError, match="expected the same files in .*/cat as a moment ago, found others"):
        list(source.index(part, Folder.of(tmp_path)))
    before = source.identity()
    forget_files()
    assert source.identity() != before
    assert count(indexed(source, tmp_path)) == 13


@pytest.mark.parametrize("kind", ["class_folders", "imagenet", "webdataset"])
def test_a_file_too_large_to_hold_has_its_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    WRITERS[kind](tmp_path)
    source = SOURCES[kind](path=str(tmp_path))
    found = indexed(source, tmp_path)
    whole = [read(source, each, tmp_path) for each in found]
    monkeypatch.setattr(tars, "MAX_MEMBER_BYTES", 10)
    monkeypatch.setattr(class_folders, "MAX_MEMBER_BYTES", 10)
    monkeypatch.setattr(files, "_HASHED_BYTES", 64)
    for each, items in zip(found, whole, strict=True):
        for item, large in zip(items, read(source, each, tmp_path), strict=True):
            assert isinstance(item.image, bytes)
            assert (large.image, large.sha256) == (None, hash_bytes(item.image))
            assert large.fault == f"too many bytes: {len(item.image)} are more than 10"


def test_a_test_split_beside_a_validation_split_is_left_out() -> None:
    assert splits_of(["a/train-0", "a/test-0"]) == {"a/train-0": "train", "a/test-0": "validation"}
    assert splits_of(["train-0", "val-0", "test-0"]) == {"train-0": "train", "val-0": "validation", "test-0": None}
    assert splits_of(["a-0", "b-0"]) is None


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-00000-of-00002.parquet", "train"),
        ("default/train/0000.parquet", "train"),
        ("en/validation/train_part.parquet", "train"),
        ("imagenet1k-validation-00.tar", "validation"),
        ("val.tar", "validation"),
        ("a/test/0.tar", "test"),
        ("valley.tar", None),
        ("trainer-0.tar", None),
        ("latest.tar", None),
        ("0000.parquet", None),
    ],
)
def test_the_split_that_a_name_says(name: str, split: str | None) -> None:
    assert given_split(name) == split


def test_splits_by_folders_of_files(tmp_path: Path) -> None:
    write_huggingface(tmp_path / "flat")
    for old, new in (("train-00000-of-00002", "train/0"), ("train-00001-of-00002", "train/1"),
                     ("validation-00000-of-00001", "test/0")):  # fmt: skip
        (tmp_path / "s" / new).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "flat" / f"{old}.parquet").rename(tmp_path / "s" / f"{new}.parquet")
    found = indexed(HuggingFaceSource(path=str(tmp_path / "s")), tmp_path)
    assert (count(found, "train"), count(found, "validation")) == (28, 14)


@pytest.mark.parametrize("kind", ["huggingface", "webdataset", "recorded_frames"])
def test_files_that_do_not_say_their_split_and_those_left_out(tmp_path: Path, kind: str) -> None:
    WRITERS[kind](tmp_path / "a")
    first = min((tmp_path / "a").iterdir())
    (tmp_path / "s").mkdir()
    for name in ("train-0", "val-0", "test-0"):
        shutil.copy(first, tmp_path / "s" / f"{name}{first.suffix}")
    found = indexed(SOURCES[kind](path=str(tmp_path / "s")), tmp_path)
    assert sum((Counter(each.ignored) for each in found), Counter())["test split"] == 1
    assert count(found, "train") == count(found, "validation") > 0
    shutil.copy(first, tmp_path / "s" / f"extra{first.suffix}")
    with pytest.raises(SourceError, match="1 have none, for example extra.*: rename them or move them away"):
        SOURCES[kind](path=str(tmp_path / "s")).parts()


def test_images_of_a_test_folder_are_counted(tmp_path: Path) -> None:
    write_class_folders(tmp_path, splits=("train", "val", "test"))
    found = indexed(ClassFoldersSource(path=str(tmp_path)), tmp_path)
    assert count(found) == 24
    assert sum((Counter(each.ignored) for each in found), Counter()) == {"test split": 12}


def test_links_to_folders_are_followed_and_loops_are_not(tmp_path: Path) -> None:
    write_class_folders(tmp_path / "far")
    (tmp_path / "near" / "ant").mkdir(parents=True)
    (tmp_path / "near" / "ant" / "1.png").write_bytes(b"x")
    (tmp_path / "near" / "cat").symlink_to(tmp_path / "far" / "cat")
    (tmp_path / "near" / "again").symlink_to("ant")  # another name of a class, before it by name
    (tmp_path / "near" / "loop").symlink_to(tmp_path / "near")
    (tmp_path / "near" / "ant" / "up").symlink_to("..")
    found = indexed(ClassFoldersSource(path=str(tmp_path / "near")), tmp_path)
    assert levels(found) == {"again", "ant", "cat"}
    assert count(found) == 8


@pytest.mark.parametrize("kind", ["class_folders", "imagenet", "webdataset"])
def test_a_file_that_is_cut_after_it_was_indexed_rejects_no_image(tmp_path: Path, kind: str) -> None:
    WRITERS[kind](tmp_path)
    source = SOURCES[kind](path=str(tmp_path))
    found = indexed(source, tmp_path)
    for path in tmp_path.rglob("*.*"):
        if path.suffix in (".tar", ".png"):
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(SourceError, match="it changed since it was .*; run it again when nobody writes there"):
        for each in found:
            read(source, each, tmp_path)


@pytest.mark.parametrize("kind", [b"x", b"L"])
def test_a_header_that_claims_very_much(tmp_path: Path, kind: bytes) -> None:
    """A pax header (x) or a long name (L), which a reader holds in memory as a whole."""
    member = tarfile.TarInfo("h")
    member.type, member.size = kind, 1 << 33
    with (tmp_path / "0.tar").open("wb") as file:
        file.write(member.tobuf(tarfile.GNU_FORMAT))
        file.truncate(1 << 34)  # takes no room
    with pytest.raises(SourceError, match="expected a complete tar at 0.tar, found: a header of .* bytes, more than"):
        indexed(WebDatasetSource(path=str(tmp_path)), tmp_path)


def test_labels_as_other_writers_have_them(tmp_path: Path) -> None:
    image = pa.array([{"bytes": b"x", "path": ""}] * 3)
    for name, labels in {
        "large": pa.array(["b", "a", "b"], pa.large_string()),
        "category": pa.array(["b", "a", "b"]).dictionary_encode(),
    }.items():
        (tmp_path / name).mkdir()
        pq.write_table(pa.table({"image": image, "label": labels}), tmp_path / name / "0.parquet")
        assert levels(indexed(HuggingFaceSource(path=str(tmp_path / name)), tmp_path)) == {"a", "b"}


def test_a_file_name_that_is_no_text(tmp_path: Path) -> None:
    write_huggingface(tmp_path)
    odd = tmp_path / b"train-caf\xe9.parquet".decode("utf-8", "surrogateescape")
    (tmp_path / "train-00000-of-00002.parquet").rename(odd)
    source = HuggingFaceSource(path=str(tmp_path))
    found = indexed(source, tmp_path)
    for each in found:
        for item in read(source, each, tmp_path):
            item.facts["source"].encode()
    json.dumps(source.identity()).encode()


def test_a_batch_twice_in_the_archive(tmp_path: Path) -> None:
    batch = bytes(3073)
    names = ("data_batch_1", "test_batch", "other/data_batch_1")
    data = gzip.compress(tar_of([(f"{name}.bin", batch) for name in names]))
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(data)
    with pytest.raises(SourceError, match="expected each batch once .*, found data_batch_1.bin twice"):
        indexed(Cifar10Source(path=str(tmp_path)), tmp_path)


def test_negative_labels_are_none() -> None:
    assert number_by_name({"-1", "0", "1"}) == {"0": 0, "1": 1}


def test_captions_are_no_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "MAX_LABELS", 3)
    with pytest.raises(SourceError, match="expected at most 3 different labels, found 4, for example 'a'; is it"):
        number_by_name(set("abcd"))


@pytest.mark.parametrize("names", [True, False])
def test_huggingface(tmp_path: Path, names: bool) -> None:
    write_huggingface(tmp_path, names=names)
    source = HuggingFaceSource(path=str(tmp_path))
    source.check()
    found = indexed(source, tmp_path)
    assert (count(found, "train"), count(found, "validation")) == (28, 14)
    expected = ["ant", "bee", "cow"] if names else ["0", "1", "2"]
    assert source.labels(levels(found)) == {name: label for label, name in enumerate(expected)}
    items = read(source, found[1], tmp_path, [0, 4])
    assert [decode(item.image).tobytes() for item in items] == [frame(5, 24).tobytes(), frame(9, 24).tobytes()]
    assert [found[1].entries[n].level for n in (0, 4)] == [expected[5 % 3], expected[9 % 3]]


def test_cifar10(tmp_path: Path) -> None:
    write_cifar10(tmp_path / "archive")
    source = Cifar10Source(path=str(tmp_path / "archive"))
    source.check()
    found = indexed(source, tmp_path / "spool")
    assert (count(found, "train"), count(found, "validation")) == (45, 9)
    assert list(source.labels(set()) or {})[:3] == ["airplane", "automobile", "bird"]
    items = read(source, found[2], tmp_path / "spool", [1, 8])
    assert [np.array_equal(item.image, frame(80 + n, 32)) for item, n in zip(items, (1, 8), strict=True)] == [True] * 2
    assert found[2].entries[1].level == "cat"


def test_webdataset(tmp_path: Path) -> None:
    write_webdataset(tmp_path)
    source = WebDatasetSource(path=str(tmp_path), validation_fraction=0.2)
    found = indexed(source, tmp_path)
    assert count(found) == 24
    assert 0 < count(found, "validation") < 12
    assert source.labels(levels(found)) == {"0": 0, "1": 1, "2": 2, "3": 3}
    item = read(source, found[1], tmp_path, [3])[0]
    assert decode(item.image).shape == (28, 28, 3)
    assert item.facts == {"source": "shard-0001.tar/000103"}


def test_webdataset_labels_in_json_and_samples_without_image(tmp_path: Path) -> None:
    picture = (Path(__file__).parents[2] / "docs" / "demo.png").read_bytes()
    files = [
        ("a.json", json.dumps({"label": "boat", "caption": "x"}).encode()),
        ("a.png", picture),
        ("b.txt", b"no image"),
        ("c.PNG", picture),
        ("c.json", b"{broken"),
        ("dir/d.png", picture),
        ("dir/d.json", json.dumps({"label": 7}).encode()),
        ("dir/d.png", picture),
    ]
    (tmp_path / "x.tar").write_bytes(tar_of(files))
    source = WebDatasetSource(path=str(tmp_path))
    (found,) = indexed(source, tmp_path)
    assert [(entry.name, entry.level) for entry in found.entries] == [
        ("a", "boat"), ("b", None), ("c", None), ("dir/d", "7"), ("dir/d", None),
    ]  # fmt: skip
    items = read(source, found, tmp_path)
    assert [bool(item.image) for item in items] == [True, False, True, True, True]
    assert items[1].fault.startswith("no image: ")


def test_our_own_shards_are_a_source(tmp_path: Path) -> None:
    facts = json.dumps({"label": 3, "level": "cave"}).encode()
    (tmp_path / "train-000000.tar").write_bytes(tar_of([("k.png", b"x"), ("k.json", facts)]))
    (tmp_path / "validation-000000.tar").write_bytes(tar_of([("l.png", b"x"), ("l.json", facts)]))
    found = indexed(WebDatasetSource(path=str(tmp_path)), tmp_path)
    assert [run.entries[0].split for run in found] == ["train", "validation"]
    assert levels(found) == {"cave"}


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the module path with a stand-in for the engine's module."""
    place = tmp_path / "engine"
    place.mkdir()
    shutil.copy(Path(__file__).with_name("deepmind_lab_stub.py"), place / "deepmind_lab.py")
    monkeypatch.syspath_prepend(str(place))
    yield place
    sys.modules.pop("deepmind_lab", None)


def test_dmlab(engine: Path, tmp_path: Path) -> None:
    source = DMLabSource(
        levels=("a", "contributed/dmlab30/b"),
        train_episodes_per_level=2,
        validation_episodes_per_level=1,
        frames_per_episode=20,
    )
    source.check()
    assert source.identity() == {"kind": "dmlab", "engine": "stub"}
    found = indexed(source, tmp_path)
    assert (count(found, "train"), count(found, "validation")) == (80, 40)
    assert source.labels(levels(found)) == {"a": 0, "contributed/dmlab30/b": 1}
    frames = [item.image for item in read(source, found[0], tmp_path)]  # it outlasts an episode of the stand-in
    assert {(picture.shape, picture.dtype) for picture in frames} == {((84, 84, 3), np.dtype(np.uint8))}
    assert len({picture.tobytes() for picture in frames}) > 15
    some = read(source, found[0], tmp_path, [3, 19])
    assert all(np.array_equal(item.image, frames[n]) for item, n in zip(some, (3, 19), strict=True))
    other = DMLabSource(levels=("no_such_level",))
    with pytest.raises(SourceError, match="expected DeepMind Lab to open the level 'no_such_level', but: level not"):
        read(other, indexed(other, tmp_path)[0], tmp_path)


def test_dmlab_without_the_engine() -> None:
    with pytest.raises(SourceError, match="needs the module deepmind_lab, which is not installed .* build its Python"):
        DMLabSource().check()


@pytest.mark.parametrize("kind", WRITERS)
def test_identity_is_content_not_place(tmp_path: Path, kind: str) -> None:
    for name in ("a", "b"):
        WRITERS[kind](tmp_path / name)
    one, other = (SOURCES[kind](path=str(tmp_path / name)).identity() for name in ("a", "b"))
    assert one == other
    assert str(tmp_path) not in str(one)
    parts = SOURCES[kind](path=str(tmp_path / "a")).parts()
    assert str(tmp_path) not in str(parts)


@pytest.mark.shared_data
def test_the_real_archives(shared_data: Path, tmp_path: Path) -> None:
    found = indexed(ImageNetSource(path=str(shared_data / "imagenet")), tmp_path)
    assert (count(found), count(found, "validation"), len(levels(found))) == (600, 100, 600)


@pytest.mark.shared_data
def test_the_real_frames(shared_data: Path, tmp_path: Path) -> None:
    found = indexed(RecordedFramesSource(path=str(shared_data / "dmlab")), tmp_path)
    assert (count(found), count(found, "validation"), len(levels(found))) == (16410 + 3283, 3283, 32)


@pytest.mark.shared_data
def test_the_real_cifar10(shared_data: Path, tmp_path: Path) -> None:
    source = HuggingFaceSource(path=str(shared_data / "cifar10"))
    found = indexed(source, tmp_path)
    assert (count(found, "train"), count(found, "validation")) == (50_000, 10_000)
    assert source.labels(levels(found)) == {str(n): n for n in range(10)}


def test_numbers_keep_their_value_and_names_are_in_order() -> None:
    assert number_by_name({"10", "2"}) == {str(n): n for n in range(11)}
    assert number_by_name({"b", "a"}) == {"a": 0, "b": 1}
    assert number_by_name({"007", "1"}) == {"1": 0, "007": 1}
    assert number_by_name({"123456789", "5"}) == {"5": 0, "123456789": 1}
    assert number_by_name(set()) is None
    assert number_by_name({*map(str, range(12)), "-1"}) == {str(n): n for n in range(12)}


@pytest.mark.parametrize("kind", [name for name in SOURCES if name not in ("vizdoom", "dmlab")])
def test_a_source_that_is_not_there(tmp_path: Path, kind: str) -> None:
    with pytest.raises(SourceError, match="none was given; name it with --source PATH"):
        SOURCES[kind]().check()
    with pytest.raises(SourceError, match="found no such folder"):
        SOURCES[kind](path=str(tmp_path / "nothing")).check()
    with pytest.raises(SourceError, match="found no .* there"):
        SOURCES[kind](path=str(tmp_path)).check()


def test_files_that_are_something_else(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(b"text")
    for kind in (RecordedFramesSource, HuggingFaceSource):
        with pytest.raises(SourceError, match="expected a Parquet file at .*x.parquet, it cannot be read"):
            kind(path=str(tmp_path)).check()
    write_imagenet(tmp_path)
    (tmp_path / "val_synsets.txt").write_text("n1\n")
    with pytest.raises(SourceError, match="found 5 pictures in ILSVRC2012_img_val.tar and 1 lines"):
        indexed(ImageNetSource(path=str(tmp_path)), tmp_path)
    (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(tar_of([("a.JPEG", b"x")]))
    with pytest.raises(SourceError, match="expected one tar a synset in ILSVRC2012_img_train.tar, found a.JPEG"):
        indexed(ImageNetSource(path=str(tmp_path)), tmp_path)


@pytest.mark.parametrize("table", [{"picture": [1]}, {"image": ["text"]}], ids=["none", "text"])
def test_parquet_without_the_column(tmp_path: Path, table: dict) -> None:
    pq.write_table(pa.table(table), tmp_path / "x.parquet")
    with pytest.raises(SourceError, match="expected (the column `image` or `img`|`image` as a struct of bytes)"):
        HuggingFaceSource(path=str(tmp_path)).check()


def text_of(*values: bytes) -> pa.Array:
    """Strings of these bytes, whether they are UTF-8 or not."""
    return pa.Array.from_buffers(pa.string(), len(values), pa.array(values, pa.binary()).buffers())


@pytest.mark.parametrize("column", ["level", "path"])
def test_parquet_with_strings_that_are_no_text(tmp_path: Path, column: str) -> None:
    paths = text_of(b"caf\xe9") if column == "path" else pa.array(["a"])
    image = pa.StructArray.from_arrays([pa.array([b"x"]), paths], ["bytes", "path"])
    level = text_of(b"caf\xe9") if column == "level" else pa.array(["a"])
    table = {"image": image, "level": level, "label": level, "episode": [1], "step": [1]}
    pq.write_table(pa.table(table), tmp_path / "x.parquet")
    for kind in (RecordedFramesSource, HuggingFaceSource):
        source = kind(path=str(tmp_path))
        with pytest.raises(SourceError, match="expected to read row group 0 of .*x.parquet, but: .*UTF8"):
            for found in indexed(source, tmp_path):
                read(source, found, tmp_path)


def test_parquet_with_images_as_text(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [{"bytes": "text", "path": ""}]}), tmp_path / "x.parquet")
    with pytest.raises(
        SourceError, match="expected `image` as a struct of bytes and path in .*, found struct<bytes: s"
    ):
        HuggingFaceSource(path=str(tmp_path)).check()


@pytest.mark.parametrize("names", [5, "abc", [1, 2], {"a": 0}])
def test_names_of_labels_that_are_none(tmp_path: Path, names: Any) -> None:
    table = pa.table({"image": [{"bytes": b"x", "path": ""}], "label": [0]})
    facts = {"huggingface": json.dumps({"info": {"features": {"label": {"names": names}}}})}
    pq.write_table(table.replace_schema_metadata(facts), tmp_path / "x.parquet")
    with pytest.raises(SourceError, match="expected a list of names of labels in the metadata of "):
        indexed(HuggingFaceSource(path=str(tmp_path)), tmp_path)


def test_links_to_themselves_and_pipes(tmp_path: Path) -> None:
    """They are rejected with the others' reasons; nobody waits for a pipe."""
    (tmp_path / "ant").mkdir()
    (tmp_path / "ant" / "1.png").symlink_to("1.png")
    (tmp_path / "ant" / "3.png").write_bytes(b"x")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "ant" / "2.png").symlink_to(tmp_path / "pipe")
    source = ClassFoldersSource(path=str(tmp_path))
    (found,) = indexed(source, tmp_path)
    faults = {item.facts["source"]: item.fault for item in read(source, found, tmp_path)}
    assert faults == {
        "ant/1.png": "cannot be read: a link to itself",
        "ant/2.png": "cannot be read: it is no file",
        "ant/3.png": "",
    }
    with pytest.raises(SourceError, match="expected to read .*ant/2.png, but: .*it is no file"):
        open_source(Folder.of(tmp_path), "ant/2.png")


def test_an_archive_with_batches_that_are_none(tmp_path: Path) -> None:
    """Any number of them would be held in memory."""
    data = gzip.compress(tar_of([("data_batch_1.bin", bytes(3073)), ("data_batch_77.bin", bytes(3073))]))
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(data)
    with pytest.raises(SourceError, match="expected data_batch_1.bin to .*, found 'data_batch_77.bin'"):
        indexed(Cifar10Source(path=str(tmp_path)), tmp_path)


def test_archives_without_the_synsets_of_validation(tmp_path: Path) -> None:
    write_imagenet(tmp_path)
    (tmp_path / "val_synsets.txt").unlink()
    with pytest.raises(SourceError, match="expected val_synsets.txt beside the archives at .*how to make it"):
        ImageNetSource(path=str(tmp_path)).check()


def test_an_engine_that_ends_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def walk(*arguments: Any) -> Iterator[np.ndarray]:
        yield np.zeros((4, 4, 3), np.uint8)
        raise RuntimeError("Controlled ViZDoom instance exited unexpectedly.")

    monkeypatch.setattr(vizdoom, "_walk", walk)
    source = ViZDoomSource(maps=("E1M3",), train_episodes_per_map=1, frames_per_episode=3)
    found = indexed(source, tmp_path)[0]
    with pytest.raises(SourceError, match="expected the ViZDoom engine to go on in map E1M3 with seed .*exited unexp"):
        read(source, found, tmp_path)


def test_labels_of_a_type_that_is_none(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [{"bytes": b"", "path": ""}], "label": [0.5]}), tmp_path / "x.parquet")
    with pytest.raises(SourceError, match="expected whole numbers or strings in `label` .* --data.label-column"):
        indexed(HuggingFaceSource(path=str(tmp_path)), tmp_path)


def test_a_label_column_that_is_not_there(tmp_path: Path) -> None:
    """Left out, images have no label where there is none; named, it must be there."""
    pq.write_table(pa.table({"image": [{"bytes": b"", "path": ""}], "fine": [1]}), tmp_path / "x.parquet")
    assert levels(indexed(HuggingFaceSource(path=str(tmp_path)), tmp_path)) == set()
    assert levels(indexed(HuggingFaceSource(path=str(tmp_path), label_column="fine"), tmp_path)) == {"1"}
    with pytest.raises(
        SourceError, match=r"expected the column `fien` \(--data.label-column\) in .*, found image, fine"
    ):
        indexed(HuggingFaceSource(path=str(tmp_path), label_column="fien"), tmp_path)


@pytest.mark.parametrize("cut", [0.02, 0.3, 0.5, 0.7])
def test_a_cut_archive(tmp_path: Path, cut: float) -> None:
    write_imagenet(tmp_path)
    path = tmp_path / "ILSVRC2012_img_train.tar"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * cut)])
    with pytest.raises(SourceError, match="expected a complete tar at ILSVRC2012_img_train.tar"):
        indexed(ImageNetSource(path=str(tmp_path)), tmp_path)


def test_an_archive_cut_between_two_files(tmp_path: Path) -> None:
    write_webdataset(tmp_path, num_tars=1)
    path = tmp_path / "shard-0000.tar"
    with tarfile.open(path) as tar:
        end = tar.getmembers()[3].offset
    path.write_bytes(path.read_bytes()[:end])
    with pytest.raises(SourceError, match="expected a complete tar at shard-0000.tar, it has no end mark after"):
        indexed(WebDatasetSource(path=str(tmp_path)), tmp_path)


def test_an_inner_archive_that_is_cut(tmp_path: Path) -> None:
    write_imagenet(tmp_path)
    inner = tar_of([("n1_1.JPEG", b"x" * 3000), ("n1_2.JPEG", b"y" * 3000)])
    (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(tar_of([("n1.tar", inner[:5000])]))
    with pytest.raises(SourceError, match="expected a complete tar at ILSVRC2012_img_train.tar:n1.tar"):
        indexed(ImageNetSource(path=str(tmp_path)), tmp_path)


@pytest.mark.parametrize("harm", [lambda data: data[:-100], lambda data: b"text", lambda data: data[:200] + data[300:]])
def test_a_damaged_gzip(tmp_path: Path, harm) -> None:
    write_cifar10(tmp_path)
    path = tmp_path / "cifar-10-binary.tar.gz"
    path.write_bytes(harm(path.read_bytes()))
    with pytest.raises(SourceError, match="expected a complete gzipped tar at .*, found: .*; fetch"):
        indexed(Cifar10Source(path=str(tmp_path)), tmp_path / "spool")


@pytest.mark.parametrize("layout", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_names_and_names_that_are_no_text(tmp_path: Path, layout: int) -> None:
    names = ["x" * 300 + ".jpg", b"\xff\xfe.jpg".decode("utf-8", "surrogateescape"), "a/../../b.jpg", "/etc/c.jpg"]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=layout, encoding="utf-8", errors="surrogateescape") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = 3
            tar.addfile(member, io.BytesIO(b"abc"))
    (tmp_path / "x.tar").write_bytes(buffer.getvalue())
    source = WebDatasetSource(path=str(tmp_path))
    (found,) = indexed(source, tmp_path)
    items = read(source, found, tmp_path)
    assert [item.image for item in items] == [b"abc"] * 4
    assert items[1].facts["source"] == "x.tar/\\xff\\xfe"
    json.dumps([item.facts for item in items]).encode()


def test_a_webdataset_key_with_many_images(tmp_path: Path) -> None:
    """frame.0000.jpg, frame.0001.jpg: one key for the library, an image each here. Not the mask beside a picture."""
    files = [(f"frame.{n:04d}.jpg", bytes([n])) for n in range(5)]
    files += [("frame.0003.cls", b"4"), ("z.png", b"z"), ("z.mask.png", b"m"), ("z.cls", b"1")]
    (tmp_path / "x.tar").write_bytes(tar_of(files))
    source = WebDatasetSource(path=str(tmp_path))
    (found,) = indexed(source, tmp_path)
    assert [(entry.name, entry.level) for entry in found.entries] == [
        *((f"frame.{n:04d}", "4" if n == 3 else None) for n in range(5)), ("z", "1"),
    ]  # fmt: skip
    assert [item.image for item in read(source, found, tmp_path)] == [*(bytes([n]) for n in range(5)), b"z"]


def test_a_tar_with_a_damaged_header_or_a_second_tar(tmp_path: Path) -> None:
    good = tar_of([(f"{n}.png", b"x" * 100) for n in range(10)])
    damaged = good[: 3 * 1024] + bytes(512) + good[3 * 1024 + 512 :]
    for data in (damaged, good + good):
        (tmp_path / "x.tar").write_bytes(data)
        with pytest.raises(SourceError, match="expected nothing behind the end mark of x.tar at byte .*, found more"):
            indexed(WebDatasetSource(path=str(tmp_path)), tmp_path)


def test_links_in_a_tar_are_rejected_by_name(tmp_path: Path) -> None:
    write_imagenet(tmp_path)
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w") as tar:
        member = tarfile.TarInfo("n1_1.JPEG")
        member.size = 3
        tar.addfile(member, io.BytesIO(b"abc"))
        for name, kind in (("n1_2.JPEG", tarfile.LNKTYPE), ("n1_3.JPEG", tarfile.SYMTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "n1_1.JPEG"
            tar.addfile(member)
    (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(tar_of([("n1.tar", inner.getvalue())]))
    source = ImageNetSource(path=str(tmp_path))
    items = read(source, indexed(source, tmp_path)[0], tmp_path)
    assert [item.image for item in items] == [b"abc", None, None]
    assert [item.fault.split(":")[0] for item in items] == ["", "no image", "no image"]


def test_a_store_that_fails_rejects_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_class_folders(tmp_path)
    source = ClassFoldersSource(path=str(tmp_path))
    found = indexed(source, tmp_path)[0]
    (tmp_path / "cat" / found.entries[0].name).unlink()
    assert read(source, found, tmp_path)[0].fault.startswith("cannot be read: ")

    def fail(self, offset: int, num_bytes: int) -> bytes:
        raise OSError("SLOW_DOWN")

    monkeypatch.setattr("pipelines.sources.files.SourceFile.read_at", fail)
    with pytest.raises(OSError, match="SLOW_DOWN"):
        read(source, found, tmp_path)


def test_a_stray_file_beside_the_splits(tmp_path: Path) -> None:
    write_class_folders(tmp_path, splits=("train", "val"))
    (tmp_path / "cover.png").write_bytes(b"x")
    found = indexed(ClassFoldersSource(path=str(tmp_path)), tmp_path)
    assert levels(found) == {"cat", "dog"}
    assert (count(found, "validation"), count(found)) == (12, 25)


@pytest.mark.parametrize("evaluation", ["val", "test"])
def test_a_folder_beside_the_splits_that_says_none(tmp_path: Path, evaluation: str) -> None:
    """Taken for classes, `train`, `val` and `extra` would hide the real ones and mix the splits."""
    write_class_folders(tmp_path, splits=("train", evaluation, "extra"))
    with pytest.raises(SourceError, match=r"expected only splits .* found 1 more with images: extra; "):
        ClassFoldersSource(path=str(tmp_path)).parts()


def test_a_train_folder_alone_and_a_class_named_train(tmp_path: Path) -> None:
    write_class_folders(tmp_path / "a", splits=("train",), num_images=30)
    found = indexed(ClassFoldersSource(path=str(tmp_path / "a"), validation_fraction=0.3), tmp_path)
    assert levels(found) == {"cat", "dog"}
    assert 5 < count(found, "validation") < 30
    for name in ("car", "train", "valley"):
        (tmp_path / "b" / name).mkdir(parents=True)
        (tmp_path / "b" / name / "_DSC1.JPG").write_bytes(b"x")
    assert levels(indexed(ClassFoldersSource(path=str(tmp_path / "b")), tmp_path)) == {"car", "train", "valley"}


def test_labels_that_are_hostile(tmp_path: Path) -> None:
    files = [("a.png", b"x"), ("a.json", b"[" * 500_000), ("b.png", b"x"), ("b.json", b'{"label": "\\ud800"}')]
    (tmp_path / "x.tar").write_bytes(tar_of(files))
    (found,) = indexed(WebDatasetSource(path=str(tmp_path)), tmp_path)
    assert [entry.level for entry in found.entries] == [None, "?"]


@pytest.mark.slow
def test_an_episode_is_a_function_of_its_seed(tmp_path: Path) -> None:
    source = ViZDoomSource(maps=("E1M3",), train_episodes_per_map=2, frames_per_episode=12)
    one, other, validation = indexed(source, tmp_path)
    frames = [item.image for item in read(source, one, tmp_path)]
    assert all(np.array_equal(a, b.image) for a, b in zip(frames, read(source, one, tmp_path), strict=True))
    assert not all(np.array_equal(a, b.image) for a, b in zip(frames, read(source, other, tmp_path), strict=True))
    assert {picture.shape for picture in frames} == {(240, 320, 3)}
    assert np.mean([picture.std() for picture in frames]) > 15, "it stares at walls"
    assert len({picture.tobytes() for picture in frames}) == 12, "it stands still"
    assert validation.run.name == "E1M3/000002"
    assert {entry.split for entry in validation.entries} == {"validation"}


@pytest.mark.parametrize("kind", ["class_folders", "imagenet", "webdataset"])
def test_a_disk_is_asked_for_what_is_read_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    WRITERS[kind](tmp_path)
    source = SOURCES[kind](path=str(tmp_path))
    assert isinstance(source, base.ReadsAhead)
    asked: list[bytes] = []
    monkeypatch.setattr(files.os, "posix_fadvise", lambda file, offset, n, _: asked.append(os.pread(file, n, offset)))
    wanted = []
    for found in indexed(source, tmp_path):
        for entry in found.entries:
            source.will_read(found.run, entry)
        wanted += [item.image for item in read(source, found, tmp_path)]
    assert len(wanted) > 3
    assert asked == wanted
    forget_files()
    assert _open_files(tmp_path) == []


def _open_files(folder: Path) -> list[Path]:
    """Of this process, below a folder."""
    return [link for link in Path("/proc/self/fd").iterdir() if _target(link).startswith(str(folder))]


def _target(link: Path) -> str:
    try:
        return str(link.readlink())
    except OSError:
        return ""


def test_what_is_not_there_is_found_by_its_reader_and_not_by_the_hint(tmp_path: Path) -> None:
    write_class_folders(tmp_path)
    source = ClassFoldersSource(path=str(tmp_path))
    found = indexed(source, tmp_path)[0]
    (tmp_path / found.run.locator["folder"] / found.entries[0].name).unlink()
    source.will_read(found.run, found.entries[0])
    assert read(source, found, tmp_path)[0].fault.startswith("cannot be read")


def test_a_file_that_grows_after_the_disk_was_told_of_it(tmp_path: Path) -> None:
    write_class_folders(tmp_path)
    source = ClassFoldersSource(path=str(tmp_path))
    found = indexed(source, tmp_path)[0]
    source.will_read(found.run, found.entries[0])
    with (tmp_path / found.run.locator["folder"] / found.entries[0].name).open("ab") as file:
        file.write(b"more")
    with pytest.raises(SourceError, match="it changed since it was listed"):
        read(source, found, tmp_path)


def test_no_more_than_some_files_are_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_MAX_TOLD", 2)
    write_class_folders(tmp_path)
    source = ClassFoldersSource(path=str(tmp_path))
    found = indexed(source, tmp_path)[0]
    assert len(found.entries) > 3
    for entry in found.entries:
        source.will_read(found.run, entry)
    assert len(_open_files(tmp_path)) == 2
    monkeypatch.delattr(files.os, "posix_fadvise")
    forget_files()
    source.will_read(found.run, found.entries[0])
    assert _open_files(tmp_path) == []
    file = open_source(Folder.of(tmp_path), f"{found.run.locator['folder']}/{found.entries[0].name}")
    assert len(_open_files(tmp_path)) == 1
    file.close()
    assert _open_files(tmp_path) == []
    with pytest.raises(ValueError, match="after it was closed"):
        file.read_at(0, 1)


def test_headers_are_read_as_the_library_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain ones by a shorter way."""
    picture = tarfile.TarInfo("n01/n01_7.JPEG")
    picture.size = 123_456
    longer, odd, large, linked = (tarfile.TarInfo(name) for name in ("a" * 100, "b\udcff.jpg", "c.jpg", "d.jpg"))
    longer.size, odd.size, large.size = 0, 7, 1 << 34
    linked.type, linked.linkname = tarfile.SYMTYPE, "c.jpg"
    ways = [(tarfile.GNU_FORMAT, "utf-8", "surrogateescape"), (tarfile.USTAR_FORMAT, "utf-8", "surrogateescape")]
    blocks = [member.tobuf(*way)[:512] for member in (picture, longer, odd, linked) for way in ways]
    blocks += [large.tobuf(*ways[0]), blocks[0].replace(b"n01/", b"n02/"), b"x" * 512, blocks[0][:511], bytes(512), b""]
    blocks += [blocks[0][:156] + kind + blocks[0][157:] for kind in (b"\0", b"S", b"7")]
    blocks += [
        blocks[0][:124] + size + blocks[0][136:] for size in (b"     361100 ", b"-0000361100\0", b"000000361100")
    ]
    blocks += [blocks[0][:345] + b"folder" + blocks[0][351:]]
    blocks += [_with_checksum(block) for block in blocks if len(block) == 512]
    seen = Counter(_header(tarfile.TarInfo, block) == _header(tars._Header, block) for block in blocks)
    assert seen == {True: len(blocks)}
    owner = _with_checksum(blocks[0][:108] + b"someone\0" + blocks[0][116:])
    assert _header(tarfile.TarInfo, owner)[1] is tarfile.InvalidHeaderError
    monkeypatch.delattr(tarfile.TarInfo, "frombuf")
    assert _header(tars._Header, blocks[0]) == ("n01/n01_7.JPEG", 123_456, tarfile.REGTYPE, "")
    assert _header(tars._Header, owner) == ("n01/n01_7.JPEG", 123_456, tarfile.REGTYPE, "")


def _header(kind: type[tarfile.TarInfo], block: bytes) -> tuple[object, ...]:
    try:
        found = kind.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        return str(error), type(error)
    return found.name, found.size, found.type, found.linkname


def _with_checksum(block: bytes) -> bytes:
    blank = block[:148] + b" " * 8 + block[156:]
    return block[:148] + b"%06o\0 " % sum(blank) + block[156:]
