"""Without matplotlib, plotly and pandas tables work, and plots fail with one error that names the extra."""

import os
import subprocess
import sys

import pytest

import cli_process

SCRIPT = """
import sys
for name in ("matplotlib", "plotly", "pandas"):
    sys.modules[name] = None
import eigencache.report.adapters.plot, eigencache.report.bench.page, eigencache.report.html, eigencache.report.speed
import eigencache.report.probe.plots, eigencache.report.quality.sweep_plot
from eigencache.errors import EigencacheError
from eigencache.report.core.drawing import check_format, new_figure
from eigencache.report.core.table import Table
assert "1" in Table("t", ("a", "b"), (("x", "1"),)).markdown()
from eigencache.records.advice import ReportRecord
page = eigencache.report.html.page
for failing in (lambda: new_figure(1, 1, ""), lambda: check_format("x.png"), lambda: page(ReportRecord(probes=[]))):
    try:
        failing()
    except EigencacheError as error:
        print(error)
"""


@pytest.mark.parametrize("missing", ["plots need matplotlib", "HTML reports need plotly"])
def test_a_missing_package_is_named_with_the_extra_that_installs_it(missing: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=os.environ | cli_process.ENVIRONMENT
    )
    assert run.returncode == 0, run.stderr
    assert f"{missing}: pip install 'eigencache[report]'" in run.stdout
    assert len(run.stdout.splitlines()) == 3
