"""Measure the cost of a study and describe its machine and versions, for the `run` of its record."""

import platform
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version

import numpy as np
import torch

from eigencache.records.run import Run

try:
    import resource
except ImportError:  # Windows
    resource = None


class Stopwatch:
    """Wall time of a study, and of its forward passes: the blocks inside `with watch:`."""

    def __init__(self) -> None:
        self.started = datetime.now(UTC).isoformat(timespec="seconds")
        self._began = time.perf_counter()
        self.inside = 0.0

    def __enter__(self) -> None:
        self._entered = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.inside += time.perf_counter() - self._entered

    def run(self, seed: int, settings: dict[str, str | int | float | bool | None]) -> Run:
        """Return the record of a run that ends now.

        Args:
            seed: Seed of the study.
            settings: Settings of the study.
        """
        return Run(
            eigencache=version("eigencache"),
            python=platform.python_version(),
            torch=torch.__version__,
            transformers=version("transformers"),
            numpy=np.__version__,
            machine=f"{platform.machine()}, {_device()}",
            seed=seed,
            settings=settings,
            started=self.started,
            wall_s=time.perf_counter() - self._began,
            forward_s=self.inside,
            peak_memory_mb=peak_memory_mb(),
        )


def peak_memory_mb() -> float:
    """Return the peak memory of this process in MB: on a GPU, of the memory allocated there; 0 on Windows."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if resource else 0
    return peak / 1e6 if sys.platform == "darwin" else peak / 1e3


def _device() -> str:
    if torch.cuda.is_initialized():
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads"
