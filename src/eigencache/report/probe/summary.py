"""The summary of one probe: one row per tensor, medians over layers with their range, short enough for one screen."""

from collections.abc import Callable, Sequence
from math import inf
from statistics import median

from eigencache.records.probe import ProbeRecord, Spectrum
from eigencache.report.core.lookup import all_warnings, held_out_at, layers_of, quarter_k
from eigencache.report.core.measured import ABSENT, DOUBT, Measured, of_spectrum
from eigencache.report.core.table import Table
from eigencache.report.probe.dead import dead_by_layer, named_layers
from eigencache.report.probe.sinks import sinks_sentence

_COLUMNS = (
    "Tensor",
    "Width",
    "Rank 95 %",
    "Effective rank",
    "Held-out energy at width/4",
    "Spread",
    "Vectors per dim.",
)
_LABELS = {
    "keys_pre_rope": "keys\nbefore RoPE",
    "keys_post_rope": "keys\nas cached",
    "key_rope_pre_rope": "rotary key\nbefore RoPE",
    "key_rope_post_rope": "rotary key\nas cached",
    "keys_nope": "keys,\nexpanded",
}
_LINES, _COLUMNS_OF_SCREEN = 24, 80
_OTHER_LINES = 14  # of the title, the headings, the notes and the frame of the warnings, at most
_WARNING_WIDTH = 70  # characters of a shortened warning
_OVER = {"layer": "layers", "head": "layers and heads", "all": "nothing: all layers are concatenated"}


def probe_summary(record: ProbeRecord) -> Table:
    """Return one row per tensor: median over layers and, below it, the range of every statistic.

    Without spectra at scope `layer`, those of scope `head` or else `all` are summarized.

    Args:
        record: The probe record.

    Returns:
        A table of at most 24 lines on a terminal of 80 columns; its warnings are shortened.
    """
    rows, shown = [], []
    scopes: dict[str, None] = {}
    for name in record.names:
        if spectra := _spectra(record, name):
            rows.append(_row(record, name, spectra))
            shown += spectra
            scopes[spectra[0].scope] = None
    layers = len({s.layer_idx for s in record.spectra if s.layer_idx is not None})
    over = " or ".join(_OVER[scope] for scope in scopes) or "layers"
    note = (
        f"Median over {over}, range below; centered. Width/4: energy of the leading quarter of the directions. Spread: "
        f"largest / smallest std. of the raw dimensions. {DOUBT}: below 10 vectors per dimension; {ABSENT}: withheld."
    )
    title = f"{record.model.name}: {layers} layers, {record.corpus.name}, {record.corpus.tokens:,} tokens"
    height = sum(max(cell.count("\n") + 1 for cell in row) for row in rows)
    dead = _dead_note(shown, layers)
    warnings = _shortened(all_warnings(record), max(2, _LINES - _OTHER_LINES - height) - len(dead))
    notes = tuple(filter(None, (note, sinks_sentence(record), *dead)))
    return Table(title, _COLUMNS, tuple(rows), notes, warnings)


def _spectra(record: ProbeRecord, name: str) -> list[Spectrum]:
    """Return the centered spectra of a tensor at scope `layer`, or else `head`, or else `all`."""
    return layers_of(record, name) or record.select(name, "head") or record.select(name, "all")


def _row(record: ProbeRecord, name: str, spectra: Sequence[Spectrum]) -> tuple[str, ...]:
    label = "values,\nexpanded" if name == "values" and record.model.geometry.mla else _LABELS.get(name, name)
    return (
        label,
        _cell([Measured(s.width) for s in spectra], _count) + _dead(spectra),
        _cell([of_spectrum(s, s.rank_95) for s in spectra], _count),
        _cell([of_spectrum(s, s.effective_rank) for s in spectra], _short),
        _cell([held_out_at(s, quarter_k(s)) for s in spectra], _share),
        _cell([of_spectrum(s, s.spread) for s in spectra], _short),
        _cell([Measured(s.support) for s in spectra], _short),
    )


def _dead_note(spectra: Sequence[Spectrum], layers: int) -> tuple[str, ...]:
    """Return a sentence of one line on the layers with dead dimensions; nothing if there are none."""
    if not any(s.dead for s in spectra):
        return ()
    counts = dead_by_layer(spectra)
    text = "Dead dimensions never vary and are not in Spread"
    where = f": {named_layers(counts)}" if counts else ""
    if len(text + where) >= _COLUMNS_OF_SCREEN:
        where = f": {len(counts)} of {layers} layers"
    return (f"{text}{where}.",)


def _dead(spectra: Sequence[Spectrum]) -> str:
    """Return a line with the range of the number of dead dimensions; nothing if there are none."""
    counts = [len(s.dead) for s in spectra]
    low, high = min(counts), max(counts)
    return f"\n{low}–{high} dead" if low < high else f"\n{high} dead" if high else ""


def _cell(measured: Sequence[Measured], write: Callable[[float], str]) -> str:
    """Return the median, the range below it if the values differ, and the count below that if some are withheld."""
    values = [m.value for m in measured if m.value is not None]
    if not values:
        return ABSENT
    doubt = DOUBT if any(m.doubtful for m in measured if m.value is not None) else ""
    lines = [f"{write(median(values))}{doubt}"]
    low, high = write(min(values)), write(max(values))
    if low != high:
        lines.append(f"{low}–{high}")
    if len(values) < len(measured):
        lines.append(f"({len(values)}/{len(measured)})")
    return "\n".join(lines)


def _count(value: float) -> str:
    return f"{value:,.0f}" if value == round(value) else f"{value:,.1f}"


def _share(value: float) -> str:
    return ">0.99" if 0.995 <= value < 1 else f"{value:.2f}"


def _short(value: float) -> str:
    """Write a number with about three digits."""
    if value == inf:
        return "∞"
    if value >= 10_000:
        return f"{value:.0e}".replace("e+0", "e")
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _shortened(warnings: Sequence[str], limit: int) -> tuple[str, ...]:
    """Return at most `limit` lines, `limit` ≥ 1: one per warning, cut to its width, or the first and the others' number."""
    shown = warnings if len(warnings) <= limit else warnings[: limit - 1]
    lines = [w if len(w) <= _WARNING_WIDTH else f"{w[: _WARNING_WIDTH - 1].rstrip()}…" for w in shown]
    if len(warnings) > len(shown):
        rest = f"and {len(warnings) - len(shown)} more" if shown else f"{len(warnings)} warnings"
        lines.append(f"{rest}: see all statistics by layer, or the record")
    return tuple(lines)
