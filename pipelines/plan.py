"""Which image goes to which shard: a pure function of the index's counts and the recipe.

A small source is one *group*: all its images are permuted together. A large one is cut into groups of whole runs, drawn
by the seed, and permuted in each: so neither the driver nor a task ever holds more than one group, and a shard takes
from the runs of one group. The plan itself has a few numbers a run, and none an image or a shard.

A source has train images and may have held-out ones, which are the splits train and validation. Where the recipe holds
train images back, these are the validation split, and the source's own held-out images are a third one, test.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pipelines.config import ShardConfig
from vqvae_core.errors import InputError
from vqvae_core.order import permutation

SPLITS = ("train", "validation", "test")
_RUNS = 2  # where a permutation of images has the source's split: the seed of the one of runs


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

    bounds: int64 (groups + 1,), where each group begins in `runs`. origins: of each split, the source's split that its
    images are of, 0 (train) or 1 (held out). available, taken: int64 (groups, splits), images of each split that a
    group has, and that become samples.
    """

    runs: np.ndarray
    bounds: np.ndarray
    origins: tuple[int, ...]
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
        """int64 (groups + 1, splits): shards of each split before each group."""
        each = -(-self.taken // self.images_per_shard)
        return np.concatenate([np.zeros((1, len(self.origins)), np.int64), np.cumsum(each, axis=0)])

    def name(self, split: int, number: int) -> str:
        """Names sort as numbers do."""
        digits = max(6, len(str(self.num_shards(split) - 1)))
        return f"{SPLITS[split]}-{number:0{digits}d}"

    def shards(self, group: int) -> Iterator[PlannedShard]:
        """The shards of a group, in order."""
        before = self._shards
        for split in range(len(self.origins)):
            digits = max(6, len(str(before[-1, split] - 1)))
            start, stop, taken = int(before[group, split]), int(before[group + 1, split]), int(self.taken[group, split])
            for number in range(start, stop):
                first = (number - start) * self.images_per_shard
                count = min(self.images_per_shard, taken - first)
                yield PlannedShard(f"{SPLITS[split]}-{number:0{digits}d}", split, group, first, count)

    def runs_of(self, group: int) -> np.ndarray:
        return self.runs[self.bounds[group] : self.bounds[group + 1]]

    def order(self, group: int, split: int) -> np.ndarray:
        """int64 (taken,): the group's images of a split, in the order of its shards, by their number among the group's
        images of the split's origin."""
        origin = self.origins[split]
        of_origin = [number for number, other in enumerate(self.origins) if other == origin]
        images = permutation(int(self.available[group, of_origin].sum()), self.seed, origin, group)
        # Splits of one origin follow each other, so that train is the same stretch with and without a holdout.
        first = int(self.available[group, of_origin[: of_origin.index(split)]].sum())
        return images[first : first + int(self.taken[group, split])]


def make_plan(counts: np.ndarray, config: ShardConfig) -> Plan:
    """counts: int64 (R, 2), train and held-out images of each run. Raises `InputError` where the recipe holds all train
    images back."""
    totals = counts.sum(axis=1)
    runs = np.arange(len(counts))
    if totals.sum() > config.mix_images:
        runs = permutation(len(counts), config.seed, _RUNS)
    num_groups = max(1, -(-int(totals.sum()) // config.mix_images))
    group = (np.cumsum(totals[runs]) - totals[runs]) * num_groups // max(1, int(totals.sum()))
    _, group = np.unique(group, return_inverse=True)
    runs = runs[np.lexsort((runs, group))]
    bounds = np.searchsorted(np.sort(group), np.arange(group.max() + 2 if len(group) else 1))
    available = np.add.reduceat(counts[runs], bounds[:-1], axis=0) if len(runs) else np.zeros((0, 2), np.int64)
    origins = (0, 1)
    if config.holdout_images:
        origins, available = (0, 0, 1), _held_back(available, config.holdout_images)
    return Plan(runs, bounds, origins, available, _limited(available, config), config.images_per_shard, config.seed)


def _held_back(available: np.ndarray, holdout_images: int) -> np.ndarray:
    """int64 (groups, 3), train, held-back and held-out images of each group, out of its train and held-out ones: each
    group holds back in proportion to its train images, all together exactly `holdout_images`."""
    train, held_out = available.T
    total = int(train.sum())
    if 0 < total <= holdout_images:
        raise InputError(
            f"expected fewer images to hold back than the source's {total} train images, found {holdout_images}; "
            "lower --shard.holdout-images"
        )
    # Python's integers: the products may have more than 64 bits.
    ends = [end * holdout_images // max(1, total) for end in np.cumsum(train).tolist()]
    held_back = np.diff(np.array(ends, np.int64), prepend=0)
    return np.stack([train - held_back, held_back, held_out], axis=1)


def _limited(available: np.ndarray, config: ShardConfig) -> np.ndarray:
    """Images taken of each group where the recipe limits their number: the first groups give all they have."""
    taken = available.copy()
    limits = (config.max_train_images, config.max_validation_images, config.max_test_images)
    for split, limit in enumerate(limits[: available.shape[1]]):
        if limit is not None:
            before = np.cumsum(available[:, split]) - available[:, split]
            taken[:, split] = np.clip(limit - before, 0, available[:, split])
    return taken
