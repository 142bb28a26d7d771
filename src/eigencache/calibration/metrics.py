"""Error metrics: the cost of an error in a cached vector. Each is registered in a file `*_metric.py` of this package."""

import difflib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module

from torch import Tensor

import eigencache.calibration
from eigencache.calibration.session import Session
from eigencache.corpora.sequences import Sequences
from eigencache.errors import StatisticsError
from eigencache.spectral.rope import Rotation

FROBENIUS = "frobenius"  # all numbers have the same weight, so nothing is measured
METRIC_TOKENS = 8192  # tokens a metric is measured on; on SmolLM2-135M, 16,384 gave the same KL and 2,048 a fifth more
Metrics = dict[str, dict[int, Tensor]]  # tensor name → layer → [heads, dim, dim] float64
Measure = Callable[[Session, Sequences, dict[int, Rotation]], Metrics]
_MEASURES: dict[str, "Metric"] = {}


@dataclass(frozen=True)
class Metric:
    """A registered metric.

    Args:
        measure: returns one matrix M per KV head, layer and frame. An error e costs eᵀ M e, up to a factor.
        common_scale: whether costs of different layers, and of keys and values, can be compared. Where they cannot, a codec
            of all layers scales every matrix to the trace of the Fisher metric (THEORY 4).
    """

    measure: Measure
    common_scale: bool


def metric(name: str, *, common_scale: bool) -> Callable[[Measure], Measure]:
    """Register a function as the metric `name`."""

    def register(measure: Measure) -> Measure:
        _MEASURES[name] = Metric(measure, common_scale)
        return measure

    return register


def metric_names() -> list[str]:
    """Return the names of all metrics, `frobenius` first."""
    _register_all()
    return [FROBENIUS, *sorted(_MEASURES)]


def check_metric(name: str) -> str:
    """Return `name`, or raise `StatisticsError` if no metric has this name."""
    known = metric_names()
    if name in known:
        return name
    close = difflib.get_close_matches(name, known, n=1)
    guess = f" Did you mean {close[0]}?" if close else ""
    raise StatisticsError(f"`metric` {name} does not exist. Use one of {', '.join(known)}.{guess}")


def metric_named(name: str) -> Metric:
    """Return a registered metric. Raise `StatisticsError` for an unknown name and for `frobenius`, which has no matrix."""
    check_metric(name)
    if name == FROBENIUS:
        raise StatisticsError("`metric` frobenius weighs all numbers alike and has no matrix to measure.")
    return _MEASURES[name]


def spread_out(sequences: Sequences, tokens: int) -> Sequences:
    """Return sequences evenly spaced over the text, with about `tokens` tokens: metrics need less text than bases."""
    step = max(1, sequences.corpus.tokens // tokens)
    return replace(sequences, ids=sequences.ids[::step])


@cache
def _register_all() -> None:
    for module in pkgutil.iter_modules(eigencache.calibration.__path__):
        if module.name.endswith("_metric"):
            import_module(f"eigencache.calibration.{module.name}")
