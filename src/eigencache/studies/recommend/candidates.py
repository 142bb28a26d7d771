"""Choose the compression settings to measure: a coarse pass over all of them, then a fine pass near the loss budget.

The coarse pass ranks settings by KL divergence, which is never negative and needs far fewer tokens than ΔNLL for the
same precision. For a model that predicts well, both are similar. The recommendation itself is chosen in the fine pass,
by ΔNLL and its confidence interval.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise

from eigencache.calibration.metrics import FROBENIUS
from eigencache.codec.pca import CoefficientBits
from eigencache.errors import StatisticsError
from eigencache.fitting.live import SAFE
from eigencache.fitting.pca import PCACalibration
from eigencache.fitting.pca_settings import PCASettings, Target
from eigencache.geometry import KVGeometry
from eigencache.records.advice import CodecFamily
from eigencache.records.base import Scope
from eigencache.records.quality import SweepRecord, SweepSeries
from eigencache.studies.sweep import Plan

METRICS = ("fisher", FROBENIUS)
_MARGIN = 0.5  # the fine pass aims at this fraction of the budget in KL, to leave room for confidence intervals


@dataclass(frozen=True)
class Search:
    """Extent of the search. The defaults take some minutes for a small model on two CPU cores.

    Args:
        coarse_shares: Ranks of the coarse pass, as fractions of the full rank.
        coarse_bits: Bits per coefficient in the coarse pass.
        coarse_sequences: Sequences scored in the coarse pass.
        fine: Pairs of bits per coefficient and ranks of the fine pass, as multiples of the expected rank (`rank_for`).
        rates: Rates of `eigen`, in bits per value at a context of 2,048 tokens, and of `live`, in bits per packed value.
    """

    coarse_shares: tuple[float, ...] = (1 / 16, 1 / 6, 2 / 5, 3 / 4)
    coarse_bits: CoefficientBits = 8
    coarse_sequences: int = 6
    fine: tuple[tuple[CoefficientBits, tuple[float, ...]], ...] = (
        (8, (0.5, 0.7, 1)),
        (4, (0.5, 0.7, 1, 1.4)),
        (16, (0.7,)),
    )
    rates: Mapping[CodecFamily, tuple[float, ...]] = field(
        default_factory=lambda: {"eigen": (0.25, 0.5, 1, 2), "live": (2, 2.5, 3.125, 4, SAFE)}
    )


def targets_and_scopes(geometry: KVGeometry, widest: int | None = None) -> dict[Target, tuple[Scope, ...]]:
    """Return the scopes to try for every target of a model, narrowest first.

    `layer` is skipped for layers with a single head, where it equals `head`.

    Args:
        geometry: Geometry of the model.
        widest: Most dimensions of scope `all`. Default: any number.
    """
    layers = [layer for layer in geometry.layers if layer.cached]
    widths: dict[Target, int]
    if geometry.mla:
        latents = [layer.mla for layer in layers if layer.mla]
        widths = {
            "latent": sum(mla.kv_lora_rank for mla in latents),
            "key_rope": sum(mla.qk_rope_head_dim for mla in latents),
        }
        one_head = True
    else:
        k = sum(layer.num_key_value_heads * layer.head_dim for layer in layers)
        v = sum(layer.num_key_value_heads * layer.v_head_dim for layer in layers)
        widths = {"v": v, "k": k, "kv": max(k, v)}
        one_head = all(layer.num_key_value_heads == 1 for layer in layers)
    narrow: tuple[Scope, ...] = ("head",) if one_head else ("head", "layer")
    return {t: (*narrow, "all") if widest is None or wide <= widest else narrow for t, wide in widths.items()}


def coarse_plans(geometry: KVGeometry, calibration: PCACalibration, search: Search) -> tuple[list[Plan], list[str]]:
    """Return plans for every target, scope and metric at a few ranks.

    Keys are compressed before rotation (RoPE). One more plan compresses them after it, for comparison.

    Args:
        geometry: Geometry of the model.
        calibration: Calibration that fits the bases.
        search: Extent of the search.

    Returns:
        Plans, and a sentence with the reason for every setting for which the calibration set is too small.

    Raises:
        StatisticsError: The calibration set is too small for every setting.
    """
    wanted, left_out = targets_and_scopes(geometry), []
    settings = [
        PCASettings(target, scope, metric=metric)
        for target, scopes in wanted.items()
        for scope in scopes
        for metric in METRICS
    ]
    if geometry.rope is not None and not geometry.mla:
        settings.append(PCASettings("k", "head", "post", METRICS[0]))
    plans = []
    for candidate in settings:
        try:
            width = full_rank(calibration, candidate)
        except StatisticsError as error:
            left_out.append(f"{candidate.describe()}: {error}")
            continue
        ranks = _ranks(width, (share * width for share in search.coarse_shares))
        plans.append(Plan(candidate, search.coarse_bits, ranks))
    if not plans:
        raise StatisticsError(left_out[-1])
    return plans, left_out


def fine_plans(coarse: SweepRecord, budget_nats: float, search: Search) -> list[Plan]:
    """Return plans with finer rank steps for the best coarse series of every target and the overall runner-up.

    The best series has the largest compression ratio at the rank where the expected KL is half the budget. One more plan
    measures full rank at 8 bits per coefficient.

    Args:
        coarse: Record of the coarse pass.
        budget_nats: Loss budget in nats per token.
        search: Extent of the search.
    """
    aim = _MARGIN * budget_nats
    promising = sorted(coarse.series, key=lambda s: _promise(s, aim), reverse=True)
    best: dict[str, SweepSeries] = {}
    for series in promising:
        best.setdefault(series.target, series)
    selected = list(best.values())
    selected += [series for series in promising if series not in selected][:1]
    plans: list[Plan] = []
    for series in selected:
        rank = rank_for(series, aim)
        for bits, multiples in search.fine:
            plans.append(Plan(settings_of(series), bits, _ranks(series.width, (rank * m for m in multiples))))
    for whole in coarse.series:  # no match if the calibration set was too small for a basis of every head
        if whole.target in ("kv", "latent") and whole.scope == "head":
            plans.append(Plan(replace(settings_of(whole), metric="frobenius"), 8, (whole.width,)))
    return merged(plans)


def merged(plans: list[Plan]) -> list[Plan]:
    """Merge plans that differ only in their ranks."""
    ranks: dict[tuple[PCASettings, CoefficientBits], list[int | None]] = {}
    for plan in plans:
        ranks.setdefault((plan.settings, plan.bits), []).extend(plan.ranks or ())
    return [Plan(settings, bits, tuple(dict.fromkeys(joined))) for (settings, bits), joined in ranks.items()]


def settings_of(series: SweepSeries) -> PCASettings:
    """Return the PCA settings of a series."""
    fields = ("target", "scope", "frame", "metric", "centered", "alpha", "basis", "sinks")
    return PCASettings(**{field: getattr(series, field) for field in fields})


def full_rank(calibration: PCACalibration, settings: PCASettings) -> int:
    """Return the number of coefficients of the widest group. Raises `StatisticsError` as `PCACalibration.fit` does."""
    return max(group.transform.rank for group in calibration.fit(settings).groups)


def rank_for(series: SweepSeries, nats: float) -> float:
    """Return the rank at which the KL is expected to be `nats`, by log-log interpolation between measured ranks."""
    points = [(math.log(point.rank), math.log(max(point.quality.kl, 1e-9))) for point in series.points]
    aim = math.log(max(nats, 1e-9))
    if points[0][1] <= aim:
        return series.points[0].rank
    for (x0, y0), (x1, y1) in pairwise(points):
        if y1 <= aim < y0:
            return math.exp(x0 + (x1 - x0) * (y0 - aim) / (y0 - y1))
    return series.width


def _promise(series: SweepSeries, aim: float) -> tuple[bool, float]:
    """Return whether the series reaches the KL `aim`, and its expected compression ratio of the whole cache there."""
    rank, point = rank_for(series, aim), series.points[-1]
    expected_nbytes = point.quality.encoded_nbytes + _coefficient_nbytes(series) * (rank - point.rank)
    reached = min(p.quality.kl for p in series.points) <= aim
    return reached, point.quality.sixteen_bit_nbytes / max(expected_nbytes, 1)


def _coefficient_nbytes(series: SweepSeries) -> float:
    """Return the bytes by which one more rank enlarges the encoded cache of all scored sequences."""
    first, last = series.points[0], series.points[-1]
    if first.rank == last.rank:
        return 0.0
    return (last.quality.encoded_nbytes - first.quality.encoded_nbytes) / (last.rank - first.rank)


def _ranks(width: int, wanted: Iterable[float]) -> tuple[int, ...]:
    return tuple(sorted({min(width, max(1, round(rank))) for rank in wanted}))
