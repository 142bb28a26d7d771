"""The page loads nothing, escapes every string, and its script draws every figure in a real browser."""

import base64
import gzip
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from eigencache.records.advice import ReportRecord
from eigencache.report.html import page, write_report

BROWSER = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
QUIET = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-component-update"]
QUIET += ["--disable-background-networking", "--disable-sync", "--virtual-time-budget=15000"]


def test_nothing_is_loaded_from_anywhere(all_records) -> None:
    html = page(ReportRecord(probes=all_records))
    assert not re.search(r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)\s*=", html)
    assert "@import" not in html
    assert html.count("plotly.js v") == 1


def test_every_string_is_escaped(gqa) -> None:
    evil = "</script><img src=x onerror=alert(1)>"
    model = gqa.model.model_copy(update={"name": evil})
    html = page(ReportRecord(probes=[gqa.model_copy(update={"model": model, "warnings": [evil]})]))
    assert evil not in html
    assert "<img src=x" not in html


def test_every_figure_has_its_numbers_and_words(all_records) -> None:
    html = page(ReportRecord(probes=all_records))
    figures = set(re.findall(r'data-figure="([^"]+)"', html))
    assert figures
    assert figures == set(re.findall(r'data-csv="([^"]+)"', html))
    assert len(re.findall(r'role="img" aria-label="[^"]{10,}"', html)) == len(figures)


def test_the_data_in_the_page_are_the_records(all_records) -> None:
    packed = re.search(r'id="records">([^<]+)<', page(ReportRecord(probes=all_records))).group(1)
    assert ReportRecord.model_validate_json(gzip.decompress(base64.b64decode(packed))).probes == all_records


def test_warnings_come_before_the_numbers(scarce) -> None:
    html = page(ReportRecord(probes=[scarce]))
    assert html.index("Warnings: statistics that the sample cannot support") < html.index("<table")


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on the PATH")
@pytest.mark.parametrize("width", [1280, 360])
def test_a_browser_draws_every_figure_without_error_or_sideways_scroll(all_records, tmp_path: Path, width: int) -> None:
    write_report(ReportRecord(probes=all_records), tmp_path / "report.html")
    frame = f'<iframe id="f" src="report.html#selftest" style="width:{width}px;height:900px;border:0"></iframe>'
    tell = "setInterval(() => Object.assign(document.body.dataset, f.contentDocument.documentElement.dataset), 200)"
    (tmp_path / "harness.html").write_text(f"<body>{frame}<script>{tell}</script></body>")
    command = [BROWSER, *QUIET, f"--user-data-dir={tmp_path / 'profile'}", "--allow-file-access-from-files", "--dump-dom"]
    url = (tmp_path / "harness.html").as_uri()
    dom = subprocess.run([*command, url], capture_output=True, text=True, timeout=120).stdout
    said = dict(re.findall(r'data-(\w+)="([^"]*)"', re.search(r"<body[^>]*>", dom).group(0)))
    assert "error" not in said, said
    assert int(said["drawn"]) == page(ReportRecord(probes=all_records)).count('class="plot"')
    assert int(said["overflow"]) <= 0
    assert said["csv"] == "true"
