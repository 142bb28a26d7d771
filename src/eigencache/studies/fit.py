"""`eigen` from text to a codec that can be saved: fitted, brought to its goal, and measured on what was kept apart."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from math import isfinite
from numbers import Real

from eigencache.codec.card import Expected, LiveCardSettings
from eigencache.codec.eigen import EigenCodec
from eigencache.corpora.sequences import Sequences
from eigencache.errors import BudgetError
from eigencache.models.load import LoadedModel
from eigencache.provenance import Stopwatch
from eigencache.studies.eigen_fit import EigenSettings, fit_eigen
from eigencache.studies.eigen_targets import CONTEXT, DEFAULT_MAX_NLL, fit_target
from eigencache.studies.fitting import Fitting, eigen_fitting_of
from eigencache.studies.gather import MEMORY, Progress, silent
from eigencache.studies.live_fit import LiveSettings, check_bits, fit_live
from eigencache.studies.live_targets import FittedLive, fit_live_target
from eigencache.studies.source import Source


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
class FittedCodec:
    """A codec, and what is saved beside it."""

    codec: EigenCodec
    expected: Expected
    fitting: Fitting
    live: FittedLive | None = None
    live_fitting: Fitting | None = None


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
) -> FittedCodec:
    """Fit, find the step, and measure size and loss on the sequences kept apart. Raises what the parts raise.

    With `live` also a codec of the live cache, from the same vectors and metric.
    """
    watch = Stopwatch()
    source = Source(loaded, sequences, memory, batch_size, on_progress)
    fit = fit_eigen(loaded, sequences, settings, source=source, on_progress=on_progress)
    codec, expected = fit_target(
        fit, loaded, bits=goal.bits, max_nll=goal.max_nll, context=context, batch_size=batch_size, on_progress=on_progress
    )
    run = watch.run(seed, {"batch_size": batch_size})
    fitting = eigen_fitting_of(settings, expected, loaded, sequences, run)
    if live is None:
        return FittedCodec(codec, expected, fitting)
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
    return FittedCodec(codec, expected, fitting, found, fitting._replace(settings=about, expected=found.expected))
