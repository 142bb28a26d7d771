"""The verdicts of a report: a summary of one row per model, and the lines, tables and figure of each."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import expm1

from eigencache.records.advice import WORDS, Advice, CodecFamily, ReportRecord, Verdict
from eigencache.records.probe import ProbeRecord
from eigencache.records.quality import Quality, SweepRecord, SweepSeries
from eigencache.report.advice.tables import advice_lines, advice_tables, evidence_tables
from eigencache.report.core.lookup import layers_of, pair
from eigencache.report.core.measured import ABSENT, count, of_spectrum, over_layers
from eigencache.report.core.table import Table
from eigencache.report.probe.interactive import Interactive
from eigencache.report.quality.sweep_table import furthest, interval_cell, safety_table, sweep_table

SHOWN = 10  # per cent of perplexity increase; the upper limit of the figure
LOW_RANK = "Rank at 90 % energy"
_USES: dict[CodecFamily, str] = {"eigen": "To store", "live": "To generate"}
_PCA = "PCA, for research"
_TONES = {"v": "values", "k": "keys_pre_rope", "kv": "kv", "latent": "latent", "key_rope": "key_rope_pre_rope"}
_DASHES = {16: "solid", 8: "dash", 4: "dot"}


@dataclass(frozen=True)
class Shown:
    """One verdict as a page shows it; without a recommendation, `lines` gives the reason."""

    lines: list[str]
    compressible: list[Table]
    advice: list[Table]
    figure: Interactive | None


def shown(verdict: Verdict) -> Shown:
    """Return the parts of a page about one verdict."""
    if verdict.advice is None:
        return Shown([f"Compression was not measured: {verdict.reason}"], [], [], None)
    lines = advice_lines(verdict.advice)
    tables = [*advice_tables(verdict.advice), *evidence_tables(verdict.advice)]
    sweep = verdict.advice.sweeps.get("given")
    if sweep is None:
        return Shown(lines, [], tables, None)
    return Shown(lines, [safety_table(sweep), sweep_table(sweep)], tables, loss_figure(sweep))


def short_table(report: ReportRecord, names: Sequence[str]) -> Table | None:
    """Return one row per model: ranks, ratios and recommendation; None if no model has one.

    Args:
        report: The probes and verdicts.
        names: One name per probe.
    """
    advised = [verdict.advice for verdict in report.verdicts if verdict.advice]
    if not advised:
        return None
    series = [s for advice in advised if "given" in advice.sweeps for s in advice.sweeps["given"].series]
    targets = list(dict.fromkeys(s.target for s in series))
    counts = Counter(s.target for s in series)
    headings = {target: f"{_capital(target)}: largest ratio within the budget" for target in targets}
    budget = advised[0].budget
    families: list[CodecFamily] = list(dict.fromkeys(one.family for advice in advised for one in advice.codecs))
    columns = (
        "Model",
        LOW_RANK,
        *(_USES[family] for family in families),
        *headings.values(),
        _PCA if families else "Recommendation",
        "Ratio",
        "ΔNLL (nats)",
    )
    rows = tuple(
        (name, low_rank(record), *_codec_cells(verdict.advice, families), *_cells(verdict.advice, targets))
        for name, record, verdict in zip(names, report.probes, report.verdicts, strict=True)
    )
    notes = (
        f"Within the budget: the upper end of the interval of ΔNLL is at most {budget.nats:.5f} nats ({budget.given}). "
        "Ratio = bytes of the 16-bit cache / bytes of the cache with the target compressed. Side information is stored once "
        "and not included.",
        "The loss is on the tokens that the choice used. `eigencache recommend MODEL` searches more settings and states the "
        "loss on held-out text.",
    )
    words = frozenset({LOW_RANK, "Recommendation", _PCA, *_USES.values()})
    rarest_first = [headings[target] for target in sorted(reversed(targets), key=counts.__getitem__)]
    return Table("Summary", columns, rows, notes=notes, words=words, hidden_first=(LOW_RANK, *rarest_first))


def low_rank(record: ProbeRecord) -> str:
    """Return the rank at 90 % energy, centered, in-sample: `K 23.3 of 64 per layer, 57 of 448 over all layers` and V."""
    chosen = pair(record)
    words = {chosen.key_before: "K", chosen.value: "V"}
    if "latent" in record.names:
        words = {"latent": "latent", "key_rope_pre_rope": "rotary key"}
    parts = []
    for name, word in words.items():
        spectra = layers_of(record, name)
        if not spectra:
            continue
        mean = over_layers(of_spectrum(s, s.rank_90) for s in spectra)
        part = f"{word} {mean.text(count)} of {spectra[0].width} per layer"
        for joined in record.select(name, "all"):
            part += f", {of_spectrum(joined, joined.rank_90).text(count)} of {joined.width} over all layers"
        parts.append(part)
    return "\n".join(parts) or ABSENT


def _capital(target: str) -> str:
    words = WORDS[target].removeprefix("the ")
    return words[0].upper() + words[1:]


def _codec_cells(advice: Advice | None, families: Iterable[CodecFamily]) -> list[str]:
    """Return the codec of every family within the budget, with its ratio."""
    codecs = {one.family: one for one in advice.codecs} if advice else {}
    cells = []
    for family in families:
        one = codecs.get(family)
        if one is None or not one.candidates:
            cells.append("not measured")
        elif one.chosen is None:
            cells.append("nothing within the budget")
        else:
            longer = one.chosen.longer
            cells.append(f"{one.chosen.describe()}: ratio {longer.ratio:.2f} at {longer.context:,} tokens")
    return cells


def _cells(advice: Advice | None, targets: Iterable[str]) -> tuple[str, ...]:
    if advice is None:
        return (*(ABSENT for _ in targets), "not measured", ABSENT, ABSENT)
    sweep = advice.sweeps.get("given")
    if sweep is None:
        return (*(ABSENT for _ in targets), "not measured", ABSENT, ABSENT)
    best = [_furthest_of(sweep, target, advice.budget.nats) for target in targets]
    ratios = (f"{quality.compression_ratio:.2f}" if quality else ABSENT for quality in best)
    if advice.chosen is None:
        return (*ratios, "nothing within the budget: keep 16 bits", ABSENT, ABSENT)
    quality = advice.chosen.choosing
    return (*ratios, f"compress {advice.chosen.describe()}", f"{quality.compression_ratio:.2f}", interval_cell(quality))


def _furthest_of(sweep: SweepRecord, target: str, nats: float) -> Quality | None:
    """Return the point of a target with the largest ratio whose interval is within a loss; None if none is."""
    points = [point for series in sweep.series if series.target == target for point in series.points]
    point = furthest(points, expm1(nats), certain=True)
    return point.quality if point else None


def loss_figure(record: SweepRecord) -> Interactive:
    """Return the figure of the perplexity increase by ratio, one line per series."""
    return Interactive(
        name="loss",
        title="Loss by ratio",
        caption=f"perplexity increase by ratio of the whole cache, with 95 % intervals, up to {SHOWN} %",
        traces=[_trace(series) for series in record.series],
        x="bytes of the 16-bit cache / bytes of the compressed cache",
        y="perplexity increase (%)",
        axes={"xaxis": {"type": "log"}, "yaxis": {"range": [-1, SHOWN]}},
    )


def _trace(series: SweepSeries) -> dict:
    rotated_keys = series.frame == "post" and series.target == "k"
    points = sorted((point.quality for point in series.points), key=lambda q: q.compression_ratio)
    trace = {
        "type": "scatter",
        "mode": "lines+markers",
        "name": series.name,
        "x": [quality.compression_ratio for quality in points],
        "y": [100 * quality.perplexity_increase for quality in points],
        "tone": "keys_post_rope" if rotated_keys else _TONES.get(series.target, "reference"),
        "dash": _DASHES.get(series.bits, "solid"),
    }
    ends = [quality.delta_nll_interval for quality in points]
    if all(ends):
        above = [100 * expm1(end[1]) - y for end, y in zip(ends, trace["y"], strict=True) if end]
        below = [y - 100 * expm1(end[0]) for end, y in zip(ends, trace["y"], strict=True) if end]
        bars = {"type": "data", "symmetric": False, "array": above, "arrayminus": below, "thickness": 1}
        trace["error_y"] = {key: [max(0.0, x) for x in v] if key.startswith("array") else v for key, v in bars.items()}  # type: ignore[union-attr]
    return trace
