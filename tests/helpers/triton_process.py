"""Run Triton kernels in tests: on a GPU if there is one, else in a process with Triton's interpreter."""

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
    """Yield a function that calls another one where the kernels run.

    Triton reads TRITON_INTERPRET when it is imported, so the interpreter needs a separate process.
    """
    if DEVICE.type == "cuda":
        yield lambda function, *args, **kwargs: function(*args, **kwargs)
        return
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            pool.submit(abs, 0).result()  # the process begins here
        yield lambda function, *args, **kwargs: pool.submit(function, *args, **kwargs).result()
