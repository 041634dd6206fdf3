"""Small sources made in memory: recorded frames as Parquet, and archives in the layout of ImageNet."""

import io
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


def write_frames(folder: Path, *, size: int = 16, validation: bool = True, broken: tuple[int, ...] = ()) -> None:
    """train.parquet with 2 levels x 2 episodes x 12 frames in row groups of 10, test.parquet with one episode."""
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "train.parquet", [("cave", 1), ("cave", 2), ("tower", 3), ("tower", 4)], size, broken)
    if validation:
        _write(folder / "test.parquet", [("cave", 5), ("tower", 6)], size, ())


def _write(path: Path, episodes: list[tuple[str, int]], size: int, broken: tuple[int, ...]) -> None:
    rows = []
    for level, episode in episodes:
        for step in range(12):
            data = encode(frame(100 * episode + step, size), "png")
            if len(rows) in broken:
                data = data[:50]
            image = {"bytes": data, "path": f"{level}/{episode}/{step}.png"}
            rows.append({"image": image, "level": level, "episode": episode, "step": step})
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=10)


def write_imagenet(folder: Path, *, num_synsets: int = 3, num_images: int = 4) -> None:
    """The three files of the official layout, with PNG-free JPEG pictures of several sizes."""
    folder.mkdir(parents=True, exist_ok=True)
    outer = []
    for number in range(num_synsets):
        pictures = [
            (f"n{number:08d}_{position}.JPEG", encode(frame(10 * number + position, 24 + 8 * position), "jpg"))
            for position in range(num_images)
        ]
        outer.append((f"n{number:08d}.tar", _tar(pictures)))
    (folder / "ILSVRC2012_img_train.tar").write_bytes(_tar(outer))
    pictures = [
        (f"ILSVRC2012_val_{number + 1:08d}.JPEG", encode(frame(500 + number, 40), "jpg")) for number in range(5)
    ]
    (folder / "ILSVRC2012_img_val.tar").write_bytes(_tar(pictures))
    (folder / "val_synsets.txt").write_text("".join(f"n{number % 2 + 1:08d}\n" for number in range(5)))


def _tar(files: list[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()
