"""The C library's heap, on Linux with glibc, from which an operation on a CPU takes the memory for its results."""

import ctypes
import functools
import mmap

RESERVE = 2**31
"""Bytes of addresses that the heap is given at once. Nothing is taken from the system before it is used."""

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -2, -3, -4  # of glibc's malloc.h
_NEVER, _DEFAULT_MMAP_MAX = -1, 65536


@functools.cache
def retain() -> None:
    """
    Have the heap keep what a step has freed for the next one, in huge pages where the system has some on request.

    Otherwise it would be handed back and faulted in again, and a processor would look up where each 4 KiB of it lie.

    Holds for the whole process; does nothing where the C library is another one.
    """
    if (libc := _glibc()) is None:
        return
    for parameter, value in ((_M_TRIM_THRESHOLD, _NEVER), (_M_MMAP_THRESHOLD, 2**25), (_M_TOP_PAD, 2**26)):
        libc.mallopt(parameter, value)
    _reserve(libc)


def release() -> None:
    """Hand back to the system what the heap has kept and nothing uses any more."""
    libc = _glibc()
    if libc is not None and retain.cache_info().currsize:
        libc.malloc_trim(0)
        _reserve(libc)


def _reserve(libc: ctypes.CDLL) -> None:
    """Lengthen the heap by new addresses that ask for huge pages."""
    libc.mallopt(_M_MMAP_MAX, 0)  # from the heap alone
    end = libc.sbrk(0)
    libc.free(libc.malloc(RESERVE))  # None where so much is not to be had, which changes nothing
    libc.mallopt(_M_MMAP_MAX, _DEFAULT_MMAP_MAX)
    libc.madvise(end, libc.sbrk(0) - end, mmap.MADV_HUGEPAGE)  # advice, which a system without huge pages refuses


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    """Its functions, told what they take and give; None if the C library is another one."""
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt.argtypes = [ctypes.c_int, ctypes.c_int]
        libc.malloc_trim.argtypes = [ctypes.c_size_t]
        libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
        libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
        libc.sbrk.restype, libc.sbrk.argtypes = ctypes.c_void_p, [ctypes.c_ssize_t]
        libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    except (OSError, AttributeError, TypeError):
        return None
    return libc if hasattr(mmap, "MADV_HUGEPAGE") else None
