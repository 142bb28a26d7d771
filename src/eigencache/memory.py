"""Memory of the process: a bound of the largest tensors, and the return of what is free to the operating system."""

import ctypes
import functools
import sys
from collections.abc import Callable

LOGITS = 2**25  # logits made at a time, 128 MiB in float32: with a large vocabulary they are the largest tensors


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
