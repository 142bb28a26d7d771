"""The table and the heat map of attention sinks: attention received by the first tokens, norms, and gradient energy."""

from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING

from eigencache.records.probe import LayerSinks, ProbeRecord, SlotSinks
from eigencache.report.core.drawing import dress, new_figure
from eigencache.report.core.measured import ABSENT
from eigencache.report.core.palette import SCALE
from eigencache.report.core.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SHORT = {"keys": "K", "values": "V", "latent": "latent", "key_rope": "rotary key"}
_MISSING = "attention sinks were not measured: this record is of an earlier version"


def sinks_table(record: ProbeRecord) -> Table:
    """Return one row per layer: attention on first tokens, norms and gradient energy, each as a range over the heads.

    Args:
        record: The probe record.

    Returns:
        A table; without rows if the record has no attention sinks.
    """
    title = f"{record.model.name}: attention sinks"
    if record.sinks is None:
        return Table(title, ("Layer",), (), warnings=(_MISSING,))
    layers = record.sinks.layers
    kinds = list(dict.fromkeys(_SHORT[slot.kind] for layer in layers for slot in layer.slots))
    energies = any(slot.gradient_share is not None for layer in layers for slot in layer.slots)
    columns = ("Layer", "First token", "First four", "Largest other")
    columns += tuple(f"First {kind} norm" for kind in kinds) + tuple(f"Largest {kind} norm" for kind in kinds)
    columns += tuple(f"{kind} gradient" for kind in kinds) if energies else ()
    rows = [_row(layer, kinds, energies) for layer in layers]
    title = f"{title}, {record.sinks.tokens:,} tokens in {record.sinks.sequences} sequences"
    return Table(title, columns, tuple(rows), _notes(record, energies), tuple(record.sinks.reasons))


def _row(layer: LayerSinks, kinds: Sequence[str], energies: bool) -> tuple[str, ...]:
    slots = {_SHORT[slot.kind]: slot for slot in layer.slots}
    cells = [str(layer.layer_idx), _range(layer.first_share), _range(layer.first_four_share), _other(layer)]
    cells += [_range(_over_median(slots[kind], slots[kind].first_norm)) if kind in slots else ABSENT for kind in kinds]
    cells += [_largest(slots[kind]) if kind in slots else ABSENT for kind in kinds]
    if energies:
        shares = [slots[kind].gradient_share if kind in slots else None for kind in kinds]
        cells += [ABSENT if share is None else _share(share) for share in shares]
    return tuple(cells)


def _notes(record: ProbeRecord, energies: bool) -> tuple[str, ...]:
    assert record.sinks is not None
    notes = [
        "First token, first four: share of the attention weights, mean over the queries at least 16 positions after the "
        "fourth that can attend to them; range over KV heads. Largest other: the largest such share of a later position, "
        "and that position. Norms: first token / median of all tokens, largest / median and its position.",
    ]
    if energies:
        notes.append("Gradient: share of E|g|², the gradient of the loss, that the first four tokens have.")
    if record.sinks.exact_tokens is not None:
        notes.append(f"A fit in the Fisher metric stores the first {record.sinks.exact_tokens} tokens exactly.")
    return tuple(notes)


def sinks_sentence(record: ProbeRecord) -> str:
    """Return one sentence on the attention that the first tokens receive; empty if it was not measured."""
    layers = [layer for layer in record.sinks.layers if layer.first_share] if record.sinks else []
    if not layers:
        return ""
    first, four = [_mean(layer.first_share) for layer in layers], [_mean(layer.first_four_share) for layer in layers]
    return (
        f"Attention on the first token: {median(first):.0%} (median of the layers; {min(first):.0%}–{max(first):.0%}), on "
        f"the first four: {median(four):.0%}."
    )


def first_shares(record: ProbeRecord) -> tuple[list[int], list[list[float]]]:
    """Return the layers with measured attention, and their shares on the first token by KV head."""
    layers = [layer for layer in record.sinks.layers if layer.first_share] if record.sinks else []
    return [layer.layer_idx for layer in layers], [layer.first_share for layer in layers]


def plot_sinks(record: ProbeRecord) -> "Figure":
    """Plot the share of attention on the first token as a heat map of layers and KV heads."""
    layers, shares = first_shares(record)
    figure = new_figure(8.0, 4.6, f"Attention on the first token: {record.model.name}")
    axes = figure.subplots()
    if not layers:
        axes.text(0.5, 0.5, "attention was not measured", transform=axes.transAxes, ha="center", va="center", fontsize=9)
        return figure
    heads = max(map(len, shares))
    grid = [[row[head] if head < len(row) else float("nan") for row in shares] for head in range(heads)]
    image = axes.imshow(grid, cmap=SCALE, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    dress(axes, f"{record.corpus.name}, mean over queries at least 16 positions later", "layer", "KV head")
    axes.grid(False)
    for axis, labels in ((axes.xaxis, layers), (axes.yaxis, list(range(heads)))):
        step = max(1, len(labels) // 12)
        axis.set_ticks(range(0, len(labels), step), [str(label) for label in labels[::step]])
    figure.colorbar(image, ax=axes, shrink=0.9).set_label("share of attention", fontsize=9)
    return figure


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _over_median(slot: SlotSinks, norms: Sequence[float]) -> list[float]:
    return [norm / middle if middle else float("inf") for norm, middle in zip(norms, slot.median_norm, strict=True)]


def _share(value: float) -> str:
    return ">0.99" if 0.995 <= value < 1 else f"{value:.2f}"


def _range(values: Sequence[float]) -> str:
    """Write the smallest and the largest of the heads: `0.31–0.52`; a dash without values."""
    if not values:
        return ABSENT
    low, high = _share(min(values)), _share(max(values))
    return low if low == high else f"{low}–{high}"


def _other(layer: LayerSinks) -> str:
    """Write the largest share of a later position over the heads, and the position: `0.04 @ 37`."""
    known = [pair for pair in zip(layer.other_share, layer.other_position, strict=True) if pair[1] >= 0]
    if not known:
        return ABSENT
    share, position = max(known)
    return f"{share:.3f} @ {position}"


def _largest(slot: SlotSinks) -> str:
    """Write the largest norm relative to the median over the heads, and its position: `12.4 @ 0`."""
    ratio, position = max(zip(_over_median(slot, slot.largest_norm), slot.largest_position, strict=True))
    return f"{ratio:.1f} @ {position}"
