"""`eigen` from text to a codec that can be saved: fitted, brought to its goal, and measured on what was kept apart."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from math import isfinite
from numbers import Real

from eigencache.calibration.calibration_set import CalibrationSet
from eigencache.calibration.moments import MEMORY, Progress, silent
from eigencache.codec.eigen.codec import EigenCodec
from eigencache.codec.saved.card import Expected
from eigencache.codec.saved.live import LiveCardSettings
from eigencache.corpora.sequences import Sequences
from eigencache.errors import BudgetError
from eigencache.fitting.eigen import EigenSettings, fit_eigen
from eigencache.fitting.eigen_search import fit_target
from eigencache.fitting.heldout_score import CONTEXT, DEFAULT_MAX_NLL
from eigencache.fitting.live import LiveSettings, check_bits, fit_live
from eigencache.fitting.live_search import FittedLive, fit_live_target
from eigencache.fitting.provenance import FitProvenance, eigen_fitting_of
from eigencache.models.load import LoadedModel
from eigencache.records.provenance import Stopwatch


@dataclass(frozen=True)
class Goal:
    """What a codec has to reach: a size in bits per value, or a loss in nats per token."""

    bits: float | None = None
    max_nll: float | None = None

    @classmethod
    def of(cls, bits: float | None = None, ratio: float | None = None, max_nll: float | None = None) -> Goal:
        """Of one of the three, or of 0.01 nats where none is given. Raises `BudgetError` for several and for no numbers."""
        given = {name: x for name, x in (("bits", bits), ("ratio", ratio), ("max_nll", max_nll)) if x is not None}
        if len(given) > 1:
            raise BudgetError(f"{' and '.join(given)}: give one of bits, ratio and max_nll")
        for name, x in given.items():
            if not isinstance(x, Real):
                raise BudgetError(f"{name} {x!r}: must be a number, not a {type(x).__name__}")
            if not (isfinite(x) and x > 0):
                raise BudgetError(f"{name} {x:g}: must be a number above 0")
        if ratio is not None:
            return cls(bits=16 / ratio)
        return cls(bits, None if bits else max_nll or DEFAULT_MAX_NLL)


@dataclass(frozen=True)
class LiveGoal:
    """What the codec of a live cache has to reach: bits per packed value, a loss, or safety; by default 0.01 nats."""

    bits: float | None = None
    max_nll: float | None = None
    safe: bool = False
    settings: LiveSettings = field(default_factory=LiveSettings)

    def __post_init__(self) -> None:
        """Raises `BudgetError` for several goals at once, and for bits that no widths give."""
        if sum((self.bits is not None, self.max_nll is not None, self.safe)) > 1:
            raise BudgetError("a live cache is fitted for one of bits, a loss and safety, not for several")
        if self.bits is not None:
            check_bits(self.bits)


@dataclass(frozen=True, eq=False)
class FitResult:
    """A codec, and what is saved beside it."""

    codec: EigenCodec
    expected: Expected
    fitting: FitProvenance
    live: FittedLive | None = None
    live_fitting: FitProvenance | None = None


def fit_codec(
    loaded: LoadedModel,
    sequences: Sequences,
    settings: EigenSettings,
    goal: Goal,
    *,
    context: int = CONTEXT,
    batch_size: int = 8,
    memory: int = MEMORY,
    seed: int = 0,
    live: LiveGoal | None = None,
    on_progress: Progress = silent,
) -> FitResult:
    """Fit, find the step, and measure size and loss on the sequences kept apart. Raises what the parts raise.

    With `live` also a codec of the live cache, from the same vectors and metric.
    """
    watch = Stopwatch()
    source = CalibrationSet(loaded, sequences, memory, batch_size, on_progress)
    fit = fit_eigen(loaded, sequences, settings, source=source, on_progress=on_progress)
    codec, expected = fit_target(
        fit, loaded, bits=goal.bits, max_nll=goal.max_nll, context=context, batch_size=batch_size, on_progress=on_progress
    )
    run = watch.run(seed, {"batch_size": batch_size})
    fitting = eigen_fitting_of(settings, expected, loaded, sequences, run)
    if live is None:
        return FitResult(codec, expected, fitting)
    goal_of = {"bits": live.bits, "max_nll": live.max_nll, "safe": live.safe}
    own = fit_live(source, live.settings)
    found = fit_live_target(
        own,
        loaded,
        source.apart,
        context=context,
        batch_size=batch_size,
        on_progress=on_progress,
        **goal_of,  # type: ignore[arg-type]
    )
    about = LiveCardSettings(**asdict(own.settings))
    return FitResult(codec, expected, fitting, found, fitting._replace(settings=about, expected=found.expected))
