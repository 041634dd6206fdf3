"""Which image goes to which shard: a pure function of the index's counts and the recipe.

A small source is one *group*: all its images are permuted together. A large one is cut into groups of whole runs, drawn
by the seed, and permuted in each: so neither the driver nor a task ever holds more than one group, and a shard takes
from the runs of one group. The plan itself has a few numbers a run, and none an image or a shard.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pipelines.config import ShardConfig
from vqvae_core.order import permutation

SPLITS = ("train", "validation")


@dataclass(frozen=True)
class PlannedShard:
    """One shard: its name, and the stretch [first, first + count) of its group's permuted images that it holds."""

    name: str
    split: int
    group: int
    first: int
    count: int


@dataclass(frozen=True)
class Plan:
    """runs: int64 (R,), all runs, group after group, in each in the order of the index.

    bounds: int64 (groups + 1,), where each group begins in `runs`. available, taken: int64 (groups, 2), images of each
    split that a group has, and that become samples.
    """

    runs: np.ndarray
    bounds: np.ndarray
    available: np.ndarray
    taken: np.ndarray
    images_per_shard: int
    seed: int

    @property
    def num_groups(self) -> int:
        return len(self.bounds) - 1

    @property
    def num_images(self) -> int:
        return int(self.taken.sum())

    def num_shards(self, split: int) -> int:
        return int(self._shards[-1, split])

    @cached_property
    def _shards(self) -> np.ndarray:
        """int64 (groups + 1, 2): shards of each split before each group."""
        each = -(-self.taken // self.images_per_shard)
        return np.concatenate([np.zeros((1, 2), np.int64), np.cumsum(each, axis=0)])

    def name(self, split: int, number: int) -> str:
        """Names sort as numbers do."""
        digits = max(6, len(str(self.num_shards(split) - 1)))
        return f"{SPLITS[split]}-{number:0{digits}d}"

    def shards(self, group: int, splits: Sequence[int] = (0, 1)) -> Iterator[PlannedShard]:
        """The shards of a group, in order."""
        before = self._shards
        for split in splits:
            digits = max(6, len(str(before[-1, split] - 1)))
            start, stop, taken = int(before[group, split]), int(before[group + 1, split]), int(self.taken[group, split])
            for number in range(start, stop):
                first = (number - start) * self.images_per_shard
                count = min(self.images_per_shard, taken - first)
                yield PlannedShard(f"{SPLITS[split]}-{number:0{digits}d}", split, group, first, count)

    def runs_of(self, group: int) -> np.ndarray:
        return self.runs[self.bounds[group] : self.bounds[group + 1]]

    def order(self, group: int, split: int) -> np.ndarray:
        """int64 (taken,): the group's images of a split, by their number among them, in the order of its shards."""
        images = permutation(int(self.available[group, split]), self.seed, split, group)
        return images[: self.taken[group, split]]


def make_plan(counts: np.ndarray, config: ShardConfig) -> Plan:
    """counts: int64 (R, 2), images of each run in the train and the validation split."""
    totals = counts.sum(axis=1)
    runs = np.arange(len(counts))
    if totals.sum() > config.mix_images:
        runs = permutation(len(counts), config.seed, len(SPLITS))
    num_groups = max(1, -(-int(totals.sum()) // config.mix_images))
    group = (np.cumsum(totals[runs]) - totals[runs]) * num_groups // max(1, int(totals.sum()))
    _, group = np.unique(group, return_inverse=True)
    runs = runs[np.lexsort((runs, group))]
    bounds = np.searchsorted(np.sort(group), np.arange(group.max() + 2 if len(group) else 1))
    available = np.add.reduceat(counts[runs], bounds[:-1], axis=0) if len(runs) else np.zeros((0, 2), np.int64)
    return Plan(runs, bounds, available, _limited(available, config), config.images_per_shard, config.seed)


def _limited(available: np.ndarray, config: ShardConfig) -> np.ndarray:
    """Images taken of each group where the recipe limits their number: the first groups give all they have."""
    taken = available.copy()
    for split, limit in enumerate((config.max_train_images, config.max_validation_images)):
        if limit is not None:
            before = np.cumsum(available[:, split]) - available[:, split]
            taken[:, split] = np.clip(limit - before, 0, available[:, split])
    return taken
