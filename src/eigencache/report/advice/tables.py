"""Advice as sentences and tables: what to do, at which loss and bytes, why, and what is not known."""

from eigencache.records.advice import Advice, Candidate
from eigencache.records.quality import Quality
from eigencache.report.core.measured import ABSENT, factor
from eigencache.report.core.table import Table
from eigencache.report.quality.sweep_table import interval_cell


def advice_lines(advice: Advice) -> list[str]:
    """The advice in a few sentences: the configuration, its bytes, its loss, and whether it held; or that there is none."""
    budget = f"{advice.budget.given}, {advice.budget.nats:.5f} nats per token"
    if advice.chosen is None:
        lines = [f"{advice.model.name}: nothing that was measured qualifies within the budget ({budget})."]
        if advice.nearest:
            lines.append(f"Nearest: {advice.nearest.describe()}, ΔNLL {interval_cell(advice.nearest.choosing)}.")
        return lines
    chosen = advice.chosen
    lines = [
        f"{advice.model.name}: compress {chosen.describe()} (budget {budget}).",
        f"Bytes: {chosen.sixteen_bit_nbytes_per_token:,.0f} → {chosen.nbytes_per_token:,.1f} per token, ratio "
        f"{chosen.choosing.compression_ratio:.2f}; basis {chosen.choosing.basis_nbytes:,} bytes, "
        f"paid back at {chosen.break_even_context:,} tokens.",
    ]
    if advice.stating is None or chosen.stating is None:
        return [*lines, f"Loss, on the same tokens it was chosen on: ΔNLL {interval_cell(chosen.choosing)} nats per token."]
    verdict = {
        True: "the interval is within the budget",
        False: "the interval reaches above the budget",
        None: "too few sequences for an interval",
    }[advice.holds]
    loss = (
        f"ΔNLL {interval_cell(chosen.stating)} nats per token, {100 * chosen.stating.perplexity_increase:+.2f} % perplexity"
    )
    return [*lines, f"Loss, on the half of the sequences that had no part in the choice: {loss}: {verdict}."]


def advice_tables(advice: Advice) -> list[Table]:
    """The best of every target, and the keys where they have a bias."""
    return [_ways(advice), *([_biases(advice), _roundings(advice)] if advice.keys else [])]


def evidence_lines(advice: Advice) -> list[str]:
    """The evidence line by line, and what is not known, for a terminal."""
    because = [f"• {line.claim}: {line.figure} ({line.source})" for line in advice.evidence]
    return ["Evidence", *because, "Not known", *(f"• {line}" for line in advice.unknown)]


def evidence_tables(advice: Advice) -> list[Table]:
    """The same as tables, for a page."""
    columns = ("Claim", "Figure", "Where it comes from")
    rows = tuple((line.claim, line.figure, line.source) for line in advice.evidence)
    limits = tuple((line,) for line in advice.unknown)
    return [
        Table(f"{advice.model.name}: the evidence", columns, rows, words=frozenset(columns[1:])),
        Table(f"{advice.model.name}: what this does not know", ("Not known",), limits),
    ]


def _ways(advice: Advice) -> Table:
    columns = (
        "Way",
        "Rank",
        "Bits",
        "Ratio",
        "Of target",
        "Bytes per token",
        "Basis bytes",
        "Paid back at",
        "ΔNLL choosing",
        "ΔNLL stating",
    )
    found = [c for c in (advice.chosen, *advice.others, advice.nearest) if c is not None]
    title = (
        "Within the budget, the best of every target" if advice.chosen else "Nothing within the budget; the nearest to it"
    )
    return Table(
        f"{advice.model.name}: {title}",
        columns,
        tuple(map(_way, found)),
        notes=_notes(advice),
        warnings=tuple(advice.warnings),
    )


def _way(candidate: Candidate) -> tuple[str, ...]:
    quality, back = candidate.choosing, candidate.break_even_context
    frame = "" if candidate.frame == "none" else f"{candidate.frame}-RoPE"
    centering = "centered" if candidate.centered else "uncentered"
    named = (candidate.target, candidate.scope, frame, candidate.metric, centering)
    return (
        " · ".join(part for part in named if part),
        f"{candidate.rank} of {candidate.width}",
        str(candidate.bits),
        f"{quality.compression_ratio:.2f}",
        f"{candidate.target_ratio:.2f}",
        f"{candidate.sixteen_bit_nbytes_per_token:,.0f} → {candidate.nbytes_per_token:,.1f}",
        f"{quality.basis_nbytes:,}",
        ABSENT if back is None else f"{back:,}",
        interval_cell(quality),
        interval_cell(candidate.stating) if candidate.stating else ABSENT,
    )


def _notes(advice: Advice) -> tuple[str, ...]:
    cached = "latent and rotary key" if advice.model.geometry.mla else "K and V"
    if advice.stating:
        parts = f"Chosen on {advice.choosing.name}; loss stated on {advice.stating.name}, which had no part in the choice."
    else:
        parts = f"Chosen and stated on the same tokens: {advice.choosing.name}, as a sweep measured it."
    return (
        f"{parts} {advice.protocol.describe()}. {advice.uncompressed_nll:.4f} nats per token uncompressed.",
        f"A way qualifies when the upper end of its interval on the choosing part is within the budget. Basis from "
        f"{advice.calibration.name}, {advice.calibration.tokens:,} tokens. Ratio: 16-bit bytes of {cached} over the bytes "
        "held, the basis apart. Intervals: 95 %, bootstrap over sequences, paired.",
    )


def _biases(advice: Advice) -> Table:
    columns = ("Layer", "Norm of the K bias", "Mean norm of K", "Bias / K", "Largest / median channel")
    rows = tuple(
        (
            str(bias.layer_idx),
            f"{bias.bias_norm:.2f}",
            f"{bias.mean_key_norm:.2f}",
            f"{100 * bias.share:.0f} %",
            factor(bias.largest_to_median),
        )
        for bias in advice.keys.biases  # type: ignore[union-attr]
    )
    note = f"Before rotation, heads of a layer joined; mean over tokens of {advice.calibration.name}."
    return Table(f"{advice.model.name}: how large the biases of the keys are", columns, rows, notes=(note,))


def _roundings(advice: Advice) -> Table:
    columns = ("Keys", "Mean", "Ratio", "ΔNLL (nats)", "KL (nats)", "Top-1")
    words = {"fp8": "fp8 (e4m3, scale per layer)", "int8": "int8 (scale per token and head)"}

    def row(kind: str, mean_out: bool, quality: Quality) -> tuple[str, ...]:
        return (
            words[kind],
            "taken out" if mean_out else "left in",
            f"{quality.compression_ratio:.2f}",
            interval_cell(quality),
            f"{quality.kl:.5f}",
            f"{100 * quality.top1_agreement:.2f} %",
        )

    rows = tuple(row(r.kind, r.mean_out, r.quality) for r in advice.keys.roundings)  # type: ignore[union-attr]
    text = (advice.stating or advice.choosing).name
    note = (
        f"Keys really stored so, values in 16 bits, scored through the cache on {text}; the mean is of keys before rotation."
    )
    return Table(f"{advice.model.name}: what 8-bit keys cost", columns, rows, notes=(note,), words=frozenset({"Mean"}))
