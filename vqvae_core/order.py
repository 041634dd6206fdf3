"""The order of training samples: a pure function of (seed, files, epoch), the same for any number of ranks.

An epoch is the seeded sequence of all shards, cut by sample count into L equal lanes. Each lane is shuffled in
consecutive windows. Global batch g takes B/L samples from each lane; ranks own lanes. The N mod B samples at the end of
the sequence are left out, others each epoch: where there is a single shard it begins at another of its samples each
epoch, and goes round. The position is the step, one integer: nothing before it is read.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from vqvae_core.errors import InputError

_MASK = (1 << 64) - 1


@dataclass(frozen=True, kw_only=True)
class OrderConfig:
    """How training samples are ordered and batched. All of it belongs to the recipe."""

    batch_size: int = 128
    """Samples in a global batch, over all workers."""
    num_lanes: int = 8
    """Parts that the epoch is cut into; it divides the batch size, and the number of workers divides it."""
    shuffle_window: int = 1024
    """Samples of a lane that are shuffled among each other."""
    seed: int = 0
    """Seed of the order."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "num_lanes", "shuffle_window"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, was {getattr(self, name)}")
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or more, was {self.seed}")
        if self.batch_size % self.num_lanes:
            raise ValueError(
                f"num_lanes must divide batch_size {self.batch_size}, was {self.num_lanes}; "
                f"the largest that does is {max(n for n in range(1, self.num_lanes) if self.batch_size % n == 0)}"
            )


