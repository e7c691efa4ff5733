"""Controls what glibc does with large freed blocks."""

import ctypes
import sys


def return_freed_memory() -> None:
    """Returns freed memory to the kernel, so that the process's size shows the memory in use."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):
            libc.malloc_trim(0)


def keep_freed_memory() -> None:
    """Tells glibc to reuse large freed blocks instead of returning them to the kernel.

    A training step on a CPU frees and allocates gigabytes, and the kernel zeroes fresh pages each time (`make bench`).
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            m_trim_threshold, m_mmap_threshold = -1, -3
            libc.mallopt(m_mmap_threshold, 2**30)
            libc.mallopt(m_trim_threshold, 2**31 - 1)
