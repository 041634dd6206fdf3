"""What a step frees stays with the process while it trains, and goes back at the end."""

import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vqvae_core.kept_memory import kept_memory

ROOT = Path(__file__).parents[2]
MIB = 2**20
BYTES = 64 * MIB
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another malloc")


def pages_fetched(num_bytes: int = BYTES) -> int:
    """Page faults of filling a tensor that is freed again."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(num_bytes, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES


def test_freed_memory_is_used_again_without_asking_the_system() -> None:
    with kept_memory("cpu"):
        found = [pages_fetched(BYTES - number * PAGE_BYTES) for number in range(8)]
    # Each a little smaller than the one before: the same size does not always fit where one was freed (kept_memory.py).
    assert found[-1] < BYTES / PAGE_BYTES / 10


def test_all_is_given_back_at_the_end() -> None:
    with kept_memory("cpu"):
        pages_fetched()
    before = resident_bytes()
    with kept_memory("cpu"):
        pages_fetched()
        assert resident_bytes() - before > 0.9 * BYTES
    assert resident_bytes() - before < 0.1 * BYTES


def test_what_comes_later_is_no_slower_than_before() -> None:
    """glibc keeps blocks of this size when it has seen some, and would not after a mere return to its defaults."""
    with kept_memory("cpu"):
        pages_fetched()
    found = [pages_fetched(8 * MIB - number * PAGE_BYTES) for number in range(8)]
    assert found[-1] < 8 * MIB / PAGE_BYTES / 10


@pytest.mark.slow
def test_nothing_is_kept_for_another_device() -> None:
    """In a process of its own, whose heap has no room that was kept before."""
    code = (
        "from tests.vqvae_core.test_kept_memory import *\n"
        "before = resident_bytes()\n"
        "with kept_memory('meta'):\n"
        "    pages_fetched()\n"
        "    print(resident_bytes() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 0.1 * BYTES
