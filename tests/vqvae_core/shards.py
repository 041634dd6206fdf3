"""Small image shards and batches in memory, for tests."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from vqvae_core.artifacts import FileEntry, commit
from vqvae_core.image_shards import ImageShards, Sample, write_tar
from vqvae_core.images import encode
from vqvae_core.order import Order, OrderConfig, lanes_of
from vqvae_core.storage import Folder


def picture(number: int, size: int = 8) -> np.ndarray:
    """Noise (size, size, 3), another for each number."""
    return np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8)


def key_of(number: int) -> str:
    return f"k{number:04d}"


def make_images(folder: Folder, rows: Sequence[int], *, size: int = 8, validation: int = 4) -> ImageShards:
    """An ImageShards artifact with so many pictures in each train shard, numbered through, and more for validation."""
    files, number = [], 0
    names = [f"train-{shard:06d}.tar" for shard in range(len(rows))] + ["validation-000000.tar"]
    for name, count in zip(names, [*rows, validation], strict=True):
        samples = [
            Sample(key=key_of(n), image_format="png", data=encode(picture(n, size), "png"), facts={"label": n % 2})
            for n in range(number, number + count)
        ]
        data = write_tar(samples)
        folder.write(name, data)
        files.append(FileEntry.of(name, data, rows=count))
        number += count
    splits = {"train": {"shards": len(rows), "images": sum(rows)}, "validation": {"shards": 1, "images": validation}}
    facts = {"size": size, "label_map": {"a": 0, "b": 1}, "splits": splits}
    return ImageShards(commit(
        folder, kind="ImageShards", stage="s", stage_version=1, fingerprint="f", recipe={}, inputs={}, files=files,
        facts=facts, provenance={},
    ))  # fmt: skip


class InMemory:
    """The batches of one rank out of tensors: what a loader gives, without files."""

    def __init__(
        self, parts: Sequence[torch.Tensor], rows: Sequence[int], config: OrderConfig, *, rank: int = 0,
        world_size: int = 1,
    ) -> None:  # fmt: skip
        """parts: tensors with one sample a row, such as pixels, or tokens and labels. rows: of each shard."""
        self._parts, self._starts = parts, np.cumsum([0, *rows])
        self.order = Order([(str(number), count) for number, count in enumerate(rows)], config)
        self.lanes = lanes_of(rank, world_size, config)

    def batches(self, start: int, stop: int) -> Iterator:
        for step in range(start, stop):
            places = self.order.batch(step, self.lanes)
            chosen = torch.from_numpy(self._starts[places.files] + places.rows)
            found = tuple(part[chosen] for part in self._parts)
            yield found if len(found) > 1 else found[0]
