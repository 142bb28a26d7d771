"""Work on several blocks at a time: the entropy coder releases the interpreter's lock, so threads run in parallel."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

_T = TypeVar("_T")
_U = TypeVar("_U")


def parallel(work: Callable[[_T], _U], items: Iterable[_T]) -> list[_U]:
    """Return `work(item)` for every item, in order, on as many threads as torch uses."""
    items, threads = list(items), torch.get_num_threads()
    if threads == 1 or len(items) < 2:
        return [work(item) for item in items]
    with ThreadPoolExecutor(min(threads, len(items))) as pool:
        return list(pool.map(work, items))
