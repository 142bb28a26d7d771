"""Methods at equal loss: each at several operating points, scored on the same text behind the same prefixes.

The first tokens of every sequence are held by a method, all bytes counted, and the rest is scored through what it gives
back. Methods are fitted anew for every calibration seed, which chooses the sequences they are fitted on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from eigencache.calibration.session import Session
from eigencache.codec.base import Compressor
from eigencache.codec.placement import placed
from eigencache.corpora.overlap import check_overlap
from eigencache.corpora.sequences import Sequences
from eigencache.errors import CodecError, UnsupportedArchitectureError
from eigencache.evaluate.codec_scoring import score_codecs
from eigencache.evaluate.divergence import measure_divergence
from eigencache.evaluate.prefix import check_positions
from eigencache.evaluate.resume import ResumableResults
from eigencache.evaluate.retrieval import evaluate_retrieval
from eigencache.records.bench import BenchPoint, BenchRecord, EqualLoss
from eigencache.records.frontier import Curve, crossing, missing
from eigencache.records.provenance import Stopwatch
from eigencache.records.quality import Divergence, ReadingProtocol, Retrieval
from eigencache.studies.bench.context import RATES, BenchContext
from eigencache.studies.bench.methods import METHODS

LOSSES = (0.003, 0.01, 0.03, 0.1)  # nats
COMPARABLE = 0.03  # nats of KL: the cheapest point of a method within it is also looked at in generation and retrieval
_GENERATED = 0  # in place of a context: the line of generation and retrieval


@dataclass(frozen=True)
class BenchSettings:
    """What is compared and how."""

    methods: tuple[str, ...]
    rates: tuple[float, ...] = RATES  # bits per value of methods that take any
    seeds: tuple[int, ...] = (0, 1, 2)
    scored: int = 128  # tokens behind the prefix
    step: int = 0  # of which so many are read at a time, all before them held; 0: all
    tasks: tuple[str, ...] = ()
    prompts: int = 0
    examples: int = 16


def bench_model(
    session: Session,
    calibration: Sequences,
    tokens: int,
    held_out: Mapping[int, Sequences],
    settings: BenchSettings,
    *,
    force: bool = False,
    partial: Path | None = None,
) -> BenchRecord:
    """Fit on `tokens` of `calibration` for every seed, score on `held_out` (context → sequences of context + scored).

    `partial`: where results are kept while it runs, a line per seed and context. Raises what fitting and scoring raise,
    `CorpusError` for texts that overlap, and `ModelError` where the model has too few positions for one.
    """
    watch = Stopwatch()
    check_positions(session.loaded, max(text.corpus.max_length for text in held_out.values()))
    overlaps = [check_overlap(text.ids, calibration.ids, force=force) for text in held_out.values()]
    refused = {m: why for m in settings.methods if (why := METHODS[m].refuses(session.loaded))}
    methods = [m for m in settings.methods if m not in refused]
    texts = [text.corpus.model_dump() for text in (calibration, *held_out.values())]
    kept = ResumableResults(
        partial, {"model": session.loaded.sha256, "texts": texts, "tokens": tokens, "settings": repr(settings)}
    )
    first, (shortest, *longer) = settings.seeds[0], sorted(held_out)
    generated = [_GENERATED] if settings.prompts or settings.tasks else []
    for seed in settings.seeds:
        wanted = [shortest, *(generated if seed == first else ()), *longer]
        done = {one["context"]: one for one in kept.done if one["seed"] == seed}
        if not (open_ := [context for context in wanted if context not in done]):
            continue
        fitted_on = chosen(calibration, tokens, seed)
        seeded = replace(session, seed=seed)
        bench = BenchContext(seeded.named(f"seed {seed}"), fitted_on, settings.rates)
        codecs, unfit = _fitted(bench, [m for m in methods if METHODS[m].fitted or seed == first])
        for context in open_:
            if context == _GENERATED:
                text, scored = held_out[shortest], done[shortest]
                done[context] = _generated(seeded, text, codecs, scored, settings)
            else:
                named = seeded.named(f"seed {seed}, {context:,} tokens")
                done[context] = _scored(named, held_out[context], codecs, context, settings, fitted_on)
            kept.add(done[context] | {"refused": unfit})
    points = [BenchPoint(**point) for one in kept.done for point in one.get("points", ())]
    found, unfit = {p.method for p in points}, {m: why for one in kept.done for m, why in one.get("refused", {}).items()}
    refused |= {m: unfit.get(m, "it has no point at the bits asked for") for m in methods if m not in found}
    return BenchRecord(
        model=session.loaded.record("the cache itself"),
        corpora={context: text.corpus for context, text in held_out.items()},
        calibration=calibration.corpus,
        scored=settings.scored,
        step=settings.step,
        uncompressed_nll={one["context"]: one["nll"] for one in kept.done if "points" in one},
        refused=refused,
        points=points,
        equal_loss=_equal_losses(points, held_out, [m for m in methods if m in found]),
        divergence=[Divergence(**d) for one in kept.done for d in one.get("divergence", ())],
        retrieval=[Retrieval(**r) for one in kept.done for r in one.get("retrieval", ())],
        run=watch.run(settings.seeds[0], {"batch_size": session.batch_size, "calibration_tokens": tokens, "forced": force}),
        warnings=[w for w in (*calibration.corpus.warnings, *overlaps) if w],
    )


def chosen(text: Sequences, tokens: int, seed: int) -> Sequences:
    """About `tokens` tokens of a text, sequences drawn with a seed, in the text's order."""
    count = max(1, min(len(text.ids), tokens // text.corpus.max_length))
    rows = sorted(np.random.default_rng(seed).permutation(len(text.ids))[:count])
    return replace(text, ids=[text.ids[row] for row in rows])


def _fitted(bench: BenchContext, methods: Sequence[str]) -> tuple[dict[str, Mapping[str, Compressor]], dict[str, str]]:
    """Codecs of every method, and why some cannot be had of this model: what only fitting finds out."""
    codecs: dict[str, Mapping[str, Compressor]] = {}
    refused: dict[str, str] = {}
    for index, method in enumerate(methods):
        bench.session.on_progress(f"fitting {method}", index, len(methods))
        try:
            made = METHODS[method].codecs(bench)  # fitted on the CPU
            codecs[method] = {point: placed(codec, bench.session.loaded.device) for point, codec in made.items()}
        except (UnsupportedArchitectureError, CodecError) as error:
            refused[method] = str(error)
    return codecs, refused


def _scored(
    session: Session,
    sequences: Sequences,
    codecs: Mapping[str, Mapping[str, Compressor]],
    context: int,
    settings: BenchSettings,
    fitted_on: Sequences,
) -> dict[str, Any]:
    """The line of one seed and context."""
    flat = _flat(codecs)
    protocol = ReadingProtocol(kind="prefix", length=context, step=settings.step)
    scores = score_codecs(
        session,
        sequences,
        {f"{m} {p}": codec for (m, p), codec in flat.items()},
        protocol,
        calibration=fitted_on.corpus,
    )
    points = [
        BenchPoint(
            method=m,
            point=p,
            seed=session.seed,
            context=context,
            quality=scores.quality[f"{m} {p}"],
            excess=scores.excess[f"{m} {p}"],
        ).model_dump()
        for m, p in flat
    ]
    return {"seed": session.seed, "context": context, "nll": scores.uncompressed_nll, "points": points}


def _generated(
    session: Session,
    sequences: Sequences,
    codecs: Mapping[str, Mapping[str, Compressor]],
    scored: dict[str, Any],
    settings: BenchSettings,
) -> dict[str, Any]:
    """The line of generation and retrieval, of each method's cheapest point that diverges little."""
    context = scored["context"]
    points = [BenchPoint(**point) for point in scored["points"]]
    cheapest = {}
    for method in codecs:
        within = [p for p in points if p.method == method and p.quality.kl <= COMPARABLE]
        if within:
            best = min(within, key=lambda p: p.bits_per_value)
            cheapest[f"{method} {best.point}"] = codecs[method][best.point]
    found: dict[str, Any] = {"seed": session.seed, "context": _GENERATED}
    if settings.prompts:
        found["divergence"] = [
            one.model_dump()
            for one in measure_divergence(
                session,
                sequences,
                cheapest,
                prompts=settings.prompts,
                prompt_tokens=context + 1,  # the last one reads
            )
        ]
    if settings.tasks:
        found["retrieval"] = [
            one.model_dump()
            for one in evaluate_retrieval(
                session,
                cheapest,
                tasks=settings.tasks,
                lengths=(context + 1,),
                count=settings.examples,
            )
        ]
    return found


def _equal_losses(
    points: Sequence[BenchPoint], held_out: Mapping[int, Sequences], methods: Sequence[str]
) -> list[EqualLoss]:
    found = []
    for context in held_out:
        for method in methods:
            own = [p for p in points if p.method == method and p.context == context]
            seeds = sorted({p.seed for p in own})
            curves = [_curve([p for p in own if p.seed == seed]) for seed in seeds]
            for loss in LOSSES:
                each, bits, interval = crossing(curves, loss)
                why = next((missing(c, loss) for c, one in zip(curves, each, strict=True) if one is None), "")
                found.append(
                    EqualLoss(
                        method=method,
                        context=context,
                        delta_nll=loss,
                        bits_per_value=bits,
                        interval=interval,
                        by_seed=each,
                        why=why,
                    )
                )
    return found


def _curve(points: Sequence[BenchPoint]) -> Curve:
    excess = np.array([p.excess for p in points])
    tokens = np.full(excess.shape[1], points[0].quality.tokens / excess.shape[1])
    return Curve(np.array([p.bits_per_value for p in points]), excess, tokens)


def _flat(codecs: Mapping[str, Mapping[str, Compressor]]) -> dict[tuple[str, str], Compressor]:
    return {(method, point): codec for method, points in codecs.items() for point, codec in points.items()}