def mix(*numbers: int) -> int:
    """A 64-bit seed from integers (SplitMix64, Steele et al. 2014): stable across versions and machines."""
    state = 0x9E3779B97F4A7C15
    for number in numbers:
        state = (state + (number & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def permutation(count: int, *seed: int) -> np.ndarray:
    """A permutation of 0 to count - 1 (int64) that depends on the seed alone, not on numpy's generators."""
    with np.errstate(over="ignore"):
        state = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(mix(*seed))
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state ^= state >> np.uint64(31)
    return np.argsort(state, kind="stable")


def lanes_of(rank: int, world_size: int, config: OrderConfig) -> range:
    """The lanes that a rank owns. Raises `InputError` where the ranks cannot share them evenly."""
    if config.num_lanes % world_size:
        raise InputError(
            f"expected a number of workers that divides num_lanes {config.num_lanes}, found {world_size}; "
            "change either of them (num_lanes belongs to the recipe)"
        )
    share = config.num_lanes // world_size
    return range(rank * share, (rank + 1) * share)


@dataclass(frozen=True)
class Places:
    """Where samples lie: for each of them the number of its file and its row there, two int64 arrays (N,)."""

    files: np.ndarray
    rows: np.ndarray


class Order:
    """Which sample stands where. files: (path, number of samples) of each shard, in the manifest's order."""

    def __init__(self, files: Sequence[tuple[str, int]], config: OrderConfig) -> None:
        self.files, self.config = list(files), config
        self._rows = np.array([rows for _, rows in files], np.int64)
        self.num_samples = int(self._rows.sum())
        self.steps_per_epoch = self.num_samples // config.batch_size
        if not self.steps_per_epoch:
            raise InputError(
                f"expected at least one batch of {config.batch_size} samples, the data has {self.num_samples}; "
                "lower the batch size or shard more images"
            )
        self.left_out = self.num_samples - self.steps_per_epoch * config.batch_size
        self.lane_samples = self.steps_per_epoch * config.batch_size // config.num_lanes
        self._sequences: OrderedDict[int, tuple[np.ndarray, np.ndarray, int]] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int, int], Places] = OrderedDict()
        self._stacked: OrderedDict[tuple[int, range, int], np.ndarray] = OrderedDict()

    def batch(self, step: int, lanes: range) -> Places:
        """The samples that these lanes give to global batch `step`, lane by lane."""
        return self.stretch(range(step, step + 1), lanes)

    def stretch(self, steps: range, lanes: range) -> Places:
        """The samples of steps of one epoch, batch by batch."""
        epoch, first = divmod(steps.start, self.steps_per_epoch)
        share, size = self.config.batch_size // self.config.num_lanes, self.config.shuffle_window
        start, stop, parts = first * share, (first + len(steps)) * share, []
        while start < stop:  # cut where windows end
            number = start // size
            last = min(stop, (number + 1) * size)
            parts.append(self._together(epoch, lanes, number)[:, :, start - number * size : last - number * size])
            start = last
        places = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=2)
        files, rows = places.reshape(2, len(lanes), len(steps), share).swapaxes(1, 2).reshape(2, -1)
        return Places(files, rows)

    def window_of(self, step: int) -> tuple[int, int]:
        """The epoch and the number of the window in which a step begins."""
        epoch, index = divmod(step, self.steps_per_epoch)
        return epoch, index * (self.config.batch_size // self.config.num_lanes) // self.config.shuffle_window

    def stretches(self, start: int, stop: int, longest: int) -> Iterator[range]:
        """Steps start to stop - 1 in stretches that begin in one window of one epoch, and are no longer than that."""
        while start < stop:
            end = start + 1
            while end < min(stop, start + longest) and self.window_of(end) == self.window_of(start):
                end += 1
            yield range(start, end)
            start = end

    def _together(self, epoch: int, lanes: range, number: int) -> np.ndarray:
        """A window of some lanes, (2, lanes, samples): files and rows."""
        key = (epoch, lanes, number)
        if key not in self._stacked:
            windows = [self.window(epoch, lane, number) for lane in lanes]
            parts = [one.files for one in windows] + [one.rows for one in windows]
            self._stacked[key] = np.stack(parts).reshape(2, len(lanes), -1)
            while len(self._stacked) > 2:
                self._stacked.popitem(last=False)
        return self._stacked[key]

    def window(self, epoch: int, lane: int, number: int) -> Places:
        """A whole window of a lane, shuffled. Past the lane's last window: its first of the next epoch."""
        start = number * self.config.shuffle_window
        if start >= self.lane_samples:
            return self.window(epoch + 1, lane, 0)
        key = (epoch, lane, start)
        if key not in self._windows:
            self._windows[key] = self._shuffled(epoch, lane, start)
            while len(self._windows) > 3 * self.config.num_lanes:
                self._windows.popitem(last=False)
        self._windows.move_to_end(key)
        return self._windows[key]

    def _shuffled(self, epoch: int, lane: int, start: int) -> Places:
        length = min(self.config.shuffle_window, self.lane_samples - start)
        places = lane * self.lane_samples + start + permutation(length, self.config.seed, epoch, lane, start)
        sequence, before, first = self._sequence(epoch)
        places = (places + first) % self.num_samples
        shards = np.searchsorted(before, places, side="right") - 1
        return Places(sequence[shards], places - before[shards])

    def _sequence(self, epoch: int) -> tuple[np.ndarray, np.ndarray, int]:
        """The epoch's sequence of shards, the number of samples before each of them, and where it begins."""
        if epoch not in self._sequences:
            sequence = permutation(len(self.files), self.config.seed, epoch)
            rows = self._rows[sequence]
            first = mix(self.config.seed, epoch, 1) % self.num_samples if len(rows) == 1 else 0
            self._sequences[epoch] = sequence, np.concatenate([[0], np.cumsum(rows)]), first
            while len(self._sequences) > 2:
                self._sequences.popitem(last=False)
        return self._sequences[epoch]

    def near(self, step: int, lanes: range) -> list[int]:
        """The files that these lanes read in the window where this step begins and the next, and in as many more as a
        step that begins there may reach into, in order of need: what is worth having open. Nothing before the step is
        in it."""
        epoch, index = divmod(step, self.steps_per_epoch)
        share = self.config.batch_size // self.config.num_lanes
        number, first = divmod(index * share, self.config.shuffle_window)
        last = number + -(-share // self.config.shuffle_window)
        found = [self.window(epoch, lane, number).files[first:] for lane in lanes]
        found += [self.window(epoch, lane, later).files for later in range(number + 1, last + 1) for lane in lanes]
        return list(dict.fromkeys(np.concatenate(found).tolist()))
