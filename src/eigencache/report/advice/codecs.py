"""Sentences and a table of the codecs `eigen` and `live` of a recommendation: one for each use, with its command."""

from eigencache.records.advice import Advice, CodecAdvice, CodecCandidate, CodecFamily, Measured
from eigencache.report.core.measured import ABSENT
from eigencache.report.core.table import Table
from eigencache.report.quality.sweep_table import interval_cell, kl_cell

USES: dict[CodecFamily, str] = {
    "eigen": "Stored caches (on disk or in memory, decoded before use)",
    "live": "Generation (the cache that the model attends to)",
}
SHORT: dict[CodecFamily, str] = {"eigen": "stored", "live": "generation"}
_HOLDS = {
    True: "the interval is within the budget",
    False: "the interval exceeds the budget",
    None: "too few sequences for an interval",
}


def codec_lines(advice: Advice) -> list[str]:
    """Return, for each use, the codec, its bytes, its loss and the command that makes it, or why there is none."""
    lines = []
    for one in advice.codecs:
        use = USES[one.family]
        if one.chosen:
            lines += [f"{use}: {one.chosen.describe()}.", *_facts(advice, one.chosen)]
        elif one.nearest:
            loss = f"ΔNLL {interval_cell(one.nearest.choosing)}, KL {kl_cell(one.nearest.choosing)}"
            lines.append(f"{use}: no rate is within the budget. Nearest: {one.nearest.describe()}, {loss}.")
        else:
            lines.append(f"{use}: not measured. {' '.join(one.left_out)}")
    return lines


def command_lines(measured: Measured) -> list[str]:
    """Return the line with the command that makes a codec, if there is one."""
    return [f"Command: {measured.command}"] if measured.command else []


def loss_line(advice: Advice, chosen: Measured) -> str:
    """Return the loss of a choice where it was not made, or else on the tokens of the choice."""
    quality, where = chosen.choosing, "on the tokens that the choice used"
    if advice.stating and chosen.stating:
        quality, where = chosen.stating, "on held-out sequences that the choice did not use"
    loss = f"ΔNLL {interval_cell(quality)} nats per token, {100 * quality.perplexity_increase:+.2f} % perplexity"
    verdict = f": {_HOLDS[chosen.holds(advice.budget)]}" if quality is chosen.stating else ""
    return f"Loss, {where}: {loss}, KL {kl_cell(quality)}{verdict}."


def _facts(advice: Advice, chosen: CodecCandidate) -> list[str]:
    longer, back = chosen.longer, chosen.break_even_context
    sixteen, held = (nbytes / longer.context for nbytes in (longer.sixteen_bit_nbytes, longer.payload_nbytes))
    pays = "no context pays it back" if back is None else f"break-even context {back:,} tokens"
    return [
        f"Bytes at {longer.context:,} tokens: {sixteen:,.0f} → {held:,.1f} per token, ratio {longer.ratio:.2f} "
        f"({chosen.choosing.compression_ratio:.2f} as scored); side information {longer.basis_nbytes:,} bytes, {pays}.",
        loss_line(advice, chosen),
        *command_lines(chosen),
    ]


def codec_table(advice: Advice) -> Table:
    """Return one row per measured rate of every family, the recommended ones marked."""
    measured = [(one, candidate) for one in advice.codecs for candidate in one.candidates]
    context = measured[0][1].longer.context
    columns = (
        "Use",
        "Codec",
        "Recommended",
        "Ratio",
        f"Ratio at {context:,}",
        "Bytes per token",
        "Side information",
        "Break-even context",
        "ΔNLL, choice",
        "KL, choice",
        "ΔNLL, held-out",
        "KL, held-out",
    )
    calibration = next(one.calibration for one in advice.codecs if one.calibration)
    stated = f" Held-out: {advice.stating.name}, which the choice did not use." if advice.stating else ""
    budget = f"{advice.budget.nats:.5f} nats"
    notes = (
        f"Recommended: the largest ratio whose interval (ΔNLL, choice) is within the budget of {budget}. "
        f"Choice: {advice.choosing.name}.{stated} {advice.protocol.describe()}.",
        "Ratio = bytes of the 16-bit cache / bytes of the compressed prefix as scored. The tokens in 16 bits weigh less "
        f"at {context:,} tokens, to which the bytes per token refer. Side information is stored once and not included. "
        f"Fitted on {calibration.name}, {calibration.tokens:,} tokens. Intervals: 95 %, bootstrap over sequences.",
    )
    title = f"{advice.model.name}: codecs by use"
    rows = tuple(_row(one, candidate) for one, candidate in measured)
    return Table(
        title,
        columns,
        rows,
        notes=notes,
        words=frozenset({"Codec", "Recommended"}),
        identity=3,
        hidden_first=("Bytes per token", "Break-even context", "Side information", f"Ratio at {context:,}"),
    )


def _row(one: CodecAdvice, candidate: CodecCandidate) -> tuple[str, ...]:
    longer, back, stated = candidate.longer, candidate.break_even_context, candidate.stating
    return (
        SHORT[one.family],
        candidate.describe(),
        "yes" if candidate == one.chosen else "",
        f"{candidate.choosing.compression_ratio:.2f}",
        f"{longer.ratio:.2f}",
        f"{longer.payload_nbytes / longer.context:,.1f}",
        f"{longer.basis_nbytes:,}",
        ABSENT if back is None else f"{back:,}",
        interval_cell(candidate.choosing),
        kl_cell(candidate.choosing),
        interval_cell(stated) if stated else ABSENT,
        kl_cell(stated) if stated else ABSENT,
    )
