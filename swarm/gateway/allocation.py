"""How memory that the gateway's threads free gets back to the system.

Owns what glibc's malloc is told for the whole process; other allocators are left alone.
"""

from __future__ import annotations

import ctypes
import platform

LARGE_BYTES = 1 << 20
KEPT_BYTES = 8 << 20
"""At the end of each thread's heap."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""As malloc.h calls them."""


def return_large_buffers() -> None:
    """From now on a buffer of LARGE_BYTES or more is mapped by itself, and goes back to the system when it is freed.

    By itself glibc raises that bound to the size of what is freed, up to 32 MB (mallopt(3)). The logits of 64 answers,
    12 MB in a small model, then lie among what lives longer, in heaps that cannot shrink: 50 to 200 MB under load.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)
        libc.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
