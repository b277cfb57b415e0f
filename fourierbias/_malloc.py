"""glibc's allocator, told to keep the memory it has: large temporaries are otherwise mapped anew each time.

With the default thresholds every large tensor is mapped, faulted in page by page and unmapped again, which
costs a convolutional network a third of its time on a CPU.  Only the command line calls this: a library
must not change the allocator of the program that imports it.
"""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8


def keep_memory() -> bool:
    """Have malloc reuse freed memory instead of returning it to the system; False where it is not glibc's."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    # No block of its own mapping, no trimming (-1 is the largest size_t), growth in steps of 256 MiB, and one
    # arena, or each thread that decodes images would come to keep memory of its own.
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, 256 << 20), (_M_ARENA_MAX, 1))
    return all(mallopt(name, value) == 1 for name, value in settings)
