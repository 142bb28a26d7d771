"""Which ways of compressing are tried: a coarse pass over all of them, then a finer one around the budget.

The coarse pass is ranked by KL, which is never negative and needs far fewer tokens than ΔNLL for the same precision; for
a model that predicts well both are alike. Only the finer pass, by ΔNLL and its interval, chooses.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise

from eigencache.calibration.accumulator import MAX_WIDTH
from eigencache.calibration.metrics import FROBENIUS
from eigencache.codec.pca import CoefficientBits
from eigencache.errors import StatisticsError
from eigencache.fitting.pca import PCACalibration, PCASettings, Target
from eigencache.geometry import KVGeometry
from eigencache.records.base import Scope
from eigencache.records.quality import SweepRecord, SweepSeries
from eigencache.studies.sweep import Plan

METRICS = ("fisher", FROBENIUS)
_MARGIN = 0.5  # of the budget: what the KL of the finer pass aims at, so that intervals have room


@dataclass(frozen=True)
class Search:
    """How much is tried; the defaults are some minutes for a small model on two cores."""

    coarse_shares: tuple[float, ...] = (1 / 16, 1 / 6, 2 / 5, 3 / 4)  # of the full rank
    coarse_bits: CoefficientBits = 8
    coarse_sequences: int = 6
    fine: tuple[tuple[CoefficientBits, tuple[float, ...]], ...] = (  # bits and multiples of the rank that is aimed at
        (8, (0.5, 0.7, 1)),
        (4, (0.5, 0.7, 1, 1.4)),
        (16, (0.7,)),
    )


def targets_and_scopes(geometry: KVGeometry) -> tuple[dict[Target, tuple[Scope, ...]], list[str]]:
    """The scopes worth trying for every target, and what is left out, with the reason.

    `layer` is left out where a layer has one head, because it is `head`; `all` where the layers together are too wide.
    """
    layers = [layer for layer in geometry.layers if layer.cached]
    widths: dict[Target, list[int]]
    if geometry.mla:
        latents = [layer.mla for layer in layers if layer.mla]
        widths = {
            "latent": [sum(mla.kv_lora_rank for mla in latents)],
            "key_rope": [sum(mla.qk_rope_head_dim for mla in latents)],
        }
        one_head = True
    else:
        k = sum(layer.num_key_value_heads * layer.head_dim for layer in layers)
        v = sum(layer.num_key_value_heads * layer.v_head_dim for layer in layers)
        widths = {"v": [v], "k": [k], "kv": [k, v]}
        one_head = all(layer.num_key_value_heads == 1 for layer in layers)
    found: dict[Target, tuple[Scope, ...]] = {}
    left_out: list[str] = []
    for target, wide in widths.items():
        scopes: list[Scope] = ["head"] if one_head else ["head", "layer"]
        if max(wide) <= MAX_WIDTH:
            scopes.append("all")
        else:
            left_out.append(f"{target}, all layers in one basis: {max(wide):,} dimensions are more than {MAX_WIDTH:,}")
        found[target] = tuple(scopes)
    return found, left_out


def coarse_plans(geometry: KVGeometry, calibration: PCACalibration, search: Search) -> tuple[list[Plan], list[str]]:
    """Every target, scope and metric at a few ranks, and what the calibration text cannot carry, with the reason.

    Keys are taken before rotation; after it once, for comparison. Raises `StatisticsError` where no basis can be fitted.
    """
    wanted, left_out = targets_and_scopes(geometry)
    settings = [
        PCASettings(target, scope, metric=metric)
        for target, scopes in wanted.items()
        for scope in scopes
        for metric in METRICS
    ]
    if geometry.rope is not None and not geometry.mla:
        settings.append(PCASettings("k", "head", "post", METRICS[0]))
    plans = []
    for one in settings:
        try:
            width = full_rank(calibration, one)
        except StatisticsError as error:
            left_out.append(f"{one.describe()}: {error}")
            continue
        plans.append(Plan(one, search.coarse_bits, _ranks(width, (share * width for share in search.coarse_shares))))
    if not plans:
        raise StatisticsError(left_out[-1])
    return plans, left_out


def fine_plans(coarse: SweepRecord, budget_nats: float, search: Search) -> list[Plan]:
    """The best series of every target and the runner-up of all, in finer steps, and full rank in 8 bits.

    The best: the largest ratio at the rank where the KL is expected to be half of the budget.
    """
    aim = _MARGIN * budget_nats
    promising = sorted(coarse.series, key=lambda s: _promise(s, aim), reverse=True)
    best: dict[str, SweepSeries] = {}
    for series in promising:
        best.setdefault(series.target, series)
    taken = list(best.values())
    taken += [series for series in promising if series not in taken][:1]
    plans: list[Plan] = []
    for series in taken:
        rank = rank_for(series, aim)
        for bits, multiples in search.fine:
            plans.append(Plan(settings_of(series), bits, _ranks(series.width, (rank * m for m in multiples))))
    for whole in coarse.series:  # none where the text could not carry a basis of every head
        if whole.target in ("kv", "latent") and whole.scope == "head":
            plans.append(Plan(replace(settings_of(whole), metric="frobenius"), 8, (whole.width,)))
    return merged(plans)


def merged(plans: list[Plan]) -> list[Plan]:
    """Plans that differ in their ranks alone become one."""
    ranks: dict[tuple[PCASettings, CoefficientBits], list[int | None]] = {}
    for plan in plans:
        ranks.setdefault((plan.settings, plan.bits), []).extend(plan.ranks or ())
    return [Plan(settings, bits, tuple(dict.fromkeys(found))) for (settings, bits), found in ranks.items()]


def settings_of(series: SweepSeries) -> PCASettings:
    """The settings that a series was measured with."""
    fields = ("target", "scope", "frame", "metric", "centered", "alpha", "basis", "sinks")
    return PCASettings(**{field: getattr(series, field) for field in fields})


def full_rank(calibration: PCACalibration, settings: PCASettings) -> int:
    """Coefficients of the widest group. Raises what `fit` raises."""
    return max(group.transform.rank for group in calibration.fit(settings).groups)


def rank_for(series: SweepSeries, nats: float) -> float:
    """The rank at which the KL is expected to be `nats`: between the points by straight lines of logarithms."""
    points = [(math.log(point.rank), math.log(max(point.quality.kl, 1e-9))) for point in series.points]
    aim = math.log(max(nats, 1e-9))
    if points[0][1] <= aim:
        return series.points[0].rank
    for (x0, y0), (x1, y1) in pairwise(points):
        if y1 <= aim < y0:
            return math.exp(x0 + (x1 - x0) * (y0 - aim) / (y0 - y1))
    return series.width


def _promise(series: SweepSeries, aim: float) -> tuple[bool, float]:
    """Whether the aim was reached at all, and the ratio of K+V that is expected at that rank."""
    rank, point = rank_for(series, aim), series.points[-1]
    held, whole = point.quality.encoded_nbytes, point.quality.sixteen_bit_nbytes
    coefficients = _coefficient_nbytes(series)
    expected = held + coefficients * (rank - point.rank)
    return min(p.quality.kl for p in series.points) <= aim, whole / max(expected, 1)


def _coefficient_nbytes(series: SweepSeries) -> float:
    """Bytes that one rank more costs, over all that was encoded."""
    first, last = series.points[0], series.points[-1]
    if first.rank == last.rank:
        return 0.0
    return (last.quality.encoded_nbytes - first.quality.encoded_nbytes) / (last.rank - first.rank)


def _ranks(width: int, wanted: Iterable[float]) -> tuple[int, ...]:
    return tuple(sorted({min(width, max(1, round(rank))) for rank in wanted}))
