"""What a program that hands out work frees goes back to the system."""

import gc
import platform
import subprocess
import sys
import weakref
from pathlib import Path

import pytest

from cluster.driver_memory import let_go
from cluster.session import Session
from pipelines import stage
from pipelines.config import Resources
from pipelines.tracking import Tracker
from vqvae_core.storage import Folder

ROOT = Path(__file__).parents[2]
MIB = 2**20

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another malloc")

# What a process has beside the first.
ARENAS = """
def arenas():
    places = [line.split("-")[0] for line in open("/proc/self/maps") if len(line.split()) == 5]
    return sum(int(place, 16) % (64 << 20) == 0 for place in places)
"""
# Threads that take small blocks, through Python and through Arrow, and free all but every thousandth of the former.
PROGRAM = """
import sys, threading
import numpy as np
import pyarrow as pa
from cluster.driver_memory import keep_little, let_go

def resident():
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))

def work(barrier, kept):
    barrier.wait()
    blocks = [bytes(1000) for _ in range(8000)]
    arrays = [pa.array(np.arange(4000) + 1).cast("float64") for _ in range(250)]
    barrier.wait()
    kept += blocks[::1000]

if sys.argv[1] == "little":
    keep_little()
before, kept = resident(), []
barrier = threading.Barrier(8)
threads = [threading.Thread(target=work, args=(barrier, kept)) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
if sys.argv[1] == "little":
    let_go()
print(arenas(), resident() - before)
"""


def printed(code: str, *arguments: str) -> list[int]:
    """The numbers on the last line of a program that knows `arenas`."""
    command = [sys.executable, "-c", ARENAS + code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return [int(number) for number in done.stdout.splitlines()[-1].split()]


@pytest.mark.slow
def test_what_threads_freed_goes_back() -> None:
    """Of a program that has 128 MB at one time, but for the end of the one arena that they share, which glibc keeps."""
    arenas, stayed = printed(PROGRAM, "much")
    assert arenas >= 4 and stayed > 80 * MIB  # or this test shows nothing
    arenas, stayed = printed(PROGRAM, "little")
    assert arenas <= 1 and stayed < 48 * MIB


@pytest.mark.slow
def test_a_session_keeps_little() -> None:
    """Ray's threads take their blocks where the settings say, which are older than they."""
    code = """
from cluster.session import Session
session = Session(num_cpus=1)
ray = session.connect()
assert ray.get(ray.put("x")) == "x"
print(arenas())
session.close()
"""
    assert printed(code)[0] <= 2  # some ten where each thread has its own


class Circle:
    def __init__(self) -> None:
        self.itself = self


def test_circles_are_let_go() -> None:
    gc.disable()
    try:
        circle = Circle()
        there = weakref.ref(circle)
        del circle
        assert there() is not None
        let_go()
        assert there() is None
    finally:
        gc.enable()


def test_waves_and_stages_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(stage, "let_go", lambda: calls.append("let go"))
    for wave in stage._waves(range(5), lambda: 2):
        calls.append(str(wave))
    assert calls == ["[0, 1]", "let go", "[2, 3]", "let go", "[4]", "let go"]
    calls.clear()
    root = Folder.of(tmp_path)
    pipeline = stage.Pipeline(root, Resources(), Session(), Tracker(root, "test", {}, "", enabled=False))
    monkeypatch.setattr(stage.Pipeline, "cpus_per_worker", lambda self: 1)
    for _ in range(2):  # made, then reused
        pipeline.make("some", version=1, kind="Some", recipe={}, inputs={},
                      build=lambda space, run: stage.Made([], {}, 0.0))  # fmt: skip
    assert calls == ["let go"]
