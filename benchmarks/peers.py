"""What the benchmarks measure against: the bare loop that no pipeline can beat, and what one would write by hand."""

import contextlib
import ctypes
import io
import itertools
import json
import os
import signal
import statistics
import tarfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from PIL import Image

_PR_SET_PDEATHSIG = 1  # of Linux's prctl


@dataclass(frozen=True)
class Bar:
    """One claim: a measured value, and the least (or most) that it must be."""

    name: str
    value: float
    bar: float
    at_most: bool = False

    @property
    def holds(self) -> bool:
        return self.value <= self.bar if self.at_most else self.value >= self.bar


def report(name: str, settings: dict[str, Any], bars: Sequence[Bar], figures: dict[str, Any]) -> int:
    """Print the result as one JSON line; the exit code: 1 where a bar is not held."""
    line = {
        "benchmark": name,
        "hardware": hardware(),
        "settings": settings,
        "bars": [{**asdict(bar), "holds": bar.holds} for bar in bars],
        "figures": figures,
    }
    print(json.dumps(line), flush=True)
    return 0 if all(bar.holds for bar in bars) else 1


def hardware() -> dict[str, Any]:
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        "unknown",
    )
    pages, page_bytes = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return {"cpu": model, "cpus": os.cpu_count(), "memory_gib": round(pages * page_bytes / 2**30, 1)}


def pin(num_cpus: int) -> None:
    """Keep this process, and all that it starts, on some CPUs: rivals share what the settings say, and no more."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:num_cpus])


def interleaved(rivals: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Images/s of each rival in each round: A B C A B C, so that a slow minute hits all."""
    rates: dict[str, list[float]] = {name: [] for name in rivals}
    for number in range(rounds):
        for name, rival in rivals.items():
            rates[name].append(rival())
            print(f"round {number + 1} of {rounds}: {name} {rates[name][-1]:.1f} images/s", flush=True)
    return rates


def counted(items: Iterable[Any], path: str, unit: int = 1) -> Iterator[Any]:
    """The items, and a file that says how many of them, times `unit`, were done: the one before is, when the next is
    asked for."""
    with Path(path).open("wb", buffering=0) as file:
        for number, item in enumerate(items):
            os.pwrite(file.fileno(), (unit * number).to_bytes(8, "little"), 0)
            yield item


@dataclass(frozen=True)
class Turn:
    """What a rival got done in one turn, and the CPU time that it used."""

    count: int
    seconds: float
    cpu_seconds: float


