"""Compare models, and the figures of the original probe with the held-out figures before rotation."""

from eigencache.records.probe import ClassicRow, ProbeRecord
from eigencache.report.core.lookup import (
    all_warnings,
    classic_doubtful,
    classic_row,
    classic_trivial,
    held_out_energy_32,
    held_out_mean,
    pair,
    rank_mean,
    ratio_mean,
)
from eigencache.report.core.measured import ABSENT, DOUBT, LEGEND, NOTHING, Measured, count, factor, share, short_names
from eigencache.report.core.table import Table
from eigencache.report.probe.assess import RULE, assess
from eigencache.report.probe.dead import dead_totals

FIRST_COLUMNS = ("Model", "K energy@32", "V energy@32", "K effective rank", "V effective rank", "Assessment")
HELD_OUT_COLUMNS = (
    "Attention",
    "KV width / hidden",
    "K pre-RoPE held-out energy",
    "V held-out energy",
    "K pre-RoPE effective rank (entropy)",
    "V effective rank (entropy)",
    "K/V spread post-RoPE",
    "K/V spread pre-RoPE",
    "Tokens",
    "Warnings",
)
_HIDDEN_FIRST = (  # on a narrow terminal; the held-out figures and the assessment stay longest
    "Warnings",
    "Tokens",
    "V effective rank",
    "K effective rank",
    "V energy@32",
    "K energy@32",
    "K/V spread pre-RoPE",
    "K/V spread post-RoPE",
    "KV width / hidden",
    "Attention",
)
_CLASSIC_NOTE = (
    "Left of the assessment: as the original probe defined them, in-sample, centered, post-RoPE, heads concatenated, mean "
    "over layers; effective rank: the rank at 99 % energy. Right of it: held-out, before rotation; effective rank: exp of "
    "the entropy of the singular values (Roy & Vetterli 2007)"
)
TRIVIAL = " (w≤32)"
_TRIVIAL_NOTE = "(w≤32): the tensor is at most 32 wide, so its energy@32 is 1 by definition"


def _classic_energy(record: ProbeRecord, row: ClassicRow | None) -> str:
    if row is None:
        return ABSENT
    text = Measured(row.energy_32, classic_doubtful(record, row)).text(share)
    return text + TRIVIAL if classic_trivial(record, row) else text


def _classic_rank(record: ProbeRecord, row: ClassicRow | None) -> str:
    return ABSENT if row is None else Measured(row.rank_99, classic_doubtful(record, row)).text(count)


def _held_out(record: ProbeRecord, name: str | None) -> str:
    mean = held_out_mean(record, name)
    return mean.measured.text(share) if mean.measured.value is None else f"{mean.measured.text(share)} {mean.label}"


def _compare_row(record: ProbeRecord, label: str) -> tuple[str, ...]:
    chosen, geometry = pair(record), record.model.geometry
    keys, values = classic_row(record, ("keys", "keys_nope")), classic_row(record, ("values",))
    return (
        f"{label} (expanded K and V)" if geometry.mla else label,
        _classic_energy(record, keys),
        _classic_energy(record, values),
        _classic_rank(record, keys),
        _classic_rank(record, values),
        assess(record).verdict,
        geometry.attention if chosen.rotated or geometry.mla else f"{geometry.attention}, no RoPE",
        f"{geometry.width_ratio:.2f}",
        _held_out(record, chosen.key_before),
        _held_out(record, chosen.value),
        rank_mean(record, chosen.key_before).text(count),
        rank_mean(record, chosen.value).text(count),
        ratio_mean(record, chosen.key_cached, chosen.value).text(factor),
        ratio_mean(record, chosen.key_before, chosen.value).text(factor),
        f"{record.corpus.tokens:,}",
        str(len(all_warnings(record))),
    )


def _latent_row(record: ProbeRecord, label: str) -> tuple[str, ...]:
    """Return the row of the latent of an MLA model; the rotary key is in the probe table."""
    row = classic_row(record, ("latent",))
    energy, rank = _classic_energy(record, row), _classic_rank(record, row)
    held_out, effective = _held_out(record, "latent"), rank_mean(record, "latent").text(count)
    head = (f"{label} (latent, for K and V)", energy, energy, rank, rank, assess(record).verdict)
    return (
        *head,
        "MLA",
        f"{record.model.geometry.width_ratio:.2f}",
        held_out,
        held_out,
        effective,
        effective,
        *[ABSENT] * 2,
        *[""] * 2,
    )


