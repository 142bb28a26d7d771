"""Drawing with matplotlib: new figures, their common style, and writing them to a file or into a page.

matplotlib is imported when a figure is made, so that tables work without it. Only its object-oriented API is used: no
`pyplot`, no backend, no change of `rcParams`.
"""

from __future__ import annotations

import io
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from eigencache.errors import MissingPackageError, OutputError
from eigencache.records.base import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")
INK, FAINT = "#1b1f24", "#d8dbe0"  # text; grid lines


def require(package: Literal["matplotlib", "plotly", "pandas"], purpose: str = "plots") -> None:
    """Check that an optional package can be imported.

    Args:
        package: The package to import.
        purpose: What needs it, in the plural; the error message begins with it.

    Raises:
        MissingPackageError: The package is not installed.
    """
    try:
        import_module(package)
    except ImportError as error:
        raise MissingPackageError(f"{purpose} need {package}: pip install 'eigencache[report]'") from error


def new_figure(width: float, height: float, title: str) -> Figure:
    """Return an empty figure with a title.

    Args:
        width: Width in inches.
        height: Height in inches.
        title: Title above all panels.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    require("matplotlib")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")
    figure.suptitle(title, fontsize=11, color=INK)
    return figure


def dress(axes: Axes, title: str, x: str, y: str) -> None:
    """Set the title and the axis labels of a panel, and the common style.

    Args:
        axes: The panel.
        title: Title of the panel.
        x: Label of the horizontal axis.
        y: Label of the vertical axis.
    """
    axes.set_title(title, fontsize=10, color=INK)
    axes.set_xlabel(x, fontsize=9, color=INK)
    axes.set_ylabel(y, fontsize=9, color=INK)
    axes.tick_params(labelsize=8, colors=INK)
    axes.grid(True, color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def legend(axes: Axes) -> None:
    """Add a legend if anything in the panel has a label."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, frameon=False)


def svg_of(figure: Figure, salt: str) -> str:
    """Return a figure as an `<svg>` element to embed in a page; the same figure and salt give the same text.

    Args:
        figure: The figure to render.
        salt: Seed of the ids inside the element; figures of one page need different ones.
    """
    import matplotlib

    data = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": salt}):
        figure.savefig(data, format="svg", metadata={"Date": None})
    text = data.getvalue().decode()
    return text[text.index("<svg") :]


def check_format(path: str | Path) -> str:
    """Return the suffix of a file for a figure.

    Raises:
        OutputError: The suffix is none of `FORMATS`.
        MissingPackageError: matplotlib is not installed.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        given = f"suffix {suffix}" if suffix else "no suffix"
        raise OutputError(f"{path}: a figure cannot be written with {given}: use {', '.join(FORMATS)}")
    require("matplotlib")
    return suffix


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure, completely or not at all, in the format of the suffix of `path`.

    Raises:
        OutputError: The suffix is none of `FORMATS`, or the file cannot be written.
    """
    suffix = check_format(path)
    rendered = io.BytesIO()
    figure.savefig(rendered, format=suffix[1:])
    write_whole(path, rendered.getvalue())
