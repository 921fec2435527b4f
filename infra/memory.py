"""Memory that a process frees and needs again at once."""

import ctypes
from contextlib import suppress

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of mallopt(3)
_LARGEST = 32 << 20  # glibc takes no more


def keep_freed_memory(kept: int = 512 << 20) -> None:
    """Have the C library keep up to ``kept`` bytes that were freed, where it is glibc.

    By default it hands a freed tensor's pages back to the system, and the next tensor of that size has to fault them in
    again one by one: over half the time of an elementwise operation on 8 x 49,152 numbers.
    """
    with suppress(AttributeError):  # another C library
        library = ctypes.CDLL(None)
        library.mallopt(_MMAP_THRESHOLD, _LARGEST)
        library.mallopt(_TRIM_THRESHOLD, kept)
