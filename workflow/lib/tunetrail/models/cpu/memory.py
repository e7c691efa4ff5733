"""glibc's handling of large freed blocks."""

import ctypes
import sys


def return_freed_memory() -> None:
    """Gives the kernel what glibc holds back, so that memory in use can be read off the process."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):
            libc.malloc_trim(0)


def keep_freed_memory() -> None:
    """Tells glibc to reuse large freed blocks instead of returning them to the kernel.

    A training step on a CPU frees and takes gigabytes, and the kernel zeroes fresh pages each time (`make bench`).
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            m_trim_threshold, m_mmap_threshold = -1, -3
            libc.mallopt(m_mmap_threshold, 2**30)
            libc.mallopt(m_trim_threshold, 2**31 - 1)
