"""Compare compression methods at equal loss, each at several operating points, on the same text and prefixes.

A method compresses the cached prefix of every sequence, and all stored bytes are counted. The rest of the sequence is
scored with the decompressed prefix. Methods are fitted again for every seed, which selects the calibration sequences.
They are fitted and scored one after the other, so that memory holds one at a time and an interruption loses one at most.
Prefixes are read once for all of them if memory allows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from eigencache.calibration.pass_memory import check_scoring, described
from eigencache.calibration.session import Session
from eigencache.codec.base import Compressor
from eigencache.codec.placement import placed
from eigencache.corpora.overlap import check_overlap
from eigencache.corpora.sequences import Sequences
from eigencache.errors import REFUSALS
from eigencache.evaluate.codec_scoring import score_codecs
from eigencache.evaluate.divergence import measure_divergence
from eigencache.evaluate.prefix import KeptPrefixes, check_positions
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
_PREFIXES = 1 / 4  # share of the memory for prefixes
_FLOAT = 4  # bytes
_NO_METHOD, _GENERATED = "", "generated"  # in place of a method: the uncompressed cache, and generation and retrieval


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
        partial: File that keeps the finished results of each seed, method and context, to resume from. Default: none.

    Returns:
        The benchmark's record. Methods that do not suit the model or the text are listed with the reason.

    Raises:
        CorpusError: Held-out text overlaps the calibration text and `force` is false.
        ModelError: The model has fewer positions than a sequence has tokens.
        StatisticsError: Scoring needs more memory than the session allows.
    """
    watch = Stopwatch()
    check_positions(session.loaded, max(text.corpus.max_length for text in held_out.values()))
    overlaps = [check_overlap(text.ids, calibration.ids, force=force) for text in held_out.values()]
    refused = {m: why for m in settings.methods if (why := METHODS[m].refuses(session.loaded))}
    methods = [m for m in settings.methods if m not in refused]
    texts = [text.corpus.model_dump() for text in (calibration, *held_out.values())]
    together = settings if settings.prompts or settings.tasks else replace(settings, methods=())  # else each for itself
    kept = ResumableResults(
        partial,
        {"model": session.loaded.sha256, "texts": texts, "tokens": tokens, "settings": repr(together), "by": "method"},
    )
    prefixes = KeptPrefixes(int(session.memory * _PREFIXES))
    session.on_progress(_memory(session, held_out, settings), 0, 1)
    run = _BenchRun(session, calibration, tokens, dict(sorted(held_out.items())), settings, kept, prefixes)
    run.measure(methods)
    lines = [line for line in kept.done if line["method"] in (*methods, _GENERATED)]
    points = [BenchPoint(**point) for line in lines for point in line.get("points", ())]
    scored_methods = {p.method for p in points}
    unfit = {line["method"]: line["refused"] for line in lines if line.get("refused")}
    refused |= {
        m: unfit.get(m, "it has no operating point at the requested rates") for m in methods if m not in scored_methods
    }
    return BenchRecord(
        model=session.loaded.record("the cache itself"),
        corpora={context: text.corpus for context, text in held_out.items()},
        calibration=calibration.corpus,
        scored=settings.scored,
        step=settings.step,
        uncompressed_nll={line["context"]: line["nll"] for line in kept.done if line["method"] == _NO_METHOD},
        refused=refused,
        points=points,
        equal_loss=_equal_losses(points, held_out, [m for m in methods if m in scored_methods]),
        divergence=[Divergence(**d) for line in lines for d in line.get("divergence", ())],
        retrieval=[Retrieval(**r) for line in lines for r in line.get("retrieval", ())],
        run=watch.run(settings.seeds[0], {"batch_size": session.batch_size, "calibration_tokens": tokens, "forced": force}),
        warnings=[w for w in (*calibration.corpus.warnings, *overlaps) if w],
    )


def _memory(session: Session, held_out: Mapping[int, Sequences], settings: BenchSettings) -> str:
    """Return one line with the predicted memory of scoring. Raises `StatisticsError` if it is more than is allowed."""
    piece = settings.step or settings.scored
    scoring = max(check_scoring(session, context + settings.scored, piece) for context in held_out)
    texts = sum(context * len(text.ids) for context, text in held_out.items())
    prefixes = min(int(session.memory * _PREFIXES), _FLOAT * session.loaded.geometry.values_per_token * texts)
    return f"scoring takes {described(scoring + prefixes, session.memory)}"


