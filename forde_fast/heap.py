"""The C library's memory, which a step takes and gives back hundreds of times.

By default glibc returns large blocks to the system at once, which hands them out again page by page, zeroed: a tenth
of a FoRDE step of a resnet18 on two cores, a fifth of a stacked small network's.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Iterator

TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4  # of malloc.h
KEPT = ((TRIM_THRESHOLD, -1), (MMAP_MAX, 0))
CHOSEN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


@functools.cache
def keep() -> bool:
    """From now on this process keeps what it frees, for what it takes next, until `trim`; whether it does.

    Not where the C library is another one than glibc or the environment has settings of its own.
    """
    library = _glibc()
    if library is None or any(name in os.environ for name in CHOSEN):
        return False
    return all(library.mallopt(option, value) for option, value in KEPT)


@contextlib.contextmanager
def large_given_back() -> Iterator[None]:
    """In here, blocks of 32 MB and more go back to the system once they are free, as glibc has it by default."""
    if not keep():
        yield
        return
    for option, value in ((MMAP_MAX, 1 << 16), (MMAP_THRESHOLD, 1 << 25)):
        _glibc().mallopt(option, value)
    try:
        yield
    finally:
        _glibc().mallopt(MMAP_MAX, 0)


def trim() -> None:
    """Return to the system what is free."""
    if _glibc() is not None:
        _glibc().malloc_trim(0)


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(None)
        return library if hasattr(library, "gnu_get_libc_version") else None
    except (OSError, TypeError):  # no such libraries here
        return None
