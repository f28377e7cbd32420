"""Memory that holds nothing worth keeping, given back to the machine: where it lies stays this process's own."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterable

import torch
from torch import Tensor

_ADVICE = mmap.MADV_DONTNEED if sys.platform == "linux" else mmap.MADV_FREE
"""Elsewhere the former frees nothing; see madvise(2)."""


def give_back(tensors: Iterable[Tensor]) -> None:
    """Of tensors on the CPU the values are lost, and the whole pages in which they lie take memory again only as they
    are written; likewise what was freed in this process and kept by its allocators, of GPUs too. Tensors elsewhere stay
    as they are.
    """
    system = ctypes.CDLL(None)
    for tensor in tensors:
        first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - first
        if tensor.device.type == "cpu" and length > 0:
            system.madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), _ADVICE)
    if hasattr(system, "malloc_trim"):  # of glibc
        system.malloc_trim(ctypes.c_size_t(0))
    torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()
