"""Memory that a program which hands out work would keep: glibc's, Arrow's, and Python's circles."""

import ctypes
import gc
from typing import Any

import pyarrow as pa

_ARENA_MAX = -8  # of glibc's malloc.h


def keep_little() -> None:
    """Call it before threads begin, those of Ray above all: each would get an arena of glibc's and free its blocks
    there, among others that stay, and where many have one glibc no longer asks how many there may be. Arrow's own pools
    keep what its threads freed as well, so that it takes from glibc too."""
    pa.set_memory_pool(pa.system_memory_pool())
    libc: Any = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_ARENA_MAX, 1)


def let_go() -> None:
    """Give back what a wave of work or a stage leaves. Ray Data's objects refer to each other in circles: what they
    hold in the stores lives until Python looks for such. And glibc keeps what was freed, unless it is asked."""
    gc.collect()
    libc: Any = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
