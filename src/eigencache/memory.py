"""Memory of the process: what is free, a bound of the largest tensors, and the return of what is free to the system."""

import ctypes
import functools
import sys
from collections.abc import Callable
from pathlib import Path

import psutil

LOGITS = 2**25  # logits made at a time, 128 MiB in float32: with a large vocabulary they are the largest tensors
SHARE = 0.6  # of the free memory that a run may take by default
_LIMITS = (  # limit and use of a container, in the two versions of control groups
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def free_memory() -> int:
    """Return the bytes that this process can still take: what the machine has free, or less where a container limits it."""
    free = [psutil.virtual_memory().available]
    for limit, use in _LIMITS:
        try:
            free.append(int(Path(limit).read_text()) - int(Path(use).read_text()))
        except (OSError, ValueError):  # no such control group, or no limit: "max"
            continue
    return max(0, min(free))


def default_memory() -> int:
    """Return the bytes that a run may take by default: 60 % of what is free now."""
    return int(SHARE * free_memory())


def release() -> None:
    """Return freed memory to the operating system, where its C library can.

    The allocator of glibc keeps what a forward or backward pass has freed, in pieces that the next pass cannot use. Called
    after every batch, this halves the peak of a fit and costs milliseconds.
    """
    _trim()(0)


@functools.cache
def _trim() -> Callable[[int], object]:
    """Return `malloc_trim` of glibc, or a function that does nothing."""
    if sys.platform == "linux":
        try:
            return ctypes.CDLL(None).malloc_trim
        except (OSError, AttributeError):  # another C library, such as musl
            pass
    return lambda _: None
