"""The historic figures never stand alone: beside each is the held-out figure before rotation, and the difference."""

from eigencache.records.probe import ClassicRow, ProbeRecord
from eigencache.report.core.lookup import (
    classic_doubtful,
    classic_row,
    classic_trivial,
    held_out_mean,
    honest_energy,
    loud_warnings,
    pair,
    rank_mean,
    ratio_mean,
)
from eigencache.report.core.measured import ABSENT, LEGEND, NOTHING, Measured, count, factor, share, short_names
from eigencache.report.core.table import Table
from eigencache.report.probe.assess import RULE, assess

FIRST_COLUMNS = ("Model", "K energy@32", "V energy@32", "K effective rank", "V effective rank", "Assessment")
HONEST_COLUMNS = (
    "Attention",
    "KV width ÷ hidden",
    "K pre-RoPE held-out energy",
    "V held-out energy",
    "K pre-RoPE effective rank",
    "V effective rank (honest)",
    "K/V spread post-RoPE",
    "K/V spread pre-RoPE",
    "Tokens",
    "Warnings",
)
_CLASSIC_NOTE = (
    "First columns are the historic definitions: in-sample, centered, post-RoPE, heads joined, mean over layers; effective "
    "rank = rank at 99 % energy. Right of the assessment: held out, before rotation; effective rank = exp of the entropy "
    "of the singular values (Roy & Vetterli 2007)"
)
TRIVIAL = " (w≤32)"
_TRIVIAL_NOTE = "(w≤32): the tensor is no wider than 32 numbers, so its energy@32 is 1 by definition"


def _classic_energy(record: ProbeRecord, row: ClassicRow | None) -> str:
    if row is None:
        return ABSENT
    text = Measured(row.energy_32, classic_doubtful(record, row)).text(share)
    return text + TRIVIAL if classic_trivial(record, row) else text


def _classic_rank(record: ProbeRecord, row: ClassicRow | None) -> str:
    return ABSENT if row is None else Measured(row.rank_99, classic_doubtful(record, row)).text(count)


def _honest(record: ProbeRecord, name: str | None) -> str:
    found = held_out_mean(record, name)
    return found.measured.text(share) if found.measured.value is None else f"{found.measured.text(share)} {found.label}"


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
        _honest(record, chosen.key_before),
        _honest(record, chosen.value),
        rank_mean(record, chosen.key_before).text(count),
        rank_mean(record, chosen.value).text(count),
        ratio_mean(record, chosen.key_cached, chosen.value).text(factor),
        ratio_mean(record, chosen.key_before, chosen.value).text(factor),
        f"{record.corpus.tokens:,}",
        str(len(loud_warnings(record))),
    )


def _latent_row(record: ProbeRecord, label: str) -> tuple[str, ...]:
    """What an MLA model really caches for K and V together; the rotary key beside it is in the probe table."""
    row = classic_row(record, ("latent",))
    energy, rank = _classic_energy(record, row), _classic_rank(record, row)
    honest, effective = _honest(record, "latent"), rank_mean(record, "latent").text(count)
    head = (f"{label} (latent, K and V in one)", energy, energy, rank, rank, assess(record).verdict)
    return (
        *head,
        "MLA",
        f"{record.model.geometry.width_ratio:.2f}",
        honest,
        honest,
        effective,
        effective,
        *[ABSENT] * 2,
        *[""] * 2,
    )


def compare_table(records: list[ProbeRecord]) -> Table:
    """All models in one table: the historic columns first, the assessment with its reasons, then the honest columns."""
    rows, notes = [], []
    for record, label in zip(records, short_names(records), strict=True):
        rows.append(_compare_row(record, label))
        if "latent" in record.names:
            rows.append(_latent_row(record, label))
        notes += [f"{label}: {assess(record).verdict}. " + "; ".join(assess(record).reasons)]
    warnings = [f"{label}: {w}" for r, label in zip(records, short_names(records), strict=True) for w in loud_warnings(r)]
    trivial = (_TRIVIAL_NOTE,) if any(TRIVIAL in cell for row in rows for cell in row) else ()
    mla = (
        ("MLA: K before rotation is keys_nope, the expanded part of a key that is never rotated",)
        if any("latent" in r.names for r in records)
        else ()
    )
    return Table(
        title="Models compared (mean over layers, heads of a layer joined, centered)",
        columns=(*FIRST_COLUMNS, *HONEST_COLUMNS),
        rows=tuple(rows),
        notes=(*notes, RULE, _CLASSIC_NOTE, *trivial, *mla, *LEGEND),
        warnings=tuple(warnings),
        words=frozenset({"Assessment", "Attention"}),
    )


def difference(classic: float, honest: Measured) -> str:
    """`flatters by 0.31`, `understates by 0.02`, `agrees`, or `—`."""
    if honest.value is None:
        return ABSENT
    gap = classic - honest.value
    mark = "!" if honest.doubtful else ""
    if abs(gap) < 0.005:
        return f"agrees{mark}"
    return f"{'flatters' if gap > 0 else 'understates'} by {abs(gap):.2f}{mark}"


def classic_table(record: ProbeRecord) -> Table:
    """The historic view of one model, row by row beside the figure that does not flatter."""
    rows = []
    for row in record.classic:
        doubtful = classic_doubtful(record, row)
        trivial = classic_trivial(record, row)
        honest = NOTHING if trivial else honest_energy(record, row.kind)
        rows.append(
            (
                row.kind,
                row.text,
                f"{row.vectors:,}",
                Measured(row.energy_16, doubtful).text(share),
                _classic_energy(record, row),
                Measured(row.rank_99, doubtful).text(count),
                row.assessment,
                honest.text(share),
                ABSENT if trivial else difference(row.energy_32, honest),
            )
        )
    trivial_note = (_TRIVIAL_NOTE,) if any(TRIVIAL in row[4] for row in rows) else ()
    nope = "; of keys of an MLA model it is that of keys_nope, which is never rotated" if record.model.geometry.mla else ""
    return Table(
        title=f"{record.model.name}: the historic probe beside the honest figure (mean over layers, heads joined, centered)",
        columns=(
            "Kind",
            "Text",
            "Vectors",
            "Energy@16",
            "Energy@32",
            "Effective rank (99 %)",
            "Old assessment",
            "Held-out energy@32, pre-RoPE",
            "The old figure",
        ),
        rows=tuple(rows),
        notes=(
            "Left: in-sample, post-RoPE; the old assessment says Compressible above 0.8 energy@32. "
            f"Right: basis from one half of the sequences, energy on the other, before rotation{nope}",
            *trivial_note,
            LEGEND[0],
        ),
        words=frozenset({"Text", "Old assessment", "The old figure"}),
    )
