"""Batches of training images for one rank: the order of `Order`, decoded ahead by a thread or by processes.

Shards are mapped, not copied (from S3: fetched once, while the window before is read). Processes write pixels into
mapped batches, so that none travels through a pipe. What is in memory is bounded by windows: the shards that the lanes
read in two of them, some batches, and up to 64 MiB of where images lie in shards that were read.
"""

import contextlib
import dataclasses
import json
import os
import queue
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate, count, islice
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from vqvae_core.augment import AugmentConfig
from vqvae_core.decoder import Decoder, batch_memory
from vqvae_core.errors import InputError
from vqvae_core.image_shards import ImageShards, TarIndex, index_tar
from vqvae_core.loader_channel import Channel, ChannelClosedError
from vqvae_core.mapped_file import MappedFile
from vqvae_core.order import Order, OrderConfig, Places, lanes_of

_STRETCH = 256  # samples, at least, that are asked for at once: a message costs as much as some of them
_AHEAD = 4  # batches, at least, in the making while one is used
_FETCHES = 8  # shards that are opened at once
_READY = 2  # batches that a thread keeps ready while its rank computes on the same core
_PORTION = 8  # images that a thread decodes before it looks whether it may go on
_SMOOTH = 0.9  # of the rates of processes, from one message to the next
_MOST = 4  # times as quick as another that a process is taken for
_MOST_OF_INDEXES = 64 << 20  # bytes, about: of half a million to a million images
_MAX_DEATHS = 3  # of a loader's processes


class LoaderError(InputError):
    """The processes that decode training images end again and again."""