def chosen(text: Sequences, tokens: int, seed: int) -> Sequences:
    """Draw whole sequences of about `tokens` tokens with a seed, in the order of the text."""
    count = max(1, min(len(text.ids), tokens // text.corpus.max_length))
    rows = sorted(np.random.default_rng(seed).permutation(len(text.ids))[:count])
    return replace(text, ids=[text.ids[row] for row in rows])


@dataclass(frozen=True)
class _BenchRun:
    """A bench under way: what its steps share. Arguments are those of `bench_model`; `held_out` is sorted."""

    session: Session
    calibration: Sequences
    tokens: int
    held_out: dict[int, Sequences]
    settings: BenchSettings
    kept: ResumableResults
    prefixes: KeptPrefixes

    def measure(self, methods: Sequence[str]) -> None:
        """Score the uncompressed cache, then every method with every seed, unless a result is kept already."""
        first = self.settings.seeds[0]
        for context in self.held_out:
            if self._line(_NO_METHOD, first, context) is None:
                self._score(_NO_METHOD, {}, context, replace(self.session, seed=first))
        for seed in self.settings.seeds:
            self._measure_seed(seed, [m for m in methods if seed == first or METHODS[m].fitted])

    def _measure_seed(self, seed: int, methods: Sequence[str]) -> None:
        seeded = replace(self.session, seed=seed)
        fitted_on = chosen(self.calibration, self.tokens, seed)
        bench = BenchContext(seeded.named(f"seed {seed}"), fitted_on, self.settings.rates)
        wanted = seed == self.settings.seeds[0] and (self.settings.prompts or self.settings.tasks)
        generating = wanted and self._line(_GENERATED, seed) is None
        cheapest: dict[str, Compressor] = {}
        for index, method in enumerate(methods):
            missing = [context for context in self.held_out if self._line(method, seed, context) is None]
            if not missing and not (generating and self._cheapest(method, seed)):
                continue
            bench.session.on_progress(f"fitting {method}", index, len(methods))
            codecs, why = _fitted(bench, method)
            for context in missing:
                if codecs:
                    self._score(method, codecs, context, seeded)
                else:
                    self.kept.add({"method": method, "seed": seed, "context": context, "points": [], "refused": why})
            if generating and (point := self._cheapest(method, seed)):
                cheapest[f"{method} {point}"] = codecs[point]
        if generating:
            self.kept.add({"method": _GENERATED, "seed": seed, "context": 0} | self._generated(seeded, cheapest))

    def _line(self, method: str, seed: int, context: int = 0) -> dict[str, Any] | None:
        """Return the kept result, if there is one."""
        sought = (method, seed, context)
        return next((x for x in self.kept.done if (x["method"], x["seed"], x["context"]) == sought), None)

    def _score(self, method: str, codecs: Mapping[str, Compressor], context: int, session: Session) -> None:
        """Score the codecs of one method at one context and keep the result."""
        scores = score_codecs(
            session.named(f"seed {session.seed}, {context:,} tokens, {method or 'uncompressed'}"),
            self.held_out[context],
            codecs,
            ReadingProtocol(kind="prefix", length=context, step=self.settings.step),
            calibration=self.calibration.corpus,
            read_first=self.prefixes,
        )
        points = [
            BenchPoint(
                method=method,
                point=point,
                seed=session.seed,
                context=context,
                quality=scores.quality[point],
                excess=scores.excess[point],
            ).model_dump()
            for point in codecs
        ]
        line = {"method": method, "seed": session.seed, "context": context, "nll": scores.uncompressed_nll, "points": points}
        self.kept.add(line)

    def _cheapest(self, method: str, seed: int) -> str | None:
        """Return the cheapest point of a method whose KL at the shortest context is at most `COMPARABLE`."""
        line = self._line(method, seed, min(self.held_out))
        points = [BenchPoint(**point) for point in line["points"]] if line else []
        within = [p for p in points if p.quality.kl <= COMPARABLE]
        return min(within, key=lambda p: p.bits_per_value).point if within else None

    def _generated(self, session: Session, codecs: Mapping[str, Compressor]) -> dict[str, Any]:
        """Measure generation and retrieval with one codec per method."""
        context, text = next(iter(self.held_out.items()))
        line: dict[str, Any] = {}
        if self.settings.prompts:
            divergences = measure_divergence(
                session,
                text,
                codecs,
                prompts=self.settings.prompts,
                prompt_tokens=context + 1,  # the last token is read with the compressed prefix
            )
            line["divergence"] = [divergence.model_dump() for divergence in divergences]
        if self.settings.tasks:
            retrievals = evaluate_retrieval(
                session, codecs, tasks=self.settings.tasks, lengths=(context + 1,), count=self.settings.examples
            )
            line["retrieval"] = [retrieval.model_dump() for retrieval in retrievals]
        return line


def _fitted(bench: BenchContext, method: str) -> tuple[dict[str, Compressor], str]:
    """Return the codecs of a method by operating point, and the reason if it could not be fitted."""
    try:
        made = METHODS[method].codecs(bench)  # fitted on the CPU
        return {point: placed(codec, bench.session.loaded.device) for point, codec in made.items()}, ""
    except REFUSALS as error:
        return {}, str(error)


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
