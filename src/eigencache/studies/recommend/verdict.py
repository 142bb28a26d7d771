"""Judge a probed model in minutes: measure the loss of low-rank caches and of codecs, and recommend one for each use.

PCA bases come from the moments of the probe, so the text is not read again for them. Losses are estimated from fewer tokens
and at fewer rates than in `sweep` and `recommend`. The recommendation reports their number.
"""

from eigencache.calibration.accumulator import WIDEST
from eigencache.calibration.metrics import Metrics
from eigencache.calibration.moments import CapturedMoments
from eigencache.calibration.session import Session
from eigencache.codec.pca import CoefficientBits
from eigencache.corpora.overlap import check_overlap
from eigencache.corpora.sequences import Sequences
from eigencache.errors import REFUSALS
from eigencache.fitting.live import SAFE
from eigencache.fitting.pca import PCACalibration
from eigencache.fitting.pca_settings import PCASettings, targets_of
from eigencache.models.load import LoadedModel
from eigencache.records.advice import Advice, Budget, CodecFamily
from eigencache.records.provenance import Stopwatch
from eigencache.records.quality import ReadingProtocol
from eigencache.studies.recommend.candidates import targets_and_scopes
from eigencache.studies.recommend.codecs import CodecSearch, measure_codecs
from eigencache.studies.recommend.commands import Recipe
from eigencache.studies.recommend.key_rounding import measure_keys
from eigencache.studies.recommend.pca import PCAResult
from eigencache.studies.recommend.recommend import CODEC_FAMILIES, assembled, chosen_in
from eigencache.studies.sweep import Plan, sweep_model

QUICK_METRIC_TOKENS, VECTORS = 4096, 10_240  # fewer than a fit by itself takes, to judge in minutes
TOLERANCE = 0.35  # of a rate of `eigen`: the rate that was reached is recorded, and hardly any step is fitted twice
SHARES, WORST = (0.5, 0.75), (0.5,)
RATES: dict[CodecFamily, tuple[float, ...]] = {"eigen": (0.5, 1, 2), "live": (2.5, 4, SAFE)}
QUANTIZED: tuple[tuple[CoefficientBits, tuple[float, ...]], ...] = ((8, (0.25, 0.5)), (4, (0.25, 0.5)))


def judge(session: Session, gathered: CapturedMoments, held_out: Sequences, budget: Budget, recipe: Recipe) -> Advice:
    """Score every family with three quarters of every sequence encoded, and recommend a setting for each use.

    Args:
        session: Model and settings to run it with.
        gathered: Moments of the probe, per head and, if the layers together are narrow enough, over all layers.
        held_out: Text to score.
        budget: Allowed loss.
        recipe: Names the commands that make the recommended codecs.

    Raises:
        CorpusError: `held_out` overlaps the probed text, or another error of `score_codecs`.
        StatisticsError: No family suits the model and the text.
    """
    watch, text = Stopwatch(), gathered.sequences
    protocol = ReadingProtocol(kind="prefix", length=held_out.corpus.max_length * 3 // 4)
    overlap = check_overlap(held_out.ids, text.ids, remedy="choose another `text` or `held_out`")
    metrics: dict[str, Metrics] = {}
    try:
        calibration = PCACalibration(session, text, gathered=gathered, metrics=metrics, metric_tokens=QUICK_METRIC_TOKENS)
        pca = _judged_pca(calibration, held_out, protocol, budget)
    except REFUSALS as error:
        pca = PCAResult(refusal=str(error))
    wanted = CodecSearch(
        text,
        held_out,
        None,
        budget,
        protocol,
        recipe,
        RATES,
        metrics,
        shared=True,
        most_vectors=VECTORS,
        metric_tokens=QUICK_METRIC_TOKENS,
        tolerance=TOLERANCE,
    )
    codecs = measure_codecs(session, wanted, CODEC_FAMILIES, {})
    return assembled(
        pca,
        codecs,
        recipe,
        None,
        subject=session.loaded.name,
        model=session.loaded.record("the cache itself"),
        budget=budget,
        protocol=protocol,
        calibration=text.corpus,
        choosing=held_out.corpus,
        stating=None,
        run=watch.run(session.seed, {"batch_size": session.batch_size}),
        warnings=[*held_out.corpus.warnings, *text.corpus.warnings, *([overlap] if overlap else [])],
    )


def _judged_pca(calibration: PCACalibration, held_out: Sequences, protocol: ReadingProtocol, budget: Budget) -> PCAResult:
    """Sweep a few ranks of every target, and choose the best of every target."""
    session = calibration.session
    record = sweep_model(session, held_out, calibration, verdict_plans(session.loaded), protocol)
    named, rotations = session.named("rounded keys"), calibration.rotations
    keys = measure_keys(named, held_out, calibration.sequences, rotations, protocol)
    return chosen_in(record, budget, keys)


def verdict_plans(loaded: LoadedModel) -> list[Plan]:
    """Return the plans of a verdict.

    They are every target per head in 16 bits, keys after RoPE about zero (the worst case), and the whole cache in 8 and 4
    bits in the widest scope that has a matrix of moments.
    """
    scopes = targets_and_scopes(loaded.geometry, WIDEST)
    plans = [Plan(PCASettings(target, "head", metric="fisher"), shares=SHARES) for target in targets_of(loaded)]
    if loaded.geometry.rope is not None and not loaded.geometry.mla:
        plans.append(Plan(PCASettings("k", "head", "post", centered=False), shares=WORST))
    whole = "latent" if loaded.geometry.mla else "kv"
    widest = PCASettings(whole, scopes[whole][-1], metric="fisher")
    return plans + [Plan(widest, bits, shares=shares) for bits, shares in QUANTIZED]