class ImageLoader:
    """The training images of one rank.

    num_workers: processes that decode; 0: a thread of this one. warn: called with a line where a process had to be
    started again. Raises `InputError` where the ranks cannot share the lanes, or the data is less than a batch.
    """

    def __init__(
        self,
        images: ImageShards,
        config: OrderConfig,
        augment: AugmentConfig,
        *,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        warn: Callable[[str], None] = print,
    ) -> None:
        files = [(path, images.artifact.files[path].rows) for path in images.shards("train")]
        self.order = Order(files, config)
        self.lanes = lanes_of(rank, world_size, config)
        self.size = augment.size(images.size)
        self._images, self._config, self._augment = images, config, augment
        self._num_workers, self._warn = num_workers, warn
        self._rank_batch = config.batch_size // world_size
        self._known = _Known()
        self._leisure = _Leisure()

    def during(self, wait: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
        """`wait`, in which this rank waits for others. From now on a loader's thread decodes ahead while it runs, and
        otherwise only what is needed soon, since it takes the core from a rank that computes on it."""
        self._leisure.bound = True

        def waiting(tensor: Tensor) -> None:
            with self._leisure.inside():
                wait(tensor)

        return waiting

    def batches(self, start: int, stop: int) -> Iterator[Tensor]:
        """Pixels, uint8 (B / world_size, S, S, 3), of steps start to stop - 1.

        Each is valid until the next is asked for, then it is overwritten. Raises `ArtifactError` naming the file or
        image that is not what it should be, `LoaderError` where processes die again and again.
        """
        # Steps of a stretch, of which a message tells. A thread needs none: it decodes one step at a time, so that it
        # takes as much of each step as of the next, on all ranks.
        longest = -(-_STRETCH // self._rank_batch) if self._num_workers else 1
        ahead = max(2, -(-_AHEAD // longest))
        shape = (ahead + 1, longest, self._rank_batch, self.size, self.size, 3)
        num_bytes = int(np.prod(shape))
        batches = MappedFile.nameless(num_bytes + 64)
        pixels = batch_memory(num_bytes, batches.data).reshape(shape)
        crew = self._crew(batches, pixels.reshape(-1, *shape[3:]))
        shards = _OpenShards(self._images, self.order, self.lanes, crew, self._known)
        stretches = self.order.stretches(start, stop, longest)
        asked: deque[range] = deque()
        try:
            for number in count():
                for steps in islice(stretches, ahead + 1 - len(asked)):
                    places = shards.at(steps)
                    first = (number + len(asked)) % len(pixels) * longest * self._rank_batch
                    crew.decode(steps.start // self.order.steps_per_epoch, places.files, places.rows, first)
                    asked.append(steps)
                if not asked:
                    return
                crew.wait()
                for place in range(len(asked.popleft())):
                    yield torch.from_numpy(pixels[number % len(pixels), place])
        finally:
            crew.end()
            shards.close()
            del pixels
            batches.close()

    def _crew(self, batches: MappedFile, pixels: np.ndarray) -> "_Crew":
        if self._num_workers == 0:
            return _Thread(Decoder(self._augment, self.size, self._config.seed), pixels, self._leisure)
        begin = {"size": self.size, "seed": self._config.seed, "augment": dataclasses.asdict(self._augment)}
        return _Processes(self._num_workers, begin, batches, self._warn)


@runtime_checkable
class _Crew(Protocol):
    """Who decodes. Shards are known by their number in the order's files, and have their index as JSON; batches lie one
    behind the other."""

    def open(self, shard: int, file: MappedFile, index: str, where: str) -> None: ...

    def close(self, shard: int) -> None: ...

    def decode(self, epoch: int, shards: np.ndarray, rows: np.ndarray, first: int) -> None:
        """Begin to fill the images from `first` on."""
        ...

    def wait(self) -> None:
        """Until the images are filled that began first of those not waited for."""
        ...

    def end(self) -> None: ...


class _Known:
    """What was found of files when they were open before: that they were whole, and where their images lie, which the
    file's hash in the manifest settles for good. A walk over a shard's headers costs 3 us an image."""

    def __init__(self) -> None:
        self.files: dict[str, tuple[int, ...]] = {}
        self._indexes: dict[str, str] = {}
        self._num_bytes = 0

    def index(self, path: str, file: MappedFile, where: str) -> str:
        """The shard's `TarIndex` as JSON. Raises `ArtifactError`."""
        found = self._indexes.get(path)
        if found is None:
            found = json.dumps(vars(index_tar(file.data, where)))
            if self._num_bytes + len(found) <= _MOST_OF_INDEXES:
                self._num_bytes += len(found)
                self._indexes[path] = found
        return found


class _OpenShards:
    """The shards that lanes read in this window and the next: opened and checked by threads, early."""

    def __init__(self, images: ImageShards, order: Order, lanes: range, crew: _Crew, known: _Known) -> None:
        self._images, self._order, self._lanes, self._crew, self._known = images, order, lanes, crew, known
        self._pool = ThreadPoolExecutor(_FETCHES, thread_name_prefix="shards")
        self._files: dict[int, Future[tuple[MappedFile, str]]] = {}
        _allow_open_files()
        self._given: set[int] = set()
        self._window = (-1, -1)

    def at(self, steps: range) -> Places:
        """The places of a stretch's samples. Their shards are open when this returns."""
        window = self._order.window_of(steps.start)
        if window != self._window:
            self._window = window
            self._keep(self._order.near(steps.start, self._lanes))
        places = self._order.stretch(steps, self._lanes)
        for shard in sorted(set(places.files.tolist()) - self._given):
            file, index = self._files[shard].result()
            self._crew.open(shard, file, index, self._where(shard))
            self._given.add(shard)
        return places

    def _opened(self, shard: int) -> tuple[MappedFile, str]:
        path = self._order.files[shard][0]
        file = MappedFile.open(self._images.artifact, path, self._known.files)
        try:
            return file, self._known.index(path, file, self._where(shard))
        except InputError:
            file.close()
            raise

    def _where(self, shard: int) -> str:
        return self._images.artifact.folder.path(self._order.files[shard][0])

    def _keep(self, wanted: list[int]) -> None:
        for shard in [shard for shard in self._files if shard not in set(wanted)]:
            self._drop(shard)
        for shard in wanted:
            if shard not in self._files:
                self._files[shard] = self._pool.submit(self._opened, shard)

    def _drop(self, shard: int) -> None:
        if shard in self._given:
            self._given.remove(shard)
            self._crew.close(shard)
        file = self._files.pop(shard)
        if not file.cancel() and file.exception() is None:
            file.result()[0].close()

    def close(self) -> None:
        self._given.clear()  # the crew has ended
        for shard in [*self._files]:
            self._drop(shard)
        self._pool.shutdown()


def _allow_open_files() -> None:
    """As many as the system lets: a shard that is open is one here, and one more for each process that decodes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class _Leisure:
    """When a core has time for decoding ahead: always, or only inside, where `bound`."""

    def __init__(self) -> None:
        self.bound = False
        self._changed = threading.Condition()
        self._is_inside = False

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        with self._changed:
            self._is_inside = True
            self._changed.notify_all()
        try:
            yield
        finally:
            self._is_inside = False  # nobody waits for the end

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """What `wait` looks at is changed inside."""
        with self._changed:
            yield
            self._changed.notify_all()

    def wait(self, unless: Callable[[], bool]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self.bound or self._is_inside or unless())


class _Thread:
    """A thread of this process: enough where decoding is little beside a step. It decodes ahead at leisure."""

    def __init__(self, decoder: Decoder, pixels: np.ndarray, leisure: _Leisure) -> None:
        self._decoder, self._pixels, self._leisure = decoder, pixels, leisure
        self._todo: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._done: queue.Queue[BaseException | None] = queue.Queue()
        self._num_ready, self._over = 0, False
        self._thread = threading.Thread(target=self._work, name="loader", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        failure: BaseException | None = None
        while (action := self._todo.get()) is not None:
            try:
                if failure is None:
                    action()
            except BaseException as error:
                failure = error
                self._done.put(error)

    def open(self, shard: int, file: MappedFile, index: str, where: str) -> None:
        view = memoryview(file.data)  # from here on the file stays mapped, until the decoder has closed it
        self._todo.put(lambda: self._decoder.open(shard, view, TarIndex(**json.loads(index)), where))

    def close(self, shard: int) -> None:
        self._todo.put(lambda: self._decoder.close(shard))

    def decode(self, epoch: int, shards: np.ndarray, rows: np.ndarray, first: int) -> None:
        def decode() -> None:
            for begin in range(0, len(rows), _PORTION):
                self._leisure.wait(unless=lambda: self._num_ready < _READY or self._over)
                if self._over:
                    return
                end = min(begin + _PORTION, len(rows))
                out = self._pixels[first + begin : first + end]
                self._decoder.decode(epoch, shards[begin:end].tolist(), rows[begin:end].tolist(), out)
            self._count_ready(1)
            self._done.put(None)

        self._todo.put(decode)

    def _count_ready(self, more: int) -> None:
        with self._leisure.changing():
            self._num_ready += more

    def wait(self) -> None:
        failure = self._done.get()
        if failure is not None:
            raise failure
        self._count_ready(-1)

    def end(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self._todo.get_nowait()
        self._todo.put(None)
        with self._leisure.changing():
            self._over = True
        self._thread.join()


class _Process:
    """One process, and a log of what it was told that another in its place would have to be told again."""

    def __init__(self, begin: dict[str, Any], batches: MappedFile) -> None:
        self._begin, self._batches = begin, batches
        self._log: list[tuple[dict[str, Any], int | None]] = []  # messages with an open file, our own
        self._num_closed = 0  # shards of which the log has both the opening and the closing
        self._start()

    def _start(self) -> None:
        mine, theirs = socket.socketpair()
        self.channel = Channel(mine)
        # Not the package's __main__ and no fork: this process may have threads, and a framework around it.
        path = os.pathsep.join(filter(None, sys.path))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "vqvae_core.loader_worker", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )
        theirs.close()
        self.channel.send(self._begin, self._batches.file)

    def restart(self) -> None:
        """Another process in its place, that has the same shards open and does what this one had not answered."""
        self.channel.close()
        self.process.wait()
        self._start()
        for message, file in self._log:
            self.channel.send(message, file)

    def tell(self, message: dict[str, Any], file: int | None = None) -> None:
        self._log.append((message, None if file is None else os.dup(file)))
        self._num_closed += message["do"] == "close"
        self.channel.send(message, file)

    def answer(self) -> dict[str, Any]:
        message, _ = self.channel.receive()
        del self._log[next(n for n, (told, _) in enumerate(self._log) if told["do"] == "decode")]
        if self._num_closed:
            self._forget_closed()
        return message

    def _forget_closed(self) -> None:
        """Shards that were closed before the oldest question that is not answered are not needed again."""
        kinds = [told["do"] for told, _ in self._log]
        oldest = kinds.index("decode") if "decode" in kinds else len(kinds)
        for told, _ in [entry for entry in self._log[:oldest] if entry[0]["do"] == "close"]:
            for _ in ("open", "close"):
                number = next(n for n, (one, _) in enumerate(self._log) if one.get("shard") == told["shard"])
                _, file = self._log.pop(number)
                if file is not None:
                    os.close(file)
            self._num_closed -= 1

    def end(self) -> None:
        self.channel.close()
        self.process.terminate()
        self.process.wait()
        for _, file in self._log:
            if file is not None:
                os.close(file)


class _Processes:
    """Some processes, each of which decodes a part of every batch: as large as it was quick in the last ones, so that
    none waits for another that shares its CPU with something else."""

    def __init__(self, count: int, begin: dict[str, Any], batches: MappedFile, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._deaths = 0
        self._processes = [_Process(begin, batches) for _ in range(count)]
        self._rates = [1.0] * count  # images in a second, an average of the last messages

    def _mended(self, process: _Process, action: Callable[[], Any]) -> Any:
        """action(), again where the process is gone. What an action noted before it failed, a restart repeats."""
        try:
            return action()
        except ChannelClosedError:
            pass
        while True:
            self._deaths += 1
            code = process.process.wait()
            reason = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            if self._deaths > _MAX_DEATHS:
                raise LoaderError(
                    f"a process that decodes training images ended by {reason}, as {_MAX_DEATHS} did before it; is "
                    "memory short? Lower --resources.loader-workers; training goes on from its last checkpoint"
                )
            self._warn(
                f"a process that decodes training images ended by {reason}; started again "
                f"({self._deaths} of at most {_MAX_DEATHS}), nothing is lost"
            )
            with contextlib.suppress(ChannelClosedError):
                process.restart()
                return None

    def open(self, shard: int, file: MappedFile, index: str, where: str) -> None:
        message = {"do": "open", "shard": shard, "where": where, "index": index}
        for process in self._processes:
            self._mended(process, lambda process=process: process.tell(message, file.file))

    def close(self, shard: int) -> None:
        message = {"do": "close", "shard": shard}
        for process in self._processes:
            self._mended(process, lambda process=process: process.tell(message))

    def decode(self, epoch: int, shards: np.ndarray, rows: np.ndarray, first: int) -> None:
        scale = len(rows) / sum(self._rates)
        cuts = [round(scale * rate) for rate in accumulate(self._rates, initial=0.0)]
        for process, begin, end in zip(self._processes, cuts, cuts[1:], strict=False):
            message = {"do": "decode", "epoch": epoch, "first": first + begin,
                       "shards": shards[begin:end].tolist(), "rows": rows[begin:end].tolist()}  # fmt: skip
            self._mended(process, lambda process=process, message=message: process.tell(message))

    def wait(self) -> None:
        rates = []
        for process in self._processes:
            answer = None
            while answer is None:
                answer = self._mended(process, process.answer)
            if answer["error"]:
                raise InputError(answer["error"])
            rates.append(answer["rate"])
        least = max(rates) / _MOST  # so that one that stood still, or had nothing to do, is asked again
        if least:
            pairs = zip(self._rates, rates, strict=True)
            self._rates = [_SMOOTH * old + (1 - _SMOOTH) * max(new, least) for old, new in pairs]

    def end(self) -> None:
        for process in self._processes:
            process.end()