def compare_table(records: list[ProbeRecord]) -> Table:
    """Return one row per model: the columns of the original probe, the assessment, then the held-out columns.

    The notes give the reasons for every assessment.
    """
    rows, notes = [], []
    for record, label in zip(records, short_names(records), strict=True):
        rows.append(_compare_row(record, label))
        if "latent" in record.names:
            rows.append(_latent_row(record, label))
        notes += [f"{label}: {assess(record).verdict}. " + "; ".join(assess(record).reasons)]
        notes += [f"{label}: {totals}"] if (totals := dead_totals(record)) else []
    warnings = [f"{label}: {w}" for r, label in zip(records, short_names(records), strict=True) for w in all_warnings(r)]
    trivial = (_TRIVIAL_NOTE,) if any(TRIVIAL in cell for row in rows for cell in row) else ()
    mla = (
        ("MLA: K before rotation is keys_nope, the part of the expanded keys that is never rotated",)
        if any("latent" in r.names for r in records)
        else ()
    )
    return Table(
        title="Models compared (mean over layers, heads of a layer concatenated, centered)",
        columns=(*FIRST_COLUMNS, *HELD_OUT_COLUMNS),
        rows=tuple(rows),
        notes=(*notes, RULE, _CLASSIC_NOTE, *trivial, *mla, *LEGEND),
        warnings=tuple(warnings),
        words=frozenset({"Assessment", "Attention"}),
        hidden_first=_HIDDEN_FIRST,
    )


def difference(classic: float, held_out: Measured) -> str:
    """Return `too high by 0.31`, `too low by 0.02`, `equal`, or `—`.

    Args:
        classic: Energy@32 of the original probe.
        held_out: Held-out energy@32 before rotation.
    """
    if held_out.value is None:
        return ABSENT
    gap = classic - held_out.value
    mark = DOUBT if held_out.doubtful else ""
    if abs(gap) < 0.005:
        return f"equal{mark}"
    return f"too {'high' if gap > 0 else 'low'} by {abs(gap):.2f}{mark}"


def _vectors(row: ClassicRow) -> str:
    distinct = "" if row.distinct_vectors is None else f" ({row.distinct_vectors:,} distinct)"
    return f"{row.vectors:,}{distinct}"


def classic_table(record: ProbeRecord) -> Table:
    """Return the figures of the original probe for one model, each with the held-out figure and the difference."""
    rows = []
    for row in record.classic:
        doubtful = classic_doubtful(record, row)
        trivial = classic_trivial(record, row)
        held_out = NOTHING if trivial else held_out_energy_32(record, row.kind)
        rows.append(
            (
                row.kind,
                row.text,
                _vectors(row),
                Measured(row.energy_16, doubtful).text(share),
                _classic_energy(record, row),
                Measured(row.rank_99, doubtful).text(count),
                row.assessment,
                held_out.text(share),
                ABSENT if trivial else difference(row.energy_32, held_out),
            )
        )
    trivial_note = (_TRIVIAL_NOTE,) if any(TRIVIAL in row[4] for row in rows) else ()
    nope = "; for keys of an MLA model, that of keys_nope, which is never rotated" if record.model.geometry.mla else ""
    return Table(
        title=f"{record.model.name}: figures of the original probe (mean over layers, heads concatenated, centered)",
        columns=(
            "Kind",
            "Text",
            "Vectors",
            "Energy@16",
            "Energy@32",
            "Rank 99 %",
            "Original assessment",
            "Held-out energy@32, pre-RoPE",
            "Original energy@32 is",
        ),
        rows=tuple(rows),
        notes=(
            "Left: in-sample, post-RoPE; the original assessment is Compressible above 0.8 energy@32. "
            f"Right: basis from one half of the sequences, energy from the other half, before rotation{nope}",
            *trivial_note,
            LEGEND[0],
        ),
        words=frozenset({"Text", "Original assessment", "Original energy@32 is"}),
        identity=2,
    )
