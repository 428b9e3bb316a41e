"""The C library's heap, on Linux with glibc, from which an operation on a CPU takes the memory for its results."""

import ctypes
import functools
import mmap
from pathlib import Path

RESERVE = 2**31
"""Bytes of addresses that the heap is given at once, to have them in huge pages. Memory is taken when it is used."""

LARGEST_PAGE = 2**21
"""Bytes of a huge page that is worth asking for; some Arm systems have 512 MiB, of which a small tensor would take a whole one."""

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -2, -3, -4  # of glibc's malloc.h
_NEVER, _DEFAULT_MMAP_MAX, _PADDING = -1, 65536, 2**26


@functools.cache
def retain() -> None:
    """
    Have the heap keep what a step has freed for the next one, in huge pages where the system has some on request alone.

    Otherwise it would be handed back and faulted in again, and a processor would look up where each 4 KiB of it lies. Tensors of
    any size are kept, up to `RESERVE` in all, until `release`; without huge pages on request those below 32 MiB.

    Holds for the whole process; does nothing where the C library is another one. To be called from the main thread, since other
    threads take their memory elsewhere.
    """
    if (libc := _glibc()) is None:
        return
    for parameter, value in ((_M_TRIM_THRESHOLD, _NEVER), (_M_MMAP_THRESHOLD, 2**25), (_M_TOP_PAD, _PADDING)):
        libc.mallopt(parameter, value)
    _reserve(libc)


def release() -> None:
    """Hand back to the system what the heap has kept and nothing uses any more; it goes on keeping what is freed later."""
    if (libc := _glibc()) is None:
        return
    libc.malloc_trim(0)
    if retain.cache_info().currsize:
        _reserve(libc)


def _reserve(libc: ctypes.CDLL) -> None:
    """Lengthen the heap by new addresses that ask for huge pages; not at all where that would be in vain."""
    if not offers_huge_pages():
        return
    try:  # with room for malloc's padding; a refusal within malloc would move this thread to another heap for good
        mmap.mmap(-1, RESERVE + 2 * _PADDING, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
    except OSError:
        return
    libc.mallopt(_M_MMAP_MAX, 0)  # from the heap alone
    end = libc.sbrk(0)
    libc.free(libc.malloc(RESERVE))
    libc.mallopt(_M_MMAP_MAX, _DEFAULT_MMAP_MAX)
    libc.madvise(end, libc.sbrk(0) - end, mmap.MADV_HUGEPAGE)


def offers_huge_pages(settings: Path = Path("/sys/kernel/mm/transparent_hugepage")) -> bool:
    """
    Whether the system has huge pages of a moderate size, for memory that asks for them alone.

    Args:
        settings: Where Linux tells it.
    """
    try:
        on_request = "[madvise]" in (settings / "enabled").read_text()
        return on_request and int((settings / "hpage_pmd_size").read_text()) <= LARGEST_PAGE
    except (OSError, ValueError):
        return False


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