def _work(task: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """The task, in a process that ends with its parent, however that ends: one that goes on would slow all later
    measurements."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    task(*arguments)


class _Rival:
    """Processes that work without end and count what they do, in files; they can be halted and let go on."""

    def __init__(self, jobs: "Jobs", counts: list[str]) -> None:
        context = get_context("spawn")
        self._processes = [context.Process(target=_work, args=job) for job in jobs]
        self._counts = [Path(path) for path in counts]
        self._members: list[int] = []
        for process in self._processes:
            process.start()

    def _done(self) -> list[int]:
        return [int.from_bytes(path.read_bytes(), "little") if path.exists() else 0 for path in self._counts]

    def wait(self, count: int) -> None:
        while min(self._done()) < count:
            if not all(process.is_alive() for process in self._processes):
                raise RuntimeError("a rival ended before it was measured")
            time.sleep(0.2)

    def _signal(self, number: int) -> None:
        for pid in self._members:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def halt(self) -> None:
        self._signal(signal.SIGSTOP)
        for _ in range(2):  # those that were started since, and those that these have started meanwhile
            self._members = [int(pid) for process in self._processes for pid in family(str(process.pid))]
            self._signal(signal.SIGSTOP)

    def turn(self, seconds: float) -> Turn:
        """What is cut at the end of a turn counts in the turn in which it is done."""
        before, used, begin = sum(self._done()), cpu_seconds(self._members), time.perf_counter()
        self._signal(signal.SIGCONT)
        time.sleep(seconds)
        self._signal(signal.SIGSTOP)
        taken = time.perf_counter() - begin
        self.halt()
        return Turn(sum(self._done()) - before, taken, cpu_seconds(self._members) - used)

    def end(self) -> None:
        self._signal(signal.SIGCONT)
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join(60)
            if process.is_alive():
                self._signal(signal.SIGKILL)
                process.join()
        for pid in self._members:  # what a process left behind that was ended without a word
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)


Jobs = list[tuple[Callable[..., None], tuple[Any, ...]]]  # functions, each for a process, and their arguments


def in_turns(
    rivals: dict[str, tuple[Jobs, list[str], int]], turns: int, seconds: float, far: Sequence[str] = (), every: int = 1
) -> dict[str, list[Turn]]:
    """Rivals that take turns of some seconds: while one works, all processes of the others are stopped, so that a slow
    minute of the machine hits all. Each has jobs without end, the files in which they count, and the count of each from
    which on it is measured. far: those that only take a turn `every` so many, since they are not close."""
    found: dict[str, list[Turn]] = {name: [] for name in rivals}
    with contextlib.ExitStack() as stack:
        running = {}
        for name, (jobs, counts, warm) in rivals.items():
            running[name] = rival = _Rival(jobs, counts)
            stack.callback(rival.end)
            rival.wait(warm)
            rival.halt()
        for number in range(turns):
            for name, rival in running.items():
                if name not in far or number % every == 0:
                    found[name].append(rival.turn(seconds))
            print(f"turn {number + 1} of {turns}", flush=True)
    return found


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def in_processes(
    task: Callable[..., Any], jobs: Iterable[tuple[Any, ...]], processes: int, warm: Callable[[], Any] = Image.init
) -> tuple[float, list[Any]]:
    """Seconds that task(*job) took for all jobs on some processes, each of which has done `warm` before."""
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        list(pool.map(_warm, [warm] * processes))
        begin = time.perf_counter()
        results = [future.result() for future in [pool.submit(task, *job) for job in jobs]]
        return time.perf_counter() - begin, results


def _warm(warm: Callable[[], Any]) -> None:
    warm()
    time.sleep(1.0)  # so that each process gets one


def decode_resize_encode(data: bytes, size: int, kind: str, options: dict[str, Any]) -> bytes:
    """One image, as one would write it by hand: all of it by Pillow."""
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    small = picture.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    return _saved(small, kind, options)


def decode_resize_encode_fast(data: bytes, size: int, kind: str, options: dict[str, Any]) -> bytes:
    """The same with the codec and the kernel that the pipeline uses: what the loop at the limit does, and no more."""
    import simplejpeg
    import torch
    from torch.nn import functional

    pixels = simplejpeg.decode_jpeg(data)
    side = min(pixels.shape[:2])
    top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
    planes = torch.from_numpy(pixels)[None, top : top + side, left : left + side].permute(0, 3, 1, 2)
    small = functional.interpolate(planes, (size, size), mode="bicubic", antialias=True)[0].permute(1, 2, 0)
    return _saved(Image.fromarray(small.contiguous().numpy()), kind, options)


def warm_codec() -> None:
    """Before the clock runs, and with one thread a process."""
    import torch

    torch.set_num_threads(1)
    use_codec()


def use_codec() -> None:
    """Once: its libraries are loaded after it."""
    made = io.BytesIO()
    Image.new("RGB", (64, 64)).save(made, "JPEG")
    decode_resize_encode_fast(made.getvalue(), 32, "JPEG", {})


def _saved(picture: Image.Image, kind: str, options: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def inner_archives(archive: Path) -> list[tuple[str, int, int]]:
    """(name, offset, bytes) of each inner tar of an archive in ImageNet's layout."""
    with tarfile.open(archive, "r:") as outer:
        return [(member.name, member.offset_data, member.size) for member in outer]


def free_memory_bytes() -> int:
    """What programs and the operating system's memory of files could take."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


class Memory:
    """The peak of the memory of this process and all that it starts: what each has for itself, and what they share
    (the largest part that one of them has mapped). Programs and libraries, which are files, are not counted. Measured
    twice a second; after the first ten seconds, new processes are looked for every five."""

    def __enter__(self) -> "Memory":
        self.peak_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        for number in itertools.count():
            if self._stop.wait(0.5):
                return
            if number < 20 or number % 10 == 0:  # to find them takes ten times as long as to measure them
                members = family("self")
            found = [_own_and_shared_bytes(pid) for pid in members]
            now = sum(own for own, _ in found) + max(shared for _, shared in found)
            self.peak_bytes = max(self.peak_bytes, now)


def mapped_bytes(folder: str) -> int:
    """How much of the files below a folder this process has mapped: the most of them that it can hold in memory."""
    total = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5].startswith(folder):
            first, last = (int(number, 16) for number in fields[0].split("-"))
            total += last - first
    return total


def family(pid: str) -> list[str]:
    """A process and all that it started, and these started, as far as their parents live."""
    found = [pid]
    try:
        threads = list(Path(f"/proc/{pid}/task").iterdir())
        for thread in threads:
            for child in (thread / "children").read_text().split():
                found += family(child)
    except OSError:
        pass
    return found


def cpu_seconds(pids: Sequence[int] | None = None) -> float:
    """CPU time that processes and their ended children have used so far; None: this one and all that it started."""
    ticks = 0
    for pid in family("self") if pids is None else pids:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        ticks += sum(map(int, fields[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


def _own_and_shared_bytes(pid: str) -> tuple[int, int]:
    # Not smaps_rollup: reading it stops the process for as long as its page tables are walked.
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0, 0
    values = {name: 1024 * int(value.split()[0]) for name, _, value in (line.partition(":") for line in lines)
              if name in ("RssAnon", "RssShmem")}  # fmt: skip
    return values.get("RssAnon", 0), values.get("RssShmem", 0)
