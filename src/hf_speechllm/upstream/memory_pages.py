"""Giving memory-mapped pages back while a checkpoint passes through."""

from __future__ import annotations

import ctypes
import mmap
import sys

from torch import Tensor


# Linux 5.4: reclaim these pages now. Unlike MADV_DONTNEED it keeps what is not mapped from a file.
_MADV_PAGEOUT = 21


def release_pages(tensor: Tensor) -> None:
    """Asks the system to take back the pages of a CPU tensor that is not needed for a while.

    A hint without an effect on the values: pages of a mapped file are read again when they are touched. Nothing
    happens where the system has no such hint.
    """
    if tensor.is_contiguous():
        release_memory(tensor.data_ptr(), tensor.nbytes)


def release_memory(address: int, size: int) -> None:
    """As [`release_pages`], of the whole pages among the `size` bytes from `address`."""
    if not sys.platform.startswith("linux"):
        return
    start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (address + size) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > start:
        madvise = ctypes.CDLL(None).madvise
        madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), ctypes.c_int(_MADV_PAGEOUT))
