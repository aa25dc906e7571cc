"""What the C library does with the memory of freed tensors."""

import ctypes
import sys

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4


def keep_freed_memory(keep: bool = True) -> None:
    """
    Have the process keep freed memory at hand, as PyTorch does on GPUs. Otherwise glibc gives every
    tensor of over 32 MiB back to the system when it is freed, and takes new pages for the next one,
    which the system clears: a third of the time of a detector on a CPU. For glibc on Linux;
    elsewhere it does nothing.

    Args:
        keep: if False, what glibc comes to by itself once large blocks have been freed.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        mallopt(_M_MMAP_MAX, 0 if keep else 65536)
        mallopt(_M_TRIM_THRESHOLD, -1 if keep else 64 << 20)  # -1: never
