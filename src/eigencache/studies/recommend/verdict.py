"""The verdict on a model that was probed: what low rank costs through its cache, and what to do, in well under a minute.

The bases come from the moments of the probe, so the text is not read again; metrics and scores rest on fewer tokens
than those of `sweep` and `recommend`, and the advice says how few.
"""

from eigencache.calibration.moments import CapturedMoments
from eigencache.calibration.session import Session
from eigencache.codec.pca import CoefficientBits
from eigencache.corpora.sequences import Sequences
from eigencache.fitting.pca import PCACalibration, PCASettings, targets_of
from eigencache.models.load import LoadedModel
from eigencache.records.advice import Advice, Budget
from eigencache.records.quality import ReadingProtocol
from eigencache.studies.recommend.candidates import targets_and_scopes
from eigencache.studies.recommend.key_rounding import measure_keys
from eigencache.studies.recommend.recommend import recommend_sweep
from eigencache.studies.sweep import Plan, sweep_model

METRIC_TOKENS = 8192
SHARES = (0.25, 0.5, 0.75)
QUANTIZED: tuple[tuple[CoefficientBits, tuple[float, ...]], ...] = ((8, (0.125, 0.25, 0.5)), (4, (0.25, 0.5)))


def judge(session: Session, gathered: CapturedMoments, held_out: Sequences, budget: Budget) -> Advice:
    """Sweep a few ranks of every target on `held_out`, three quarters of every sequence held encoded, and advise.

    `gathered`: moments per head and, where layers together are narrow enough, over all layers. Raises what
    `sweep_model` raises, `CorpusError` for a text that overlaps the one that was probed among it.
    """
    calibration = PCACalibration(
        session,
        gathered.sequences,
        gathered=gathered,
        metric_tokens=METRIC_TOKENS,
    )
    protocol = ReadingProtocol(kind="prefix", length=held_out.corpus.max_length * 3 // 4)
    record = sweep_model(
        session,
        held_out,
        calibration,
        verdict_plans(session.loaded),
        protocol,
    )
    keys = measure_keys(
        session.named("rounded keys"),
        held_out,
        gathered.sequences,
        calibration.rotations,
        protocol,
    )
    return recommend_sweep(record, budget, session.loaded.name, keys)


def verdict_plans(loaded: LoadedModel) -> list[Plan]:
    """Every target per head in 16 bits, keys at their worst, and the whole in its widest scope in 8 and 4 bits."""
    scopes, _ = targets_and_scopes(loaded.geometry)
    plans = [Plan(PCASettings(target, "head", metric="fisher"), shares=SHARES) for target in targets_of(loaded)]
    if loaded.geometry.rope is not None and not loaded.geometry.mla:
        plans.append(Plan(PCASettings("k", "head", "post", centered=False), shares=SHARES))
    whole = "latent" if loaded.geometry.mla else "kv"
    widest = PCASettings(whole, scopes[whole][-1], metric="fisher")
    return plans + [Plan(widest, bits, shares=shares) for bits, shares in QUANTIZED]
