"""What a step frees stays with the process while it trains, and goes back at the end."""

import os
import platform
import resource
from pathlib import Path

import pytest
import torch

from vqvae_core.kept_memory import kept_memory

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
        found = [pages_fetched() for _ in range(8)]
    assert found[-1] < BYTES / PAGE_BYTES / 10  # the first few settle where blocks lie


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
    found = [pages_fetched(8 * MIB) for _ in range(8)]
    assert found[-1] < 8 * MIB / PAGE_BYTES / 10


def test_nothing_is_kept_for_another_device() -> None:
    before = resident_bytes()
    with kept_memory("meta"):
        pages_fetched()
        assert resident_bytes() - before < 0.1 * BYTES
