"""Sentences and tables of a recommendation: what to use, its bytes and loss, the evidence, and the limitations."""

from eigencache.records.advice import Advice, Candidate
from eigencache.records.quality import Quality
from eigencache.report.advice.codecs import codec_lines, codec_table, command_lines, loss_line
from eigencache.report.core.measured import ABSENT, factor
from eigencache.report.core.table import Table
from eigencache.report.quality.sweep_table import interval_cell

_RESEARCH = "Research (PCA, low rank)"


def advice_lines(advice: Advice) -> list[str]:
    """Return the recommendation in a few sentences: for each use the codec, its bytes, its loss and its command."""
    budget = f"{advice.budget.given}, {advice.budget.nats:.5f} nats per token"
    if not advice.codecs:
        return _pca_lines(advice, advice.model.name, budget)
    lines = [f"{advice.model.name}: one recommendation for each use (budget {budget}).", *codec_lines(advice)]
    if advice.sweeps:
        return lines + _pca_lines(advice, _RESEARCH, "")
    return lines + ([f"{_RESEARCH}: not measured. {advice.pca_refusal}"] if advice.pca_refusal else [])


def _pca_lines(advice: Advice, start: str, budget: str) -> list[str]:
    """Return the sentences on PCA: the setting, its bytes, loss and command; or that none meets the budget."""
    chosen, nearest = advice.chosen, advice.nearest
    if chosen is None:
        none = "no measured setting meets the budget"
        if nearest and _undecided(nearest):
            count = nearest.choosing.sequences
            none = f"undecided: {count} sequences are too few for an interval, and its upper end decides. Use more tokens"
        lines = [f"{start}: {none}{f' ({budget})' if budget else ''}."]
        if nearest:
            lines.append(f"Nearest: {nearest.describe()}, ΔNLL {interval_cell(nearest.choosing)}.")
        return lines
    return [
        f"{start}: compress {chosen.describe()}{f' (budget {budget})' if budget else ''}.",
        f"Bytes: {chosen.sixteen_bit_nbytes_per_token:,.0f} → {chosen.nbytes_per_token:,.1f} per token, ratio "
        f"{chosen.choosing.compression_ratio:.2f}; basis {chosen.choosing.basis_nbytes:,} bytes, "
        f"break-even context {chosen.break_even_context:,} tokens.",
        loss_line(advice, chosen),
        *command_lines(chosen),
    ]


def _undecided(nearest: Candidate | None) -> bool:
    """Return whether no setting could be chosen because none has an interval."""
    return nearest is not None and nearest.choosing.delta_nll_interval is None


def advice_tables(advice: Advice) -> list[Table]:
    """Return the codecs by use, the best PCA setting of every target, and, for key biases, the tables of 8-bit keys."""
    codecs = [codec_table(advice)] if any(one.candidates for one in advice.codecs) else []
    settings = [_settings(advice)] if advice.sweeps else []
    return [*codecs, *settings, *([_biases(advice), _roundings(advice)] if advice.keys else [])]


def evidence_lines(advice: Advice) -> list[str]:
    """Return the evidence and the limitations, one line each, for a terminal."""
    because = [f"• {line.claim}: {line.figure} ({line.source})" for line in advice.evidence]
    return ["Evidence", *because, "Limitations", *(f"• {line}" for line in advice.unknown)]


def evidence_tables(advice: Advice) -> list[Table]:
    """Return the evidence and the limitations as tables, for a page."""
    columns = ("Claim", "Figure", "Source")
    rows = tuple((line.claim, line.figure, line.source) for line in advice.evidence)
    limits = tuple((line,) for line in advice.unknown)
    return [
        Table(f"{advice.model.name}: evidence", columns, rows, words=frozenset(columns[1:])),
        Table(f"{advice.model.name}: limitations", ("Limitation",), limits),
    ]


def _settings(advice: Advice) -> Table:
    columns = (
        "Setting",
        "Rank",
        "Bits",
        "Ratio",
        "Ratio of target",
        "Bytes per token",
        "Side information",
        "Break-even context",
        "ΔNLL, choice",
        "ΔNLL, held-out",
    )
    candidates = [c for c in (advice.chosen, *advice.others, advice.nearest) if c is not None]
    title = "best PCA setting of every target, chosen within the budget"
    if advice.chosen is None:
        undecided = _undecided(advice.nearest)
        title = "nearest PCA setting, without an interval" if undecided else "no PCA setting within the budget"
    return Table(
        f"{advice.model.name}: {title}",
        columns,
        tuple(map(_setting, candidates)),
        notes=_notes(advice),
        warnings=tuple(advice.warnings),
        hidden_first=("Bytes per token", "Break-even context", "Side information", "Ratio of target"),
    )


def _setting(candidate: Candidate) -> tuple[str, ...]:
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
    cached = "latent and rotary key" if advice.model.geometry.mla else "keys and values"
    if advice.stating:
        parts = f"Chosen on {advice.choosing.name}; held-out loss on {advice.stating.name}, which the choice did not use."
    else:
        parts = f"The loss is on the tokens that the choice used: {advice.choosing.name}, as measured by a sweep."
    return (
        f"{parts} {advice.protocol.describe()}. {advice.uncompressed_nll:.4f} nats per token uncompressed.",
        f"A setting meets the budget if the upper end of its interval (ΔNLL, choice) does. Basis from "
        f"{advice.calibration.name}, {advice.calibration.tokens:,} tokens. Ratio = bytes of the 16-bit cache ({cached}) / "
        "bytes of the compressed cache. Side information is stored once and not included."
        + ("" if _undecided(advice.nearest) else " Intervals: 95 %, paired bootstrap over sequences."),
    )


def _biases(advice: Advice) -> Table:
    columns = ("Layer", "Norm of the key bias", "Mean norm of keys", "Bias / keys", "Largest / median channel")
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
    note = f"Before rotation, heads of a layer concatenated; mean over tokens of {advice.calibration.name}."
    return Table(f"{advice.model.name}: key biases", columns, rows, notes=(note,))


def _roundings(advice: Advice) -> Table:
    columns = ("Keys", "Mean", "Ratio", "ΔNLL (nats)", "KL (nats)", "Top-1")
    words = {"fp8": "fp8 (e4m3, scale per layer)", "int8": "int8 (scale per token and head)"}

    def row(kind: str, mean_out: bool, quality: Quality) -> tuple[str, ...]:
        return (
            words[kind],
            "subtracted" if mean_out else "kept",
            f"{quality.compression_ratio:.2f}",
            interval_cell(quality),
            f"{quality.kl:.5f}",
            f"{100 * quality.top1_agreement:.2f} %",
        )

    rows = tuple(row(r.kind, r.mean_out, r.quality) for r in advice.keys.roundings)  # type: ignore[union-attr]
    text = (advice.stating or advice.choosing).name
    note = f"Keys are stored in 8 bits, values in 16; scored through the cache on {text}. Mean: of keys before rotation."
    return Table(
        f"{advice.model.name}: loss of 8-bit keys", columns, rows, notes=(note,), words=frozenset({"Mean"}), identity=2
    )
