"""The order of training samples: a pure function of (seed, files, epoch), the same for any number of ranks.

An epoch is the seeded sequence of all shards, cut by sample count into L equal lanes. Each lane is shuffled in
consecutive windows. Global batch g takes B/L samples from each lane; ranks own lanes. The N mod B samples at the end of
the sequence are left out, others each epoch. The position is the step, one integer: nothing before it is read.
"""

import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from vqvae_core.errors import InputError

Item = TypeVar("Item")
_MASK = (1 << 64) - 1


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
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


class Order:
    """Which sample stands where. files: (path, number of samples) of each shard, in the manifest's order."""

    def __init__(self, files: Sequence[tuple[str, int]], config: StreamConfig) -> None:
        self.files, self.config = list(files), config
        self.num_samples = sum(rows for _, rows in files)
        self.steps_per_epoch = self.num_samples // config.batch_size
        if not self.steps_per_epoch:
            raise InputError(
                f"expected at least one batch of {config.batch_size} samples, the data has {self.num_samples}; "
                "lower the batch size or shard more images"
            )
        self.lane_samples = self.steps_per_epoch * config.batch_size // config.num_lanes
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None
        self._windows: OrderedDict[tuple[int, int, int], np.ndarray] = OrderedDict()

    def _shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's sequence of shards, and the number of samples before each of them."""
        if self._epoch is None or self._epoch[0] != epoch:
            sequence = permutation(len(self.files), self.config.seed, epoch)
            rows = np.array([self.files[shard][1] for shard in sequence])
            self._epoch = (epoch, sequence, np.concatenate([[0], np.cumsum(rows)]))
        return self._epoch[1], self._epoch[2]

    def sample(self, epoch: int, lane: int, number: int) -> tuple[str, int]:
        """(path, row) of a lane's sample by its number in the epoch."""
        window = self.config.shuffle_window
        start = number // window * window
        length = min(window, self.lane_samples - start)
        shuffled = start + int(self._window(epoch, lane, start, length)[number - start])
        sequence, before = self._shards(epoch)
        place = lane * self.lane_samples + shuffled
        shard = int(np.searchsorted(before, place, side="right")) - 1
        return self.files[sequence[shard]][0], place - int(before[shard])

    def _window(self, epoch: int, lane: int, start: int, length: int) -> np.ndarray:
        key = (epoch, lane, start)
        if key not in self._windows:
            self._windows[key] = permutation(length, self.config.seed, epoch, lane, start)
            while len(self._windows) > 2 * self.config.num_lanes:
                self._windows.popitem(last=False)
        return self._windows[key]

    def batch(self, step: int, lanes: range) -> list[tuple[str, int]]:
        """(path, row) of each sample that these lanes give to global batch `step`, lane by lane."""
        epoch, index = divmod(step, self.steps_per_epoch)
        share = self.config.batch_size // self.config.num_lanes
        return [self.sample(epoch, lane, index * share + number) for lane in lanes for number in range(share)]


class Stream(Generic[Item]):
    """The batches of one rank. read(path) gives all items of a shard."""

    def __init__(
        self,
        files: Sequence[tuple[str, int]],
        read: Callable[[str], Sequence[Item]],
        config: StreamConfig,
        *,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if config.num_lanes % world_size:
            raise InputError(
                f"expected a number of workers that divides num_lanes {config.num_lanes}, found {world_size}; "
                "change either of them (num_lanes belongs to the recipe)"
            )
        self.order = Order(files, config)
        self.config = config
        lanes = config.num_lanes // world_size
        self.lanes = range(rank * lanes, (rank + 1) * lanes)
        self._read = read
        self._open: OrderedDict[str, Sequence[Item]] = OrderedDict()

    def _item(self, path: str, row: int) -> Item:
        if path not in self._open:
            self._open[path] = self._read(path)
            # A lane's window spans one or two shards, more where shards are smaller than a window.
            rows = max(1, self.order.num_samples // len(self.order.files))
            while len(self._open) > len(self.lanes) * (2 + self.config.shuffle_window // rows):
                self._open.popitem(last=False)
        self._open.move_to_end(path)
        return self._open[path][row]

    def batches(self, start: int, stop: int, collate: Callable[[list[Item]], Any], ahead: int = 4) -> Iterator[Any]:
        """The collated batches of steps start to stop - 1. A thread reads and decodes `ahead` batches early."""
        ready: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(maxsize=ahead)
        stopped = threading.Event()

        def put(value: tuple[Any, BaseException | None]) -> None:
            while not stopped.is_set():
                try:
                    ready.put(value, timeout=0.2)
                except queue.Full:
                    continue
                return

        def work() -> None:
            try:
                for step in range(start, stop):
                    if stopped.is_set():
                        return
                    put((collate([self._item(*place) for place in self.order.batch(step, self.lanes)]), None))
            except BaseException as error:
                put((None, error))

        thread = threading.Thread(target=work, name="stream", daemon=True)
        thread.start()
        try:
            for _ in range(start, stop):
                batch, error = ready.get()
                if error is not None:
                    raise error
                yield batch
        finally:
            stopped.set()
            thread.join()
