"""Judge a probed model in under a minute: measure the loss of low-rank caches and recommend a setting.

The bases come from the moments of the probe, so the text is not read again. Losses are estimated from fewer tokens
than in `sweep` and `recommend`. The recommendation reports their number.
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

SHARES = (0.25, 0.5, 0.75)
QUANTIZED: tuple[tuple[CoefficientBits, tuple[float, ...]], ...] = ((8, (0.125, 0.25, 0.5)), (4, (0.25, 0.5)))


def judge(session: Session, gathered: CapturedMoments, held_out: Sequences, budget: Budget) -> Advice:
    """Sweep a few ranks of every target with three quarters of every sequence encoded, and recommend a setting.

    Args:
        session: Model and settings to run it with.
        gathered: Moments of the probe, per head and, if the layers together are narrow enough, over all layers.
        held_out: Text to score.
        budget: Allowed loss.

    Raises:
        CorpusError: `held_out` overlaps the probed text, or another error of `sweep_model`.
    """
    calibration = PCACalibration(session, gathered.sequences, gathered=gathered)
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
    """Return the plans of a verdict.

    They are every target per head in 16 bits, keys after RoPE about zero (the worst case), and the whole cache in its
    widest scope in 8 and 4 bits.
    """
    scopes, _ = targets_and_scopes(loaded.geometry)
    plans = [Plan(PCASettings(target, "head", metric="fisher"), shares=SHARES) for target in targets_of(loaded)]
    if loaded.geometry.rope is not None and not loaded.geometry.mla:
        plans.append(Plan(PCASettings("k", "head", "post", centered=False), shares=SHARES))
    whole = "latent" if loaded.geometry.mla else "kv"
    widest = PCASettings(whole, scopes[whole][-1], metric="fisher")
    return plans + [Plan(widest, bits, shares=shares) for bits, shares in QUANTIZED]
