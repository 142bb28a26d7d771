"""Benches with planted points and rates, and the cells of their tables by method and column."""

from eigencache.records.base import Interval
from eigencache.records.bench import BenchPoint, BenchRecord, EqualLoss
from eigencache.records.quality import Divergence, Retrieval
from eigencache.report.core.table import Table
from planted_sweeps import CORPUS, RUN, model, quality


def point(method: str, name: str, bits: float, delta: float, seed: int = 0, context: int = 384) -> BenchPoint:
    return BenchPoint(
        method=method,
        point=name,
        seed=seed,
        context=context,
        quality=quality(f"{method} {name}", 16 / bits, delta, 0.002),
        excess=[delta * 10] * 3,
    )


def equal(
    method: str, loss: float, bits: float | None, interval: Interval | None = None, why: str = "", context: int = 384
) -> EqualLoss:
    return EqualLoss(
        method=method,
        context=context,
        delta_nll=loss,
        bits_per_value=bits,
        interval=interval,
        by_seed=[bits],
        why=why,
    )


def bench(
    points: list[BenchPoint],
    found: list[EqualLoss],
    *,
    name: str = "planted-model",
    refused: dict[str, str] | None = None,
    warnings: list[str] | None = None,
    contexts: tuple[int, ...] = (384,),
    divergence: list[Divergence] | None = None,
    retrieval: list[Retrieval] | None = None,
) -> BenchRecord:
    return BenchRecord(
        model=model().model_copy(update={"name": name}),
        corpora=dict.fromkeys(contexts, CORPUS),
        calibration=CORPUS,
        scored=128,
        uncompressed_nll=dict.fromkeys(contexts, 2.5),
        refused=refused or {},
        points=points,
        equal_loss=found,
        divergence=divergence or [],
        retrieval=retrieval or [],
        run=RUN.model_copy(update={"settings": {"calibration_tokens": 65536}}),
        warnings=warnings or [],
    )


def planted(**options) -> BenchRecord:
    contexts = options.get("contexts", (384,))
    points = [
        point(method, f"{bits}", bits * factor, 0.05 / bits, seed, context)
        for context in contexts
        for method, factor in (("kvtc", 1.6), ("eigen", 1.0), ("int", 4.0))
        for bits in (0.5, 1, 2)
        for seed in ((0, 1) if method != "int" else (0,))
    ]
    found = [
        one
        for context in contexts
        for one in (
            equal("kvtc", 0.03, 2.5, (2.25, 2.777), context=context),
            equal("kvtc", 0.1, None, why="loses 0.0900 at its fewest, 0.8 bits", context=context),
            equal("eigen", 0.03, 1.25, None, context=context),
            equal("eigen", 0.1, 0.5, (0.4, 0.6), context=context),
            equal("int", 0.03, None, why="loses 0.0400 at its most, 8 bits", context=context),
            equal("int", 0.1, 4.0, context=context),
        )
    ]
    return bench(points, found, **options)


def cells(table: Table) -> dict[str, dict[str, str]]:
    return {row[0]: dict(zip(table.columns[1:], row[1:], strict=True)) for row in table.rows}
