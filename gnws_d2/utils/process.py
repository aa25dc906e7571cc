"""Settings of a process, for entry points."""

import contextlib
import ctypes
import functools
import gc
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def num_usable_cores() -> int:
    """Return the number of cores that this process may use, of those that the machine has."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@functools.cache
def keep_freed_memory() -> None:
    """
    Have the process keep freed memory from the first call on, as PyTorch does on GPUs. Otherwise
    glibc returns every tensor of over 32 MiB to the system when it is freed, and the system clears
    the pages for the next one: a third of the time of a detector on a CPU. Without glibc, do
    nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)  # never


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Suspend the search for reference cycles, slow while millions of objects are created."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def end_with_parent() -> None:
    """Have Linux kill this process when the process that started it ends."""
    if sys.platform == "linux":
        # PyTorch's launcher asks for SIGINT, which `nohup` ignores; torchrun asks for nothing.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():  # it had ended before
        sys.exit(1)
