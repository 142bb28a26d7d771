"""Plots draw every kind of record, say what they show, and are written whole or not at all."""

import numpy as np
import pytest

from eigencache.errors import OutputError
from eigencache.report.core.drawing import save_figure
from eigencache.report.core.series import held_out_eigenvalues, thin
from eigencache.report.probe.interactive import cross_figures, model_figures
from eigencache.report.probe.plots import plot_compare, plot_probe, plot_spread

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", ["gqa", "mha", "mla", "scarce"])
@pytest.mark.parametrize("plot", [plot_probe, plot_spread])
def test_every_record_is_drawn_with_model_and_frame_named(name: str, plot, request, tmp_path) -> None:
    record = request.getfixturevalue(name)
    figure = plot(record)
    words = figure._suptitle.get_text() + " ".join(axes.get_title() for axes in figure.axes)
    assert "centered" in words
    save_figure(figure, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_models_are_compared_in_one_figure(all_records, tmp_path) -> None:
    save_figure(plot_compare(all_records), tmp_path / "plot.svg")
    assert "<svg" in (tmp_path / "plot.svg").read_text()


def test_an_unknown_suffix_names_the_known_ones(gqa, tmp_path) -> None:
    with pytest.raises(OutputError, match="png"):
        save_figure(plot_spread(gqa), tmp_path / "plot.xyz")
    assert not list(tmp_path.iterdir())


def test_held_out_means_per_octave_add_up_to_the_whole(gqa) -> None:
    (spectrum,) = gqa.select("values", "layer", 0)
    ends = sorted(spectrum.held_out_energy)
    _, means = held_out_eigenvalues(spectrum)
    sizes = np.diff([0, *ends])
    assert sum(m * n for m, n in zip(means, sizes, strict=True)) == pytest.approx(spectrum.width)


def test_long_lines_are_thinned_but_keep_their_ends() -> None:
    chosen = thin(10_000, 512)
    assert chosen[0] == 0
    assert chosen[-1] == 9_999
    assert len(chosen) <= 512
    assert thin(100) == list(range(100))


def test_interactive_figures_hold_numbers_and_have_names_of_their_own(all_records) -> None:
    for record in all_records:
        figures = model_figures(record)
        assert len({figure.name for figure in figures}) == len(figures)
        assert all(figure.traces and figure.caption for figure in figures)
    assert {figure.name for figure in cross_figures(all_records)} == {"repetition", "ranks", "ratios"}
