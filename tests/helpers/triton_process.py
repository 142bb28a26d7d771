"""Where Triton's kernels run in tests: on a GPU where there is one, else in a process in which Triton interprets."""

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Run = Callable[..., Any]


@contextmanager
def triton_process() -> Iterator[Run]:
    """Calls a function where the kernels run. Triton reads the variable when imported: hence a process of its own."""
    if DEVICE.type == "cuda":
        yield lambda function, *args, **kwargs: function(*args, **kwargs)
        return
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            pool.submit(abs, 0).result()  # the process begins here
        yield lambda function, *args, **kwargs: pool.submit(function, *args, **kwargs).result()
