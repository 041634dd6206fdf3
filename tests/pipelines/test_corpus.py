"""Bad input: each ends in the counted quarantine or in a clear error, and good neighbours are never lost."""

import dataclasses
import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.session import Session
from pipelines import index, verify
from pipelines import shard as shard_stage
from pipelines.config import Resources, ShardConfig
from pipelines.data_report import Origin
from pipelines.shard import RejectedError, shard
from pipelines.sources import SOURCES
from pipelines.stage import Pipeline
from pipelines.tracking import Tracker
from tests.pipelines.corpus import FILE_NAMES, KEPT, TAR_NAMES, corpus
from tests.pipelines.data import frame, tar_of, write_cifar10, write_imagenet
from vqvae_core.image_shards import KEY_PATTERN, ImageShards, Sample
from vqvae_core.images import encode
from vqvae_core.storage import Folder

GOOD = encode(frame(77, 40), "png")
CONFIG = ShardConfig(image_size=32, images_per_shard=8, max_rejected_fraction=0.9)


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks run in this process."""

    def fan_out(session, task, jobs):
        return (task(json.loads(json.dumps(job))) | {"begin": 0.0, "end": 0.0} for job in jobs)

    for module in (index, shard_stage, verify):
        monkeypatch.setattr(module, "fan_out", fan_out)
    monkeypatch.setattr(Session, "check", lambda self, **_: 1)


def make(root: Path, kind: str, place: Path, config: ShardConfig = CONFIG, **options) -> ImageShards:
    folder = Folder.of(root)
    pipeline = Pipeline(folder, Resources(), Session(), Tracker(folder, "t", {}, "", enabled=False))
    return shard(pipeline, SOURCES[kind](path=str(place), **options), config)


def samples(images: ImageShards) -> list[Sample]:
    return [s for split in ("train", "validation") for path in images.shards(split) for s in images.read(path)]


def rejects(images: ImageShards) -> list[dict[str, str]]:
    return pq.read_table(images.artifact.folder.path("rejects.parquet")).to_pylist()


def write(kind: str, place: Path, files: dict[str, bytes]) -> None:
    """Files in a container of some kind, all of one class, and a validation image."""
    place.mkdir()
    if kind == "class_folders":
        (place / "train" / "a").mkdir(parents=True)
        (place / "val" / "a").mkdir(parents=True)
        for name, data in files.items():
            (place / "train" / "a" / name).write_bytes(data)
        (place / "val" / "a" / "v.png").write_bytes(GOOD)
    elif kind == "imagenet":
        write_imagenet(place)
        inner = named_tar(files)
        (place / "ILSVRC2012_img_train.tar").write_bytes(named_tar({"n00000001.tar": inner}))
    else:
        labelled = {}
        for name, data in files.items():
            folder, slash, file = name.rpartition("/")
            labelled[name] = data
            labelled[f"{folder}{slash}{file.split('.')[0]}.cls"] = b"0"
        (place / "train.tar").write_bytes(named_tar(labelled))
        (place / "val.tar").write_bytes(named_tar({"v.png": GOOD, "v.cls": b"0"}))


def named_tar(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", encoding="utf-8", errors="surrogateescape") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["class_folders", "imagenet", "webdataset"])
def test_odd_files(tmp_path: Path, kind: str) -> None:
    files = corpus(tmp_path / "executed")
    write(kind, tmp_path / "source", {name: data for name, (data, _) in files.items()})
    images = make(tmp_path / "root", kind, tmp_path / "source")
    by_source = {sample.facts["source"].rpartition("/")[2]: sample for sample in samples(images)}

    def shown(name: str) -> str:
        return name.rpartition(".")[0] if kind == "webdataset" else name

    for name, (_, fate) in files.items():
        assert (shown(name) in by_source) == (fate == KEPT), name
    expected = Counter(fate for _, fate in files.values() if fate != KEPT)
    assert images.artifact.facts["rejects"] == dict(expected)
    for reject in rejects(images):
        assert reject["reason"].split(":")[0] in expected
        assert len(reject["sha256"]) == 64
    assert not (tmp_path / "executed").exists()
    assert verify.verify(Session(), images.artifact) == []
    rotated = by_source[shown("rotated.jpg")].pixels().astype(int)
    upright = np.rot90(frame(3, 64)[:32], -1)[16:48].astype(int)
    assert abs(rotated - upright).mean() < 12, "EXIF orientation was not applied"
    sixteen = by_source[shown("sixteen_bit.png")].pixels()
    assert 20 < sixteen.mean() < 235, "16 bits were clipped"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["class_folders", "imagenet", "webdataset"])
def test_odd_names(tmp_path: Path, kind: str) -> None:
    names = [name() for name in (FILE_NAMES if kind == "class_folders" else TAR_NAMES).values()]
    outside = [tmp_path.parent, Path("/tmp"), Path("/etc")]
    before = [{path.name for path in place.iterdir()} for place in outside]
    write(kind, tmp_path / "source", dict.fromkeys(names, GOOD))
    images = make(tmp_path / "root", kind, tmp_path / "source")
    assert images.num_images("train") == len(names)
    keys = [sample.key for sample in samples(images)]
    assert len(set(keys)) == len(keys)
    assert all(KEY_PATTERN.fullmatch(key) for key in keys)
    for sample in samples(images):
        sample.facts["source"].encode()  # valid text
        assert str(tmp_path) not in json.dumps(sample.facts)
    assert verify.verify(Session(), images.artifact) == []
    assert {path.name for path in tmp_path.iterdir()} == {"source", "root"}
    for place, names in zip(outside, before, strict=True):
        assert not any("evil" in path.name for path in place.iterdir() if path.name not in names)
    written = {path.suffix for path in (tmp_path / "root").rglob("*") if path.is_file()}
    assert written == {".tar", ".json", ".parquet", ".png"}, "a name of the source became a file"
    assert [path.name for path in (tmp_path / "root").rglob("*.png")] == ["contact_sheet.png"]


@pytest.mark.slow
def test_keys_that_come_again_are_told_apart(tmp_path: Path) -> None:
    """In one tar, in two tars, and as two names that are the same without their odd characters."""
    (tmp_path / "s").mkdir()
    twice = io.BytesIO()
    with tarfile.open(fileobj=twice, mode="w") as tar:
        for name, data in [("k.png", GOOD), ("k.cls", b"0"), ("k.png", GOOD), ("k.cls", b"1"), ("a b.png", GOOD),
                           ("a b.cls", b"0"), ("a_b.png", GOOD), ("a_b.cls", b"0")]:  # fmt: skip
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    (tmp_path / "s" / "train.tar").write_bytes(twice.getvalue())
    (tmp_path / "s" / "val.tar").write_bytes(tar_of([("k.png", GOOD), ("k.cls", b"1")]))
    images = make(tmp_path / "root", "webdataset", tmp_path / "s")
    keys = [sample.key for sample in samples(images)]
    assert len(keys) == len(set(keys)) == 5
    assert {"k", "a_b"} < set(keys)
    assert sum(key.startswith("k-") for key in keys) == 2
    again = make(tmp_path / "again", "webdataset", tmp_path / "s")
    assert again.artifact.files == images.artifact.files
    assert images.artifact.facts["exact_duplicates"] == 4


def test_payloads_in_a_webdataset_do_not_run(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    marker = tmp_path / "executed"
    payload = f"cos\nsystem\n(S'touch {marker}'\ntR.".encode()
    for split in ("train", "val"):
        members = [(f"k.{extension}", payload) for extension in ("pyd", "pickle", "pkl", "pth", "pt", "npy")]
        (tmp_path / "s" / f"{split}.tar").write_bytes(
            tar_of([*members, ("k.png", GOOD), ("k.cls", b"0"), ("only.pyd", payload), ("only.cls", b"0")])
        )
    images = make(tmp_path / "root", "webdataset", tmp_path / "s")
    assert len(samples(images)) == 2
    assert images.artifact.facts["rejects"] == {"no image": 2}
    others = {".pyd": 4, ".pickle": 2, ".pkl": 2, ".pth": 2, ".pt": 2, ".npy": 2}
    assert images.artifact.facts["ignored"] == others
    assert not marker.exists()


def test_payloads_in_archives_do_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    payload = f"cos\nsystem\n(S'touch {marker}'\ntR.".encode()
    write("imagenet", tmp_path / "s", {"a.pyd": payload, "b.pickle": payload, "c.pth": payload, "d.JPEG": GOOD})
    images = make(tmp_path / "root", "imagenet", tmp_path / "s")
    assert images.num_images("train") == 1
    assert images.artifact.facts["rejects"] == {"cannot be decoded": 3}
    assert not marker.exists()


def test_cells_that_are_empty_and_labels_out_of_range(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    names = {"info": {"features": {"label": {"names": ["x", "y"]}}}}
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    for split in ("train", "validation"):
        values = [{"bytes": GOOD, "path": "/somewhere/a.png"}] * 5 + [None, {"bytes": None, "path": "b.png"}]
        table = pa.table({"image": pa.array(values, image), "label": [0, 1, 2, -1, None, 0, 1]})
        table = table.replace_schema_metadata({"huggingface": json.dumps(names)})
        pq.write_table(table, tmp_path / "s" / f"{split}.parquet")
    images = make(tmp_path / "root", "huggingface", tmp_path / "s")
    assert images.label_map == {"x": 0, "y": 1}
    assert sorted(sample.label for sample in samples(images)) == [0, 0, 1, 1]
    assert images.artifact.facts["rejects"] == {"label out of range": 4, "no bytes": 4, "no label": 2}
    assert {sample.facts["path"] for sample in samples(images)} == {"a.png"}


def test_records_with_labels_out_of_range(tmp_path: Path) -> None:
    write_cifar10(tmp_path / "s", labels=(3, 10, 255))
    images = make(tmp_path / "root", "cifar10", tmp_path / "s")
    assert images.artifact.facts["rejects"] == {"label out of range": 36}
    assert {sample.label for sample in samples(images)} == {3}


def test_an_image_without_label_among_labelled_ones(tmp_path: Path) -> None:
    write("class_folders", tmp_path / "s", {"x.png": GOOD})
    (tmp_path / "s" / "train" / "stray.png").write_bytes(GOOD)
    images = make(tmp_path / "root", "class_folders", tmp_path / "s")
    assert images.artifact.facts["rejects"] == {"no label": 1}


def test_an_odd_label_among_numbers(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    for split in ("train", "val"):
        files = [(f"{n}.{kind}", data) for n in range(20) for kind, data in (("png", GOOD), ("cls", str(n).encode()))]
        files += [("x.png", GOOD), ("x.cls", b"cat")] if split == "train" else []
        (tmp_path / "s" / f"{split}.tar").write_bytes(tar_of(files))
    images = make(tmp_path / "root", "webdataset", tmp_path / "s")
    assert images.artifact.facts["rejects"] == {"label out of range": 1}
    assert {sample.label for sample in samples(images)} == set(range(20))


def test_shards_made_under_a_wider_limit_are_not_passed_on_silently(tmp_path: Path) -> None:
    write("class_folders", tmp_path / "s", {"a.png": GOOD, "b.png": b"broken"})
    images = make(tmp_path / "root", "class_folders", tmp_path / "s")
    strict = dataclasses.replace(CONFIG, max_rejected_fraction=0.1)
    with pytest.raises(RejectedError, match="at most 0 rejected images of 3 .* found 1 in .*made with a wider limit"):
        make(tmp_path / "root", "class_folders", tmp_path / "s", strict)
    again = make(tmp_path / "root", "class_folders", tmp_path / "s")
    assert again.artifact.manifest == images.artifact.manifest


def test_the_first_ten_rejects_are_shown(tmp_path: Path) -> None:
    write("class_folders", tmp_path / "s", {f"{number:02d}.png": b"broken" for number in range(30)})
    config = dataclasses.replace(CONFIG, images_per_shard=64, max_rejected_fraction=0.1)
    with pytest.raises(RejectedError, match="at most 3 rejected images of 31 .*, found 30 so far: ") as error:
        make(tmp_path / "root", "class_folders", tmp_path / "s", config)
    shown = [place for place in (f"train/a/{number:02d}.png" for number in range(30)) if place in str(error.value)]
    assert shown == [f"train/a/{number:02d}.png" for number in range(10)]
    assert not list((tmp_path / "root").glob("shard-*/manifest.json"))


def test_images_without_any_label(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    for number in range(30):
        (tmp_path / "s" / f"{number}.png").write_bytes(encode(frame(number, 40), "png"))
    images = make(tmp_path / "root", "class_folders", tmp_path / "s", validation_fraction=0.3)
    assert images.label_map is None
    assert len(samples(images)) == 30
    assert {sample.label for sample in samples(images)} == {None}


def test_exact_duplicates_are_counted_and_kept(tmp_path: Path) -> None:
    write("class_folders", tmp_path / "s", {f"{number}.png": GOOD for number in range(3)})
    images = make(tmp_path / "root", "class_folders", tmp_path / "s")
    assert images.artifact.facts["exact_duplicates"] == 3
    assert len(samples(images)) == 4


def test_the_data_report_counts(tmp_path: Path) -> None:
    pictures = {f"{n}.png": encode(frame(n, side), "png") for n, side in enumerate((20, 33, 40, 70, 300))}
    write("class_folders", tmp_path / "s", pictures | {"x.png": b"none"})
    images = make(tmp_path / "root", "class_folders", tmp_path / "s")
    report = json.loads(images.artifact.read("data.json"))
    assert report["shorter_side"]["below 32"] == report["enlarged"] == 1
    assert report["shorter_side"]["32 to 63"] == 3
    assert report["shorter_side"]["256 to 511"] == 1
    assert (report["width"], report["height"]) == ([20, 300], [20, 300])
    assert report["kinds"] == {"PNG RGB": 6}
    assert report["levels"] == {"a": {"train": 5, "validation": 1}}
    assert report["rejects"] == {"cannot be decoded": 1}
    pixels = np.concatenate([s.pixels().reshape(-1, 3) for path in images.shards("train") for s in images.read(path)])
    assert report["mean"] == pytest.approx(pixels.mean(axis=0), rel=1e-12)
    assert report["deviation"] == pytest.approx(pixels.std(axis=0), rel=1e-12)
    assert images.artifact.read("contact_sheet.png").startswith(b"\x89PNG")


@pytest.mark.parametrize("height", [1, 2, 257, 258, 259, 517])
def test_the_sums_of_bright_and_tall_images_are_exact(height: int) -> None:
    random = np.random.default_rng(height).integers(0, 256, (height, 128, 3), dtype=np.uint8)
    for pixels in (random, np.full((height, 128, 3), 255, np.uint8), np.full((height, 1, 3), 255, np.uint8)):
        origin = Origin.of(128, height, "PNG RGB", b"", pixels)
        wide = pixels.astype(np.int64)
        assert origin.sums == wide.sum(axis=(0, 1)).tolist()
        assert origin.squares == (wide**2).sum(axis=(0, 1)).tolist()
