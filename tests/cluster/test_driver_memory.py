"""What a program that hands out work frees goes back to the system."""

import platform
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from cluster.session import Session

ROOT = Path(__file__).parents[2]
MIB = 2**20

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another malloc")

# Threads that take small blocks, through Python and through Arrow, and free all but every thousandth of the former.
PROGRAM = """
import gc, re, sys, threading
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
places = [line.split("-")[0] for line in open("/proc/self/maps") if len(line.split()) == 5]
print(sum(int(place, 16) % (64 << 20) == 0 for place in places), resident() - before)
"""


def left(how: str) -> tuple[int, int]:
    """Arenas beside the first, and bytes that stay, of a program with 128 MB at its peak."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    arenas, stayed = map(int, done.stdout.split())
    return arenas, stayed


def test_what_threads_freed_goes_back() -> None:
    """But for the end of the one arena that they share, which glibc keeps."""
    arenas, stayed = left("much")
    assert arenas >= 4 and stayed > 128 * MIB  # or this test shows nothing
    arenas, stayed = left("little")
    assert arenas <= 1 and stayed < 48 * MIB


@pytest.mark.slow
def test_a_session_keeps_little() -> None:
    """From its beginning: Ray's threads take their blocks where the settings say."""
    session = Session(num_cpus=1)
    session.connect()
    try:
        assert pa.default_memory_pool().backend_name == "system"
    finally:
        session.close()
