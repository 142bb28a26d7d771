"""The HTML report: one self-contained page with warnings, tables, interactive figures and the records as JSON."""

import base64
import gzip
import json
from collections.abc import Iterable
from dataclasses import replace
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from eigencache.records.advice import ReportRecord
from eigencache.records.base import write_whole
from eigencache.records.probe import ProbeRecord
from eigencache.report.advice.verdict import Shown, short_table, shown
from eigencache.report.core.drawing import require
from eigencache.report.core.lookup import all_warnings
from eigencache.report.core.measured import LEGEND, short_names
from eigencache.report.core.palette import DARK, LIGHT
from eigencache.report.probe.assess import RULE, assess
from eigencache.report.probe.comparison import classic_table, compare_table
from eigencache.report.probe.interactive import Interactive, cross_figures, model_figures
from eigencache.report.probe.sinks import sinks_sentence, sinks_table
from eigencache.report.probe.spread_table import spread_sentences, spread_table
from eigencache.report.probe.tables import geometry_lines, probe_table

_LAYERS = {  # color scale from the first layer to the last
    "light": [[68, 1, 84], [59, 82, 139], [33, 145, 140], [70, 160, 80]],
    "dark": [[180, 150, 255], [110, 170, 255], [80, 210, 190], [210, 230, 100]],
}
_METHOD = (
    ("energy@k", "share of the sum of all eigenvalues in the leading k; held-out: the basis is from one half of the "
     "sequences, the energy from the other half; mean of both ways"),
    ("effective rank", "exp(−Σ p ln p), p = σ/Σσ, σ the singular values (Roy & Vetterli 2007)"),
    ("independent vectors", "n / autocorrelation time of the leading directions (batch means over sequences), or the "
     "number of distinct 8-token contexts if smaller; after rotation at most as many as before it"),
    ("null", "white noise of the same total variance: Marchenko–Pastur with γ = dimensions / independent vectors"),
    ("intervals", "95 %, bootstrap over groups of whole sequences"),
    ("spread", "largest / smallest standard deviation of the raw dimensions that vary; also the 95th / 5th percentile "
     "(p95/p5)"),
    ("attention sink", "a token that most queries attend to: share = mean attention weight on it, over the queries at least "
     "16 positions later that can attend to it"),
    ("! and —", "doubtful: fewer than 10 independent vectors per dimension; withheld: the sample cannot support the number"),
)  # fmt: skip


def write_report(report: ReportRecord, path: str | Path) -> None:
    """Write the report as one HTML page, completely or not at all.

    Args:
        report: The probes and verdicts.
        path: The file to write.

    Raises:
        OutputError: The file cannot be written.
        MissingPackageError: plotly is not installed.
    """
    write_whole(path, page(report).encode())


def page(report: ReportRecord) -> str:
    """Return the report as an HTML page that loads nothing from the network.

    Raises:
        MissingPackageError: plotly is not installed.
    """
    require("plotly", "HTML reports")
    from plotly.offline import get_plotlyjs

    records = report.probes
    names = short_names(records)
    verdicts = dict(zip(names, map(shown, report.verdicts), strict=False))
    sections = [(name, record, model_figures(record)) for name, record in zip(names, records, strict=True)]
    across = cross_figures(records)
    figures = {figure.name: figure.data for figure in across}
    figures |= {f"{name}-{figure.name}": figure.data for name, _, drawn in sections for figure in drawn}
    figures |= {f"{name}-{v.figure.name}": v.figure.data for name, v in verdicts.items() if v.figure}
    everything = report.model_dump_json().encode()
    summary = short_table(report, names)
    scripts = [
        _json("figures", figures),
        _json("palette", {"light": LIGHT, "dark": DARK, "layers": _LAYERS}),
        f'<script type="application/gzip" id="records">{_packed(everything)}</script>',
        f"<script>{get_plotlyjs()}</script>",
        f"<script>{_asset('page.js')}</script>",
    ]
    links = "".join(f'<a href="#{_anchor(name)}">{escape(name)}</a>' for name in names)
    body = [
        '<header><h1>Spectra and compressibility of the KV cache</h1><p class="lead">Spectra of the cached keys, values and '
        "latents, and the loss of compressing them. Statistics that the sample cannot support are marked or withheld.</p>"
        f'<nav>{links}<a href="#method">method</a><button id="theme" type="button">Dark</button>'
        '<button id="json" type="button">All numbers (JSON)</button></nav></header><main>',
        _warnings(f"{name}: {warning}" for name, record, _ in sections for warning in all_warnings(record)),
        summary.html() if summary else "",
        "<h2>Models compared</h2>",
        _assessments(records, names),
        replace(compare_table(records), notes=LEGEND).html(),
        _grid(across, ""),
        "<h2>Bias of the original probe</h2><p>The original probe measured energy@32 in-sample (centered, post-RoPE, heads "
        "concatenated) on four sentences repeated to fill 64 samples, so its numbers reflect the repetition. The tables "
        "compare them with the same statistic on this text, and with held-out energy before rotation.</p>",
        *(classic_table(record).html() for record in records),
        *(_section(name, record, drawn) + _verdict(name, verdicts.get(name)) for name, record, drawn in sections),
        _method(),
        "</main>",
        _footer(report),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        'content="width=device-width, initial-scale=1"><title>Eigencache report</title>'
        f"<style>{_asset('page.css')}</style></head><body>{''.join(body)}{''.join(scripts)}</body></html>\n"
    )


def _asset(name: str) -> str:
    return (resources.files("eigencache.report.assets") / name).read_text(encoding="utf8")


def _packed(data: bytes) -> str:
    return base64.b64encode(gzip.compress(data, mtime=0)).decode()


