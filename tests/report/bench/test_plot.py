"""The plot of a bench draws the KL of every method, means over seeds."""

import numpy as np

from eigencache.report.bench.plot import plot_bench
from planted_benches import bench, equal, point


def test_the_plot_draws_every_method_and_no_two_alike() -> None:
    names = [f"method {i}" for i in range(30)]
    points = [point(m, f"{b}", b, d, context=c) for m in names for b, d in ((1, 0.1), (2, -0.001)) for c in (384, 1920)]
    figure = plot_bench(bench(points, [equal("method 0", 0.03, 1.5)], contexts=(384, 1920)))
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == names
    assert len(figure.axes) == 2 and all(len(axes.containers) == 30 for axes in figure.axes)
    styles = {(line.get_color(), line.get_marker()) for line in (c.lines[0] for c in figure.axes[0].containers)}
    assert len(styles) == 30
    assert {axes.get_title() for axes in figure.axes} == {"context 384 tokens", "context 1,920 tokens"}


def test_lines_are_means_over_seeds_with_bits_ascending() -> None:
    """Of KL, which is the magnitude of ΔNLL in planted points."""
    points = [
        point("m", name, bits, delta, seed) for name, bits, delta in (("b", 2, 0.01), ("a", 1, 0.1)) for seed in range(2)
    ]
    points[-1] = point("m", "a", 1, 0.3, 1)
    (container,) = plot_bench(bench(points, [])).axes[0].containers
    np.testing.assert_allclose(container.lines[0].get_xydata(), [[1, 0.2], [2, 0.01]])


def test_a_method_without_a_point_at_one_length_is_left_out_there() -> None:
    points = [point("a", "1", 1, 0.1), point("a", "1", 1, 0.1, context=1920), point("b", "1", 1, 0.1)]
    figure = plot_bench(bench(points, [], contexts=(384, 1920)))
    assert [len(axes.containers) for axes in figure.axes] == [2, 1]
