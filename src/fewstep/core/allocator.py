"""What the C library does with freed memory."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # malloc.h


def keep_freed_memory() -> None:
    """Tell glibc to keep what is freed, instead of mapping every large tensor anew.

    A mapped page costs a fault at its first touch. On 2 cores, a Conv4 meta-gradient of 8 tasks
    with 75 query images takes 0.51 s in place of 0.94 s. The process holds on to its peak memory,
    so this is for a program to choose, and the command line does; the library leaves it alone.
    Other C libraries than glibc have no such call, and stay as they are.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    for option, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, 64 * 2**20)):
        mallopt(option, value)


def return_freed_memory() -> bool:
    """Give whole pages of freed memory back to the system, wherever between others they lie.

    For where memory matters more than time: glibc fills gaps with smaller tensors, so that what is
    freed between two inner steps does not suffice for the next.

    Returns:
        Whether the C library can; others than glibc have no such call.
    """
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError):
        return False
    trim(ctypes.c_size_t(0))
    return True