def _json(identity: str, data: Any) -> str:
    """Return a script element with JSON data; no string in the data can end the element."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json" id="{identity}">{text}</script>'


def _anchor(name: str) -> str:
    return escape("model-" + "".join(c if c.isalnum() else "-" for c in name), quote=True)


def _warnings(lines: Iterable[str]) -> str:
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    if not items:
        return ""
    title = "Warnings: statistics that the sample cannot support"
    return f'<section class="warnings" role="note"><h3>{title}</h3><ul>{items}</ul></section>'


def _assessments(records: list[ProbeRecord], names: list[str]) -> str:
    assessed = [(name, assess(record)) for name, record in zip(names, records, strict=True)]
    rows = (f"<dt>{escape(n)}</dt><dd><b>{escape(a.verdict)}</b>: {escape('; '.join(a.reasons))}</dd>" for n, a in assessed)
    return f'<div class="card"><dl>{"".join(rows)}</dl><p class="note">{escape(RULE)}</p></div>'


def _grid(figures: list[Interactive], prefix: str) -> str:
    return f'<div class="grid">{"".join(_figure(figure, prefix + figure.name) for figure in figures)}</div>'


def _figure(figure: Interactive, key: str) -> str:
    key, title = escape(key, quote=True), escape(figure.title)
    return (
        f'<figure class="figure"><h3>{title}</h3><p class="caption">{escape(figure.caption)}</p>'
        f'<div class="plot" data-figure="{key}" role="img" aria-label="{title}: {escape(figure.caption, quote=True)}"></div>'
        f'<div class="foot"><button type="button" data-csv="{key}">CSV</button></div></figure>'
    )


def _section(name: str, record: ProbeRecord, figures: list[Interactive]) -> str:
    corpus = record.corpus
    facts = (
        ("text", f"{corpus.name}, sha256 {corpus.sha256[:16]}"),
        ("tokens", f"{corpus.tokens:,} in {corpus.sequences:,} sequences of at most {corpus.max_length:,}"),
        ("distinct", f"{corpus.distinct_token_ids:,} token ids, {corpus.distinct_8grams:,} 8-token contexts, "
         f"{corpus.repetition:.1%} repeated"),
    )  # fmt: skip
    lines = "".join(f"<li>{escape(line)}</li>" for line in geometry_lines(record))
    sentences = "".join(f"<p>{escape(sentence)}.</p>" for sentence in (*_rotation(record), *spread_sentences(record)))
    return (
        f'<h2 id="{_anchor(name)}">{escape(name)}</h2><div class="card"><ul>{lines}</ul>{_facts(facts)}</div>'
        f"{_warnings(all_warnings(record))}{_grid(figures, f'{name}-')}{sentences}"
        f"{probe_table(record).html()}{spread_table(record).html()}{_sinks(record)}"
    )


def _sinks(record: ProbeRecord) -> str:
    """Return the sentence and the table of attention sinks; nothing for records of earlier versions."""
    if record.sinks is None:
        return ""
    reasons = "".join(f"<p>{escape(reason)}.</p>" for reason in record.sinks.reasons)
    return f"<p>{escape(sinks_sentence(record))}</p>{sinks_table(record).html()}{reasons}"


def _verdict(name: str, verdict: Shown | None) -> str:
    if verdict is None:
        return ""
    lines = "".join(f"<p>{escape(line)}</p>" for line in verdict.lines)
    if not verdict.advice:
        return f"<h3>Compressibility</h3>{lines}"
    ways, *behind = (table.html() for table in verdict.advice)
    advice = (
        f"<h3>Recommendation</h3>{lines}{ways}"
        f"<details><summary>Evidence and limitations</summary>{''.join(behind)}</details>"
    )
    if not verdict.figure:
        return advice
    safe, *points = (table.html() for table in verdict.compressible)
    return (
        f"{advice}<h3>Compression ratio and loss</h3>{safe}{_grid([verdict.figure], f'{name}-')}"
        f"<details><summary>All measured points</summary>{''.join(points)}</details>"
    )


def _rotation(record: ProbeRecord) -> tuple[str, ...]:
    """Return a sentence on the share of the key variance that rotation causes; none for models without rotation."""
    if not record.frames:
        return ()
    shares = [frame.rotated_mean_share for frame in record.frames]
    mean = sum(shares) / len(shares)
    return (
        f"Rotation turns the shared mean of the keys into variance: this is {mean:.0%} of the variance after rotation "
        f"(mean over layers; {min(shares):.0%} to {max(shares):.0%}). Compressing keys before rotation avoids it",
    )


def _facts(facts: Iterable[tuple[str, str]]) -> str:
    return f"<dl>{''.join(f'<dt>{escape(term)}</dt><dd>{escape(text)}</dd>' for term, text in facts)}</dl>"


def _method() -> str:
    return f'<h2 id="method">Method</h2><div class="card">{_facts(_METHOD)}</div>'


def _footer(report: ReportRecord) -> str:
    rows = []
    runs = [(record.model.name, "probe", record.run) for record in report.probes]
    advised = [verdict.advice for verdict in report.verdicts if verdict.advice]
    runs += [(a.model.name, "verdict", a.run if a.codecs else a.sweeps["given"].run) for a in advised]
    for name, part, run in runs:
        settings = ", ".join(f"{key} {value}" for key, value in run.settings.items())
        rows.append(
            f"{name}, {part}: {run.wall_s:.1f} s ({run.forward_s:.1f} s in forward passes), peak "
            f"{run.peak_memory_mb:,.0f} MB, {run.machine}; eigencache {run.eigencache}, torch {run.torch}, transformers "
            f"{run.transformers}, Python {run.python}; seed {run.seed}; {settings}; {run.started}"
        )
    return f"<footer>{''.join(f'<p>{escape(row)}</p>' for row in rows)}</footer>"
