"""Fit codecs from a text: fit the transform, find the step or the rate, and measure size and loss on held-out text."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from math import isfinite
from numbers import Real
from pathlib import Path

from eigencache.calibration.calibration_set import CalibrationSet
from eigencache.calibration.kept_measurements import KeptMeasurements
from eigencache.calibration.session import Session
from eigencache.codec.eigen.codec import EigenCodec
from eigencache.codec.saved.live import LiveCardSettings
from eigencache.corpora.sequences import Sequences
from eigencache.errors import BudgetError
from eigencache.fitting.eigen import EigenSettings, fit_eigen
from eigencache.fitting.eigen_search import fit_target
from eigencache.fitting.fit_memory import fit_memory
from eigencache.fitting.heldout_score import CONTEXT, DEFAULT_MAX_NLL
from eigencache.fitting.limits import check_packed_block
from eigencache.fitting.live import VECTORS, LiveFit, LiveSettings, check_bits, fit_live
from eigencache.fitting.live_search import FittedLive, fit_live_target
from eigencache.fitting.provenance import FitProvenance, eigen_fitting_of, live_fitting_of
from eigencache.records.fit import Expected
from eigencache.records.provenance import Stopwatch
from eigencache.records.run import Run

LEAST_MAX_NLL = 1e-6  # nats per token; rounding of float32 logits changes the loss of a token by up to it


@dataclass(frozen=True)
class Goal:
    """The target of a codec: a size in bits per value, or a loss in nats per token."""

    bits: float | None = None
    max_nll: float | None = None

    @classmethod
    def of(cls, bits: float | None = None, ratio: float | None = None, max_nll: float | None = None) -> Goal:
        """Return the goal of one target, or of a loss of 0.01 nats per token where none is given.

        Args:
            bits: bits per value.
            ratio: bytes of the 16-bit cache over bytes of the compressed one.
            max_nll: largest ΔNLL and largest KL, in nats per token.

        Raises:
            BudgetError: several targets are given, or one is not a number above 0, is no smaller than 16 bits per value, or
                is a loss below `LEAST_MAX_NLL`.
        """
        given = {name: x for name, x in (("bits", bits), ("ratio", ratio), ("max_nll", max_nll)) if x is not None}
        if len(given) > 1:
            names = " and ".join(f"`{name}`" for name in given)
            raise BudgetError(f"{names} cannot be combined. Give only one of `bits`, `ratio` and `max_nll`.")
        for name, x in given.items():
            if not isinstance(x, Real):
                raise BudgetError(f"`{name}`={x!r} must be a number above 0, not a {type(x).__name__}.")
            if not (isfinite(x) and x > 0):
                raise BudgetError(f"`{name}`={x:g} must be a number above 0.")
            if name == "max_nll" and x < LEAST_MAX_NLL:
                raise BudgetError(
                    f"`max_nll`={x:g} nats is below {LEAST_MAX_NLL:g}, a loss that may be rounding. Use a larger `max_nll`."
                )
            if (name == "bits" and x >= 16) or (name == "ratio" and x <= 1):
                remedy = "bits below 16" if name == "bits" else "a ratio above 1"
                raise BudgetError(f"`{name}`={x:g} would not be smaller than the 16-bit cache. Use {remedy}.")
        if ratio is not None:
            return cls(bits=16 / ratio)
        return cls(bits, None if bits else max_nll or DEFAULT_MAX_NLL)


@dataclass(frozen=True)
class LiveGoal:
    """The target of a live codec; at most one of the first three is given, by default a loss of 0.01 nats per token.

    Args:
        bits: bits per packed value.
        max_nll: largest ΔNLL and largest KL, in nats per token.
        safe: take the codec of 6.9 bits per packed value.
        settings: settings of the fit.

    Raises:
        BudgetError: several targets are given, `bits` is not above 0 and at most 8, or `max_nll` is not a loss.
    """

    bits: float | None = None
    max_nll: float | None = None
    safe: bool = False
    settings: LiveSettings = field(default_factory=LiveSettings)

    def __post_init__(self) -> None:
        if sum((self.bits is not None, self.max_nll is not None, self.safe)) > 1:
            raise BudgetError(
                "The targets of a live codec cannot be combined. Give only one of `bits`, `max_nll` and `safe`."
            )
        if self.bits is not None:
            check_bits(self.bits)
        Goal.of(max_nll=self.max_nll)


@dataclass(frozen=True, eq=False)
class FitResult:
    """The fitted codecs, with the measurements and the provenance that are saved with them."""

    codec: EigenCodec | None
    expected: Expected | None
    fitting: FitProvenance | None
    live: FittedLive | None = None
    live_fitting: FitProvenance | None = None


def fit_codec(
    session: Session,
    sequences: Sequences,
    settings: EigenSettings,
    goal: Goal,
    *,
    context: int = CONTEXT,
    live: LiveGoal | None = None,
    partial: Path | None = None,
) -> FitResult:
    """Fit `eigen`, find its step, and measure its size and its loss on the held-out sequences.

    Args:
        session: the model and how it is run.
        sequences: the calibration text, of which the last eighth is held out.
        settings: settings of `eigen`.
        goal: the size or the loss to reach.
        context: context length, in tokens, at which a size is evaluated.
        live: the goal of a live codec to fit from the same vectors and metric as well.
        partial: folder that keeps metric and vectors, to resume from. Default: none.

    Raises:
        BudgetError: the goal cannot be reached.
        StatisticsError: too little text, or sequences too short for the live codec.
    """
    watch = Stopwatch()
    session.require_steady(sequences)
    if live is not None:
        check_packed_block(sequences, live.settings.least_exact)
    memory = fit_memory(session, sequences, settings)
    session.on_progress(memory.describe(), 0, 1)
    calibration = CalibrationSet(session, sequences, most_vectors=memory.sampled, kept=_kept(partial, session, sequences))
    fit = fit_eigen(calibration, settings)
    codec, expected = fit_target(fit, session, bits=goal.bits, max_nll=goal.max_nll, context=context)
    fitting = eigen_fitting_of(settings, expected, session.loaded, sequences, _run(watch, session))
    if live is None:
        return FitResult(codec, expected, fitting)
    fitted, live_fitting = _live(calibration, live, context, fitting)
    return FitResult(codec, expected, fitting, fitted, live_fitting)


def fit_live_codec(
    session: Session, sequences: Sequences, live: LiveGoal, *, context: int = CONTEXT, partial: Path | None = None
) -> FitResult:
    """Fit the live codec alone.

    Args:
        session: the model and how it is run.
        sequences: the calibration text, of which the last eighth is held out.
        live: the target of the codec, and the settings of the fit.
        context: context length, in tokens, at which the size is evaluated.
        partial: folder that keeps metric and vectors, to resume from. Default: none.

    Raises:
        BudgetError: the target cannot be reached.
        StatisticsError: too little text, or sequences too short.
    """
    watch = Stopwatch()
    check_packed_block(sequences, live.settings.least_exact)
    calibration = CalibrationSet(session, sequences, most_vectors=VECTORS, kept=_kept(partial, session, sequences))
    fit = fit_live(calibration, live.settings)
    fitted = _at_goal(fit, calibration, live, context)
    about = LiveCardSettings(**asdict(fit.settings))
    fitting = live_fitting_of(about, fitted.expected, session.loaded, sequences, _run(watch, session))
    return FitResult(None, None, None, fitted, fitting)


def _live(
    calibration: CalibrationSet, live: LiveGoal, context: int, fitting: FitProvenance
) -> tuple[FittedLive, FitProvenance]:
    fit = fit_live(calibration, live.settings)
    fitted = _at_goal(fit, calibration, live, context)
    return fitted, fitting._replace(settings=LiveCardSettings(**asdict(fit.settings)), expected=fitted.expected)


def _at_goal(fit: LiveFit, calibration: CalibrationSet, live: LiveGoal, context: int) -> FittedLive:
    goal = {"bits": live.bits, "max_nll": live.max_nll, "safe": live.safe}
    return fit_live_target(fit, calibration.session, calibration.held_out, context=context, **goal)  # type: ignore[arg-type]


def _kept(partial: Path | None, session: Session, sequences: Sequences) -> KeptMeasurements:
    key = {
        "model": session.loaded.sha256,
        "dtype": session.loaded.dtype_name,
        "device": str(session.loaded.device),
        "text": sequences.corpus.model_dump(),
        "batch": session.batch_size,
        "versions": {name: version(name) for name in ("eigencache", "torch", "transformers")},
    }
    return KeptMeasurements(partial, key)


def _run(watch: Stopwatch, session: Session) -> Run:
    return watch.run(session.seed, {"batch_size": session.batch_size})
