"""Memory that is free, and errors when there is none."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
from collections.abc import Iterator
from pathlib import Path

import torch


class OutOfMemory(ValueError):
    """Memory ran out. One sentence, and what was allocated is free again."""


def give_back_freed_memory() -> None:
    """Keep a long-lived server's memory level; call it before threads start.

    Each answer has a thread of its own, and glibc would give threads up to eight pools a core, in
    which freed caches leave holes. Two pools, and large blocks that go back to the system at
    once, hold no more than is used. Without glibc nothing happens.
    """
    arena_max, mmap_threshold = -8, -3  # M_ARENA_MAX and M_MMAP_THRESHOLD in malloc.h
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(arena_max, 2)
        libc.mallopt(mmap_threshold, 128 * 1024)


def keep_collections_short() -> None:
    """Leave all that is there out of later garbage collections; call it once models are loaded.

    The modules make half a million objects. To look through them takes 0.3 s or more, while every
    answer stands still, and Python puts it off until garbage is a quarter of as many. Models are
    freed all the same: they leave with the last reference to them.
    """
    gc.collect()
    gc.freeze()


@contextlib.contextmanager
def memory_errors(label: str) -> Iterator[None]:
    """Turn any way of running out of memory into OutOfMemory, with the memory free again."""
    try:
        yield
        return
    except (MemoryError, torch.OutOfMemoryError):
        pass
    except RuntimeError as error:
        if "can't allocate memory" not in str(error) and "out of memory" not in str(error):
            raise
    # Outside the handlers: the exception's frames would keep the tensors alive.
    free_memory()
    raise OutOfMemory(
        f"memory ran out while {label} was in use; choose a shorter answer, or wait until "
        "other answers are done"
    )


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def free_host_memory() -> int:
    """Bytes that this process may still take: of the machine, and of its control group."""
    limits = [os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(line for line in lines if line.startswith("MemAvailable:"))
        limits = [int(available.split()[1]) * 1024]
    with contextlib.suppress(OSError, ValueError):  # "max" is no number: no limit
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        cached = int(stat.get("inactive_file", 0))  # given back when memory is asked for
        limits.append(limit - int((group / "memory.current").read_text()) + cached)
    return min(limits)
