"""Tables of an evaluation: likelihood, generation, retrieval, and bytes."""

from eigencache.records.bench import BenchRecord
from eigencache.records.quality import EvaluationRecord
from eigencache.report.core.measured import ABSENT
from eigencache.report.core.table import Table
from eigencache.report.quality.sweep_table import interval_cell


def evaluation_tables(record: EvaluationRecord) -> list[Table]:
    """Return the tables of all parts that were measured."""
    tables = [likelihood_table(record)]
    if record.divergence:
        tables.append(divergence_table(record))
    if record.retrieval:
        tables.append(retrieval_table(record))
    return [*tables, ledger_table(record)]


def likelihood_table(record: EvaluationRecord) -> Table:
    """Return one row per protocol and codec: ratio, ΔNLL, perplexity, KL, top-1 agreement."""
    columns = ("Codec", "Protocol", "Ratio", "ΔNLL (nats)", "Δ perplexity", "KL (nats)", "Top-1")
    rows = tuple(
        (
            quality.codec,
            part.protocol.describe(),
            f"{quality.compression_ratio:.2f}" if quality.encoded_nbytes else ABSENT,
            interval_cell(quality),
            f"{100 * quality.perplexity_increase:+.2f} %",
            f"{quality.kl:.4f}",
            f"{100 * quality.top1_agreement:.1f} %",
        )
        for part in record.likelihood
        for quality in part.results
    )
    intervals = any(quality.delta_nll_interval for part in record.likelihood for quality in part.results)
    notes = (
        f"{record.corpus.name}; basis from {record.calibration.name}, {record.calibration.tokens:,} tokens. "
        "Ratio = bytes of the compressed tokens in 16 bits / bytes of them compressed. Side information is stored once and "
        "not included." + (" Intervals: 95 %, paired bootstrap over sequences." if intervals else ""),
    )
    warnings = tuple(record.warnings)
    return Table(f"{record.model.name}: likelihood", columns, rows, notes, warnings, frozenset({"Protocol"}), 2)


def divergence_table(record: EvaluationRecord | BenchRecord) -> Table:
    """Return how long greedy generation equals that of the uncompressed cache."""
    columns = ("Codec", "Prompts", "New tokens", "Equal tokens, mean", "Equal tokens, median", "Agreement", "All equal")
    rows = tuple(
        (
            one.codec,
            f"{len(one.agreement)} of {one.prompt_tokens} tokens",
            f"{one.new_tokens}",
            f"{one.mean_tokens_until_parting:.1f}",
            f"{one.median_tokens_until_parting:g}",
            f"{100 * one.mean_agreement:.1f} %",
            f"{one.never_parted}",
        )
        for one in record.divergence
    )
    notes = (
        "Equal tokens: before the first that differs from the uncompressed generation. Agreement: share of equal tokens. "
        "All equal: prompts whose generations do not differ.",
    )
    return Table(f"{record.model.name}: greedy generation", columns, rows, notes)


def retrieval_table(record: EvaluationRecord | BenchRecord) -> Table:
    """Return the share of exact answers; a task that the model fails with the uncompressed cache is not applicable."""
    compared = record.ledgers if isinstance(record, EvaluationRecord) else [one.codec for one in record.divergence]
    codecs = list(dict.fromkeys([*compared, *(result.codec for one in record.retrieval for result in one.results)]))
    columns = ("Task", "Context", "Depth", "Uncompressed", *codecs)
    rows = []
    for one in record.retrieval:
        depth = ABSENT if one.depth is None else f"{one.depth:g}"
        found = {result.codec: f"{result.accuracy:.2f}" for result in one.results}
        cells = [found.get(codec, "not applicable") for codec in codecs]
        rows.append((one.task, f"{one.length}", depth, f"{one.uncompressed.accuracy:.2f}", *cells))
    examples = record.retrieval[0].uncompressed.examples
    notes = [f"Share of {examples} examples whose answer tokens are all predicted as the most likely token."]
    if not all(one.applicable for one in record.retrieval):
        notes.append(
            "Not applicable: with the uncompressed cache, the model fails so often that no codec can be judged by it."
        )
    return Table(f"{record.model.name}: retrieval", columns, tuple(rows), tuple(notes), identity=3)


def ledger_table(record: EvaluationRecord) -> Table:
    """Return the bytes of one sequence by codec and context length."""
    columns = ("Codec", "Context", "16-bit bytes", "Bytes", "Side information", "Ratio", "Ratio with side information")
    rows = tuple(
        (
            name if index == 0 else "",
            f"{row.context:,}",
            f"{row.sixteen_bit_nbytes:,}",
            f"{row.payload_nbytes:,}",
            f"{row.basis_nbytes:,}",
            f"{row.ratio:.2f}",
            f"{row.ratio_with_basis:.2f}",
        )
        for name, ledger in record.ledgers.items()
        for index, row in enumerate(ledger)
    )
    return Table(f"{record.model.name}: bytes of one sequence", columns, rows, identity=2)
