"""Compare compression methods at equal loss, each at several operating points, on the same text and prefixes.

A method compresses the cached prefix of every sequence, and all stored bytes are counted. The rest of the sequence is
scored with the decompressed prefix. Methods are fitted again for every seed, which selects the calibration sequences.
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
COMPARABLE = 0.03  # nats of KL; generation and retrieval use the cheapest point of a method within it
_GENERATED = 0  # context that marks the results of generation and retrieval in the partial file


@dataclass(frozen=True)
class BenchSettings:
    """Methods and conditions of a benchmark.

    Args:
        methods: Names of methods (`METHODS`).
        rates: Bits per value to test for variable-rate methods.
        seeds: Calibration seeds.
        scored: Scored tokens after the prefix.
        step: Scored tokens per forward pass. All tokens before them are compressed. 0 reads them in one pass.
        tasks: Names of retrieval tasks. Default: none.
        prompts: Prompts for the divergence of generated text. 0 skips generation.
        examples: Examples per retrieval task.
    """

    methods: tuple[str, ...]
    rates: tuple[float, ...] = RATES
    seeds: tuple[int, ...] = (0, 1, 2)
    scored: int = 128
    step: int = 0
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
    """Fit all methods for every seed and score them at every context length.

    Args:
        session: Model and settings to run it with.
        calibration: Text from which calibration sequences are drawn.
        tokens: Calibration tokens per seed.
        held_out: Text to score, by context length in tokens. Sequences have `context + settings.scored` tokens.
        settings: Methods and conditions.
        force: Accept held-out text that overlaps the calibration text.
        partial: File that keeps the finished results of each seed and context, to resume from. Default: none.

    Returns:
        The benchmark's record. Methods that do not support the model are listed with the reason.

    Raises:
        CorpusError: Held-out text overlaps the calibration text and `force` is false.
        ModelError: The model has fewer positions than a sequence has tokens.
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
        done = {line["context"]: line for line in kept.done if line["seed"] == seed}
        if not (remaining := [context for context in wanted if context not in done]):
            continue
        fitted_on = chosen(calibration, tokens, seed)
        seeded = replace(session, seed=seed)
        bench = BenchContext(seeded.named(f"seed {seed}"), fitted_on, settings.rates)
        codecs, unfit = _fitted(bench, [m for m in methods if METHODS[m].fitted or seed == first])
        for context in remaining:
            if context == _GENERATED:
                text, scored = held_out[shortest], done[shortest]
                done[context] = _generated(seeded, text, codecs, scored, settings)
            else:
                named = seeded.named(f"seed {seed}, {context:,} tokens")
                done[context] = _scored(named, held_out[context], codecs, context, settings, fitted_on)
            kept.add(done[context] | {"refused": unfit})
    points = [BenchPoint(**point) for line in kept.done for point in line.get("points", ())]
    scored_methods = {p.method for p in points}
    unfit = {m: why for line in kept.done for m, why in line.get("refused", {}).items()}
    refused |= {
        m: unfit.get(m, "it has no operating point at the requested rates") for m in methods if m not in scored_methods
    }
    return BenchRecord(
        model=session.loaded.record("the cache itself"),
        corpora={context: text.corpus for context, text in held_out.items()},
        calibration=calibration.corpus,
        scored=settings.scored,
        step=settings.step,
        uncompressed_nll={line["context"]: line["nll"] for line in kept.done if "points" in line},
        refused=refused,
        points=points,
        equal_loss=_equal_losses(points, held_out, [m for m in methods if m in scored_methods]),
        divergence=[Divergence(**d) for line in kept.done for d in line.get("divergence", ())],
        retrieval=[Retrieval(**r) for line in kept.done for r in line.get("retrieval", ())],
        run=watch.run(settings.seeds[0], {"batch_size": session.batch_size, "calibration_tokens": tokens, "forced": force}),
        warnings=[w for w in (*calibration.corpus.warnings, *overlaps) if w],
    )


def chosen(text: Sequences, tokens: int, seed: int) -> Sequences:
    """Draw whole sequences of about `tokens` tokens with a seed, in the order of the text."""
    count = max(1, min(len(text.ids), tokens // text.corpus.max_length))
    rows = sorted(np.random.default_rng(seed).permutation(len(text.ids))[:count])
    return replace(text, ids=[text.ids[row] for row in rows])


def _fitted(bench: BenchContext, methods: Sequence[str]) -> tuple[dict[str, Mapping[str, Compressor]], dict[str, str]]:
    """Return the codecs of every method by operating point, and the errors of methods that could not be fitted."""
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
    """Score all codecs for one seed and context; return the line for the partial file."""
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
    """Measure generation and retrieval with the cheapest point of each method whose KL is at most `COMPARABLE`."""
    context = scored["context"]
    points = [BenchPoint(**point) for point in scored["points"]]
    cheapest = {}
    for method in codecs:
        within = [p for p in points if p.method == method and p.quality.kl <= COMPARABLE]
        if within:
            best = min(within, key=lambda p: p.bits_per_value)
            cheapest[f"{method} {best.point}"] = codecs[method][best.point]
    line: dict[str, Any] = {"seed": session.seed, "context": _GENERATED}
    if settings.prompts:
        line["divergence"] = [
            divergence.model_dump()
            for divergence in measure_divergence(
                session,
                sequences,
                cheapest,
                prompts=settings.prompts,
                prompt_tokens=context + 1,  # the last token is read with the compressed prefix
            )
        ]
    if settings.tasks:
        line["retrieval"] = [
            retrieval.model_dump()
            for retrieval in evaluate_retrieval(
                session,
                cheapest,
                tasks=settings.tasks,
                lengths=(context + 1,),
                count=settings.examples,
            )
        ]
    return line


def _equal_losses(
    points: Sequence[BenchPoint], held_out: Mapping[int, Sequences], methods: Sequence[str]
) -> list[EqualLoss]:
    """Interpolate the bits per value at which each method has each loss of `LOSSES`."""
    rows = []
    for context in held_out:
        for method in methods:
            selected = [p for p in points if p.method == method and p.context == context]
            seeds = sorted({p.seed for p in selected})
            curves = [_curve([p for p in selected if p.seed == seed]) for seed in seeds]
            for loss in LOSSES:
                by_seed, bits, interval = crossing(curves, loss)
                why = next((missing(c, loss) for c, rate in zip(curves, by_seed, strict=True) if rate is None), "")
                rows.append(
                    EqualLoss(
                        method=method,
                        context=context,
                        delta_nll=loss,
                        bits_per_value=bits,
                        interval=interval,
                        by_seed=by_seed,
                        why=why,
                    )
                )
    return rows


def _curve(points: Sequence[BenchPoint]) -> Curve:
    excess = np.array([p.excess for p in points])
    tokens = np.full(excess.shape[1], points[0].quality.tokens / excess.shape[1])
    return Curve(np.array([p.bits_per_value for p in points]), excess, tokens)


def _flat(codecs: Mapping[str, Mapping[str, Compressor]]) -> dict[tuple[str, str], Compressor]:
    return {(method, point): codec for method, points in codecs.items() for point, codec in points.items()}
