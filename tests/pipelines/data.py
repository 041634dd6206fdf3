"""Small sources of every kind that is read from files. `broken` are the numbers of images, in the order in which they
are written, that cannot be decoded (whose label is out of range in CIFAR-10). Writers return how many there are."""

import gzip
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vqvae_core.images import encode


def frame(seed: int, size: int = 16) -> np.ndarray:
    """A picture that is a function of its seed alone."""
    y, x = np.mgrid[0:size, 0:size]
    planes = [(x * (seed % 7 + 1) + y * (seed % 5 + 1) + 37 * seed + 60 * channel) % 256 for channel in range(3)]
    return np.stack(planes, axis=-1).astype(np.uint8)


class _Count:
    """Numbers images, and cuts the bytes of those that are to be broken."""

    def __init__(self, broken: tuple[int, ...]) -> None:
        self.number = 0
        self._broken = broken

    def is_broken(self) -> bool:
        self.number += 1
        return self.number - 1 in self._broken

    def cut(self, data: bytes) -> bytes:
        return data[:50] if self.is_broken() else data


def write_frames(folder: Path, *, size: int = 16, validation: bool = True, broken: tuple[int, ...] = ()) -> int:
    """train.parquet with 2 levels x 2 episodes x 12 frames in row groups of 10, test.parquet with one episode."""
    folder.mkdir(parents=True, exist_ok=True)
    count = _Count(broken)
    _write(folder / "train.parquet", [("cave", 1), ("cave", 2), ("tower", 3), ("tower", 4)], size, count)
    if validation:
        _write(folder / "test.parquet", [("cave", 5), ("tower", 6)], size, count)
    return count.number


def _write(path: Path, episodes: list[tuple[str, int]], size: int, count: _Count) -> None:
    rows = []
    for level, episode in episodes:
        for step in range(12):
            data = count.cut(encode(frame(100 * episode + step, size), "png"))
            image = {"bytes": data, "path": f"{level}/{episode}/{step}.png"}
            rows.append({"image": image, "level": level, "episode": episode, "step": step})
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=10)


def write_imagenet(folder: Path, *, num_synsets: int = 3, num_images: int = 4, broken: tuple[int, ...] = ()) -> int:
    """The three files of the official layout, with PNG-free JPEG pictures of several sizes."""
    folder.mkdir(parents=True, exist_ok=True)
    outer = []
    count = _Count(broken)
    for number in range(num_synsets):
        pictures = [
            (
                f"n{number:08d}_{position}.JPEG",
                count.cut(encode(frame(10 * number + position, 24 + 8 * position), "jpg")),
            )
            for position in range(num_images)
        ]
        outer.append((f"n{number:08d}.tar", tar_of(pictures)))
    (folder / "ILSVRC2012_img_train.tar").write_bytes(tar_of(outer))
    pictures = [
        (f"ILSVRC2012_val_{number + 1:08d}.JPEG", count.cut(encode(frame(500 + number, 40), "jpg")))
        for number in range(5)
    ]
    (folder / "ILSVRC2012_img_val.tar").write_bytes(tar_of(pictures))
    (folder / "val_synsets.txt").write_text("".join(f"n{number % 2 + 1:08d}\n" for number in range(5)))
    return count.number


def tar_of(files: list[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def write_class_folders(
    folder: Path, *, splits: tuple[str, ...] = ("",), num_images: int = 6, broken: tuple[int, ...] = ()
) -> int:
    """Classes cat and dog, a PNG an image, under each of some folders."""
    count = _Count(broken)
    for number, split in enumerate(splits):
        for label, name in enumerate(("cat", "dog")):
            place = folder / split / name
            place.mkdir(parents=True, exist_ok=True)
            for position in range(num_images):
                data = count.cut(encode(frame(1000 * number + 100 * label + position, 20 + 4 * position), "png"))
                (place / f"{split}{name}_{position}.png").write_bytes(data)
    return count.number


def write_huggingface(folder: Path, *, names: bool = True, num_rows: int = 14, broken: tuple[int, ...] = ()) -> int:
    """train-*.parquet (2 files) and validation-*.parquet with `image` and `label`, in row groups of 5."""
    folder.mkdir(parents=True, exist_ok=True)
    count = _Count(broken)
    features = {"info": {"features": {"label": {"names": ["ant", "bee", "cow"], "_type": "ClassLabel"}}}}
    for file, name in enumerate(("train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001")):
        rows = [
            {
                "image": {"bytes": count.cut(encode(frame(50 * file + row, 24), "png")), "path": f"{row}.png"},
                "label": row % 3,
            }
            for row in range(num_rows)
        ]
        table = pa.Table.from_pylist(rows)
        if names:
            table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
        pq.write_table(table, folder / f"{name}.parquet", row_group_size=5)
    return count.number


def write_cifar10(
    folder: Path, *, num_records: int = 9, labels: tuple[int, ...] = tuple(range(10)), broken: tuple[int, ...] = ()
) -> int:
    """cifar-10-binary.tar.gz with six batches of some records."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    count = _Count(broken)
    for batch, name in enumerate([*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]):
        records = [
            bytes([200 if count.is_broken() else labels[(batch + row) % len(labels)]])
            + frame(40 * batch + row, 32).transpose(2, 0, 1).tobytes()
            for row in range(num_records)
        ]
        files.append((f"cifar-10-batches-bin/{name}.bin", b"".join(records)))
    files.append(("cifar-10-batches-bin/batches.meta.txt", b"airplane\n"))
    (folder / "cifar-10-binary.tar.gz").write_bytes(gzip.compress(tar_of(files), mtime=0))
    return count.number


def write_webdataset(folder: Path, *, num_tars: int = 3, num_samples: int = 8, broken: tuple[int, ...] = ()) -> int:
    """Tars with jpg + cls, and a member that must not be looked at."""
    count = _Count(broken)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(num_tars):
        files = []
        for row in range(num_samples):
            key = f"{number * 100 + row:06d}"
            files.append((f"{key}.jpg", count.cut(encode(frame(70 * number + row, 28), "jpg"))))
            files.append((f"{key}.cls", str(row % 4).encode()))
            files.append((f"{key}.pyd", b"cos\nsystem\n(S'touch executed'\ntR."))
        (folder / f"shard-{number:04d}.tar").write_bytes(tar_of(files))
    return count.number


WRITERS = {
    "recorded_frames": write_frames,
    "imagenet": write_imagenet,
    "class_folders": write_class_folders,
    "huggingface": write_huggingface,
    "cifar10": write_cifar10,
    "webdataset": write_webdataset,
}
