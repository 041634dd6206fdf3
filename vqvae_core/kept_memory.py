"""Memory that a step of training frees, kept by the process for the next step.

glibc gives large blocks back to the system when they are freed, and the system hands them out again page by page, each
zeroed: for the activations of a step on the CPU that took 5 % of a training's time. What it costs is memory between
blocks: a tenth to a sixth more than before, of the demo's model. A block of the same size does not always fit where one
was freed, since glibc looks for some bytes more to align it: then it takes new pages as before.
"""

import contextlib
import ctypes
from collections.abc import Iterator
from typing import Any

import torch

# Parameters of mallopt, out of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_KEPT = {_TRIM_THRESHOLD: -1, _MMAP_MAX: 0}  # no end of the heap is given back, no block is mapped by itself
# glibc raises its two thresholds as blocks are freed, which it does no more after any call of mallopt: to these.
_AFTER = {_TRIM_THRESHOLD: 64 << 20, _MMAP_THRESHOLD: 32 << 20, _MMAP_MAX: 65536}

# For the environment in which a process starts: only the first arena of glibc grows without limit, and a thread that is
# not the main one would get another.
ONE_ARENA = {"MALLOC_ARENA_MAX": "1"}


@contextlib.contextmanager
def kept_memory(device: str) -> Iterator[None]:
    """Keep what is freed inside, where the device is the CPU and the system has glibc's malloc; elsewhere nothing is
    done. What is freed is given back at the end."""
    libc: Any = ctypes.CDLL(None) if torch.device(device).type == "cpu" else None
    if not (hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim")):
        yield
        return
    for name, value in _KEPT.items():
        libc.mallopt(name, value)
    try:
        yield
    finally:
        for name, value in _AFTER.items():
            libc.mallopt(name, value)
        libc.malloc_trim(0)
