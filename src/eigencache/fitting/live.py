"""Fit the live codec: bases and quantization steps per bundle of heads, and bit widths for a rate.

Keys are fitted as attention reads them, after rotation. Each sequence is rotated to a random start within the positions
that the model supports, and the metric of the keys is averaged over those positions. Steps that are fitted to the angles
of short texts only would saturate on long ones. Where the mean of the keys before rotation is large, it is subtracted.

Bit widths of all layers, keys and values are allocated with one Lagrange multiplier, the price of a bit (reverse
water-filling with measured distortions, THEORY 6).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from eigencache.calibration.calibration_set import CalibrationSet
from eigencache.calibration.vectors import SampledVectors
from eigencache.codec.live.codec import LiveCodec
from eigencache.codec.live.packed_heads import PackedHeads
from eigencache.codec.sinks_and_window import FIRST_EXACT
from eigencache.errors import BudgetError
from eigencache.fitting.eigen_basis import scaled_metrics
from eigencache.fitting.limits import check_at_least
from eigencache.fitting.live_slot import FittedSlot, fit_slot
from eigencache.fitting.weighed_vectors import rows_after
from eigencache.kernels.packed.format import GROUP
from eigencache.memory import release
from eigencache.spectral.rope import Rotation, rotate
from eigencache.spectral.spectrum import dead_dimensions, variances_and_mean_squares

VECTORS = 16_384  # vectors that bases and steps are fitted on
SAFE = 6.875  # bits per value; with sinks and a window still 2.2 times smaller than 16 bits at 2,048 tokens
REACH = 4096  # positions, for a model whose config has no `max_position_embeddings`
_ROWS = 4096  # vectors at a time
_ROUNDS = 50  # bisections of the price of a bit
_METRIC_POSITIONS = 256  # positions over which the metric of rotated keys is averaged


@dataclass(frozen=True)
class LiveSettings:
    """Settings of a live codec.

    Args:
        alpha: exponent of the Fisher metric. None is 0.75, or 1 without rotation, where first tokens are rare and far off.
        shared: most numbers per token of the heads that share a basis. More numbers take fewer bytes and more time.
        sinks: first positions, which are never packed. None is 4, or more where gradients show more attention sinks.
        window: most recent tokens that are not packed.
        reach: positions at which keys are expected. None is as many as the model supports.

    Raises:
        CodecError: a number is below its least value.
    """

    alpha: float | None = None
    shared: int = 128
    sinks: int | None = None
    window: int = 0
    reach: int | None = None

    def __post_init__(self) -> None:
        check_at_least(self, alpha=0, shared=1, sinks=0, window=0, reach=1)

    @property
    def least_exact(self) -> int:
        """First and last tokens that are not packed; a fit may add first tokens."""
        return (FIRST_EXACT if self.sinks is None else self.sinks) + self.window

    def describe(self) -> str:
        """Return one line for tables."""
        return "live" if self.alpha is None else f"live · fisher^{self.alpha:g}"


def check_bits(bits: float, name: str = "bits") -> None:
    """Raise `BudgetError`, which calls the rate by `name`, unless it is above 0 and at most 8 bits per packed value."""
    if not 0 < bits <= 8:
        raise BudgetError(f"`{name}`={bits:g} is out of range: use more than 0 and at most 8 bits per packed value.")


@dataclass(frozen=True, eq=False)
class LiveFit:
    """A fitted live codec without bit widths, from which a codec of any rate is made.

    Args:
        settings: settings of the fit; `alpha` is resolved.
        slots: (layer, slot) → its transform, steps and distortions.
        sinks: first positions, which are never packed.
        dtype: dtype of the model.
        reach: positions at which keys are expected.
    """

    settings: LiveSettings
    slots: Mapping[tuple[int, int], FittedSlot]
    sinks: int
    dtype: torch.dtype
    reach: int

    def at_bits(self, bits: float, name: str | None = None) -> LiveCodec:
        """Return the codec with the highest rate that is at most `bits` per packed value.

        Raises:
            BudgetError: `bits` is not above 0 and at most 8, or too low for one group of coefficients.
        """
        return self._codec(self._widths_at(bits), name or f"{self.settings.describe()} · {bits:g} bits")

    def saturated(self, bits: float) -> float:
        """Return the share of the packed coefficients of the calibration vectors that are out of range in `at_bits`."""
        widths = self._widths_at(bits)
        shares = [
            self.slots[place].saturated[b][widths[place] == b] for place in self.slots for b in self.slots[place].saturated
        ]
        return float(torch.cat(shares).double().mean())

    def _widths_at(self, bits: float) -> dict[tuple[int, int], Tensor]:
        """Return the bit widths of the highest rate that is at most `bits` per packed value; errors as for `at_bits`."""
        check_bits(bits)
        low, high = -60.0, 60.0  # logarithm of the price of a bit
        for _ in range(_ROUNDS):
            middle = (low + high) / 2
            low, high = (middle, high) if self._rate(self._widths(math.exp(middle))) > bits else (low, middle)
        widths = self._widths(math.exp(high))
        if not self._rate(widths):
            raise BudgetError(f"{bits:g} bits per value are too few for one group of {GROUP} coefficients. Use more.")
        return widths

    def safe(self) -> LiveCodec:
        """Return the codec of 6.9 bits per value, which loses less than 8 bits for all keys and 4 for all values."""
        return self.at_bits(SAFE, "live · safe")

    def _widths(self, price: float) -> dict[tuple[int, int], Tensor]:
        """Return the bit widths of every slot at a price of a bit."""
        return {place: slot.widths(price) for place, slot in self.slots.items()}

    def _rate(self, widths: Mapping[tuple[int, int], Tensor]) -> float:
        """Return the bits per value of these bit widths."""
        bits = sum(int(slot_bits.sum()) for slot_bits in widths.values())
        return bits / sum(slot.mean.numel() for slot in self.slots.values())

    def _codec(self, widths: Mapping[tuple[int, int], Tensor], name: str) -> LiveCodec:
        layers: dict[int, list[PackedHeads]] = {}
        for place, slot in sorted(self.slots.items()):
            layers.setdefault(place[0], []).append(slot.at(widths[place]))
        pairs = {i: (keys, values) for i, (keys, values) in layers.items()}
        return LiveCodec(name, pairs, self.sinks, self.settings.window, self.dtype, self.reach)


def fit_live(source: CalibrationSet, settings: LiveSettings | None = None) -> LiveFit:
    """Fit the transforms, steps and distortions of a live codec.

    Args:
        source: the model and the calibration text.
        settings: settings of the codec; by default `LiveSettings()`.

    Raises:
        StatisticsError: no sequence is longer than the sinks.
    """
    settings = settings or LiveSettings()
    if settings.alpha is None:
        settings = replace(settings, alpha=0.75 if source.samples.layout.rotations else 1.0)
    alpha = settings.alpha
    assert alpha is not None
    longest = max(source.samples.lengths)
    reach = settings.reach or getattr(source.session.loaded.model.config, "max_position_embeddings", None) or REACH
    reach = reach if source.samples.layout.rotations else longest
    sinks = source.sinks if settings.sinks is None else settings.sinks
    chosen, positions = _chosen(source, sinks, reach)
    metrics = _stored_metric(source, reach)
    places = sorted(metrics)
    rotations = {(i, slot): rotation for i, (slot, rotation) in source.samples.layout.rotations.items()}
    stored = lambda place: _stored(source.samples, place, chosen, positions, rotations.get(place))  # noqa: E731
    live = [_live(stored(place)) for place in places]
    roots, inverses = scaled_metrics([metrics[place] for place in places], alpha, live)
    slots = {}
    for done, (place, root, inverse) in enumerate(zip(places, roots, inverses, strict=True), 1):
        slots[place] = fit_slot(stored(place), positions, rotations.get(place), root, inverse, settings.shared)
        release()
        source.session.on_progress("fitting bases and steps of the live cache", done, len(places))
    return LiveFit(settings, slots, sinks, source.session.loaded.model.dtype, reach)


def _stored_metric(source: CalibrationSet, reach: int) -> dict[tuple[int, int], Tensor]:
    """Return the Fisher metric [heads, dim, dim] by (layer, slot); of rotated keys E[R_n M R_nᵀ] over positions n."""
    layout = source.samples.layout
    metrics = {(part.layer_idx, part.slot): m for part, m in zip(layout.parts, source.metric("fisher"), strict=True)}
    positions = torch.linspace(0, reach - 1, _METRIC_POSITIONS).long()
    for layer_idx, (slot, rotation) in layout.rotations.items():
        metric = metrics[layer_idx, slot]
        axes = torch.eye(metric.shape[-1])[None, :, None].expand(-1, -1, len(positions), -1)
        turns = rotate(axes, replace(rotation, scale=1.0).angles(positions), rotation.pairing)[0].to(metric)  # R_n e_i
        metrics[layer_idx, slot] = torch.einsum("inx,hij,jny->hxy", turns, metric, turns) / len(positions)
    return metrics


def _chosen(source: CalibrationSet, sinks: int, reach: int) -> tuple[Tensor, Tensor]:
    """Return the rows [n] of the samples that are fitted on, without sinks, and the positions [n] where they are stored.

    With rotation, every sequence begins at a random position such that it ends below `reach`.
    """
    samples = source.samples
    rows = rows_after(samples, sinks)
    rows = rows[:: max(1, len(rows) // VECTORS)]
    generator, positions = torch.Generator().manual_seed(0), samples.positions.clone()
    for sequence in positions.split(list(samples.lengths)) if samples.layout.rotations else ():
        sequence += int(torch.randint(max(1, reach - len(sequence) + 1), (), generator=generator))  # a view of `positions`
    return rows, positions[rows]


def _live(x: Tensor) -> Tensor:
    """Return which dimensions of cached vectors x [heads, n, dim] vary, bool [heads, dim]."""
    return torch.stack([~dead_dimensions(*variances_and_mean_squares(head.split(_ROWS))) for head in x])


def _stored(
    samples: SampledVectors, place: tuple[int, int], rows: Tensor, positions: Tensor, rotation: Rotation | None
) -> Tensor:
    """Return the cached vectors [heads, n, dim] of the slot at `place`, (layer, slot), rotated to `positions` [n]."""
    spans = zip(samples.layout.parts, samples.layout.spans, strict=True)
    part, (first, stop) = next((part, span) for part, span in spans if (part.layer_idx, part.slot) == place)
    x = samples.vectors(rows, first, stop).unflatten(-1, (-1, part.dim)).transpose(0, 1)
    return x if rotation is None else rotate(x[None], rotation.angles(positions), rotation.pairing)[0]
