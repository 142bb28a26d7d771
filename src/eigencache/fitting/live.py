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
from eigencache.codec.live.codec import LiveCodec
from eigencache.codec.live.packed_heads import PackedHeads
from eigencache.codec.live.rotated_mean import KeyMean
from eigencache.codec.sinks_and_window import FIRST_EXACT
from eigencache.errors import BudgetError, StatisticsError
from eigencache.fitting.eigen_basis import scaled_metrics
from eigencache.kernels.packed.format import GROUP, Widths
from eigencache.spectral.rope import Rotation, joined, pairs, rotate, unrotate
from eigencache.spectral.spectrum import eigenbasis_of

VECTORS = 16_384  # vectors that bases and steps are fitted on
SAFE = 6.875  # bits per value; with sinks and a window still 2.2 times smaller than 16 bits at 2,048 tokens
REACH = 4096  # positions, for a model whose config has no `max_position_embeddings`
_GAUSSIAN = {2: 0.996, 4: 0.335, 6: 0.104, 8: 0.031}  # bits → best step for a normal distribution, in standard deviations
_STEPS = (0.6, 0.7, 0.8, 0.9, 1.0, 1.15, 1.3, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 6.0, 8.0)  # tested multiples of that step
_MEAN_RATIO = 8.0  # the mean of a rotary pair is subtracted where its square exceeds this multiple of the variance
_ROUNDS = 50  # bisections of the price of a bit
_METRIC_POSITIONS = 256  # positions over which the metric of rotated keys is averaged


@dataclass(frozen=True)
class LiveSettings:
    """Settings of a live codec.

    Args:
        alpha: exponent of the Fisher metric. None is 0.75, or 1 without rotation, where first tokens are rare and far off.
        shared: most numbers per token of the heads that share a basis. More numbers take fewer bytes and more time.
        sinks: first positions, which are never packed.
        window: most recent tokens that are not packed.
        reach: positions at which keys are expected. None is as many as the model supports.
    """

    alpha: float | None = None
    shared: int = 128
    sinks: int = FIRST_EXACT
    window: int = 0
    reach: int | None = None

    def describe(self) -> str:
        """Return one line for tables."""
        return "live" if self.alpha is None else f"live · fisher^{self.alpha:g}"


def check_bits(bits: float) -> None:
    """Raise `BudgetError` for a rate, in bits per value, that is not above 0 and at most 8."""
    if not 0 < bits <= 8:
        raise BudgetError(f"A live codec cannot have {bits:g} bits per value. Use more than 0 and at most 8.")


@dataclass(frozen=True, eq=False)
class FittedSlot:
    """Encoder and decoder of one slot of one layer at step 1 and full rank, with step and distortion of every width.

    Args:
        mean: mean that is subtracted first [heads, dim].
        rotated_mean: mean of the keys before rotation, where it is large.
        encoder: rows of the transform [bundles, coefficients, heads of a bundle · dim].
        decoder: rows of its inverse, of the same shape.
        steps: bit width → quantization steps [bundles, coefficients].
        costs: bit width, 0 included → mean squared error in the metric [bundles, coefficients].
    """

    mean: Tensor
    rotated_mean: KeyMean | None
    encoder: Tensor
    decoder: Tensor
    steps: dict[int, Tensor]
    costs: dict[int, Tensor]

    def widths(self, price: float) -> Tensor:
        """Return the bit widths that minimize distortion + `price` · bits.

        Coefficients take digits of 8, 4 or 2 bits in groups of 8. The digits are assigned in this order, to the
        coefficients that gain most. A coefficient with a digit of 4 bits and one of 2 has 6 bits.

        Args:
            price: Lagrange multiplier, in squared error per bit.

        Returns:
            Bit widths, 0, 2, 4, 6 or 8 [bundles, coefficients] int64.
        """
        spent = {bits: cost + price * bits for bits, cost in self.costs.items()}
        eight = _worth(torch.stack([spent[b] for b in (0, 2, 4, 6)]).amin(0) - spent[8])
        gain = torch.minimum(spent[0], spent[2]) - torch.minimum(spent[4], spent[6])
        four = _worth(gain.masked_fill(eight, -torch.inf))
        gain = torch.where(four, spent[4] - spent[6], spent[0] - spent[2])
        two = _worth(gain.masked_fill(eight, -torch.inf))
        return 8 * eight + 4 * four + 2 * two

    def at(self, bits: Tensor) -> PackedHeads:
        """Return the heads quantized with the bit widths `bits` [bundles, coefficients], as `widths` returns them."""
        counts = [{b: int((row == b).sum()) for b in (8, 6, 4, 2)} for row in bits]
        widths = tuple(Widths(n[8], n[4] + n[6], n[2] + n[6]) for n in counts)
        most = max(w.coefficients for w in widths)
        encoder, decoder = (torch.zeros(len(widths), most, self.decoder.shape[2]) for _ in range(2))
        for bundle, bundle_bits in enumerate(bits):
            digits = [(b, index) for b in (8, 4, 6, 6, 2) for index in [(bundle_bits == b).nonzero().flatten()]]
            scales = (1.0, 1.0, 4.0, 1.0, 1.0)  # coefficients of 6 bits: first the higher 4 bits, then the lower 2
            row = 0
            for (b, index), scale in zip(digits, scales, strict=True):
                if len(index):
                    steps = self.steps[b][bundle, index, None]
                    encoder[bundle, row : row + len(index)] = self.encoder[bundle, index] / steps
                    decoder[bundle, row : row + len(index)] = self.decoder[bundle, index] * steps * scale
                row += len(index)
        return PackedHeads(widths, encoder, decoder, self.mean, self.rotated_mean, tuple(n[6] for n in counts))


def _worth(gain: Tensor) -> Tensor:
    """Return a boolean mask [bundles, n]: the groups of 8 coefficients, by descending gain, whose summed gain is largest."""
    ordered, places = gain.sort(-1, descending=True)
    sums = torch.nn.functional.pad(ordered.double().cumsum(-1), (1, 0))[:, ::GROUP]
    count = GROUP * sums.argmax(-1)
    return torch.zeros_like(gain, dtype=torch.bool).scatter(-1, places, torch.arange(gain.shape[-1]) < count[:, None])


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
        check_bits(bits)
        low, high = -60.0, 60.0  # logarithm of the price of a bit
        for _ in range(_ROUNDS):
            middle = (low + high) / 2
            low, high = (middle, high) if self._rate(self._widths(math.exp(middle))) > bits else (low, middle)
        widths = self._widths(math.exp(high))
        if not self._rate(widths):
            raise BudgetError(f"{bits:g} bits per value are too few for one group of {GROUP} coefficients. Use more.")
        return self._codec(widths, name or f"{self.settings.describe()} · {bits:g} bits")

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
    metrics = _stored_metric(source, reach)
    sinks = settings.sinks
    if sinks >= longest:
        raise StatisticsError(f"No sequence is longer than {sinks} sinks. Lower `sinks` or raise `max_length`.")
    vectors, positions = _stored(source, sinks, reach)
    places = sorted(vectors)
    _, roots, inverses = scaled_metrics([metrics[place] for place in places], alpha)
    slots = {}
    for place, root, inverse in zip(places, roots, inverses, strict=True):
        layer_idx, slot = place
        rotated = source.samples.layout.rotations.get(layer_idx)
        rotation = rotated[1] if rotated and rotated[0] == slot else None
        slots[place] = _fit_slot(vectors[place], positions, rotation, root, inverse, settings.shared)
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


def _stored(source: CalibrationSet, sinks: int, reach: int) -> tuple[dict[tuple[int, int], Tensor], Tensor]:
    """Return sampled cached vectors [heads, n, dim] by (layer, slot), and their positions [n].

    Keys are rotated to positions below `reach`, from a random start per sequence. Sinks are left out.
    """
    samples = source.samples
    chosen = (samples.positions >= sinks).nonzero().flatten()
    chosen = chosen[:: max(1, len(chosen) // VECTORS)]
    mask = torch.zeros(len(samples.vectors), dtype=torch.bool).index_fill_(0, chosen, True)
    generator, positions = torch.Generator().manual_seed(0), samples.positions.clone()
    lengths = list(samples.lengths)
    stored: dict[tuple[int, int], list[Tensor]] = {}
    for rows, kept, row_positions in zip(*(x.split(lengths) for x in (samples.vectors, mask, positions)), strict=True):
        start = int(torch.randint(max(1, reach - len(rows) + 1), (), generator=generator)) if samples.layout.rotations else 0
        row_positions += start  # a view of `positions`
        for place, x in samples.layout.slots(rows[None], start).items():
            stored.setdefault(place, []).append(x[0][:, kept])
    return {place: torch.cat(parts, 1) for place, parts in stored.items()}, positions[chosen]


def _fit_slot(
    x: Tensor, positions: Tensor, rotation: Rotation | None, root: Tensor, inverse: Tensor, shared: int
) -> FittedSlot:
    """Fit one slot to vectors x [heads, n, dim] at positions [n]; `root`, `inverse`: M^{α/2}, M^{−α/2} [heads, dim, dim]."""
    heads, _, dim = x.shape
    rotated_mean = rotation and large_mean(x, positions, rotation)
    if rotated_mean:
        x = x - rotated_mean.rotated_to(positions[None])[0]
    mean = x.mean(1)
    share = max(n for n in range(1, heads + 1) if heads % n == 0 and (n == 1 or n * dim <= shared))
    bundled = lambda y: y.unflatten(0, (-1, share)).transpose(1, 2).flatten(2)  # noqa: E731 - [bundles, n, share · dim]
    weighed = bundled((x - mean[:, None]) @ root)
    encoders, decoders, coefficients = [], [], []
    for i, vectors in enumerate(weighed):
        basis = eigenbasis_of(vectors.mT.double() @ vectors.double() / len(vectors))[1].float()
        basis = torch.nn.functional.pad(basis, (0, -basis.shape[1] % GROUP))
        members = slice(i * share, (i + 1) * share)
        encoders.append((torch.block_diag(*root[members]) @ basis).mT)
        decoders.append(basis.mT @ torch.block_diag(*inverse[members]))
        coefficients.append((vectors @ basis).mT)
    steps, costs = fitted_steps(torch.stack(coefficients))
    return FittedSlot(mean, rotated_mean or None, torch.stack(encoders), torch.stack(decoders), steps, costs)


def fitted_steps(y: Tensor) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Find the step of least squared error for every coefficient, with samples y [bundles, coefficients, n].

    Returns:
        Bit width → steps [bundles, coefficients], and bit width, 0 included, → mean squared errors of the same shape.
    """
    deviation = y.square().mean(-1).sqrt()
    costs, steps = {0: deviation.square()}, {}
    for bits, gaussian in _GAUSSIAN.items():
        most = 2**bits - 1
        candidates = deviation.clamp_min(1e-12) * gaussian * torch.tensor(_STEPS)[:, None, None]
        errors = torch.stack(
            [
                (y - ((y / s[..., None] + most / 2).round().clamp(0, most) - most / 2) * s[..., None]).square().mean(-1)
                for s in candidates
            ]
        )
        costs[bits], best = errors.min(0)
        steps[bits] = candidates.gather(0, best[None])[0]
    return steps, costs


def large_mean(x: Tensor, positions: Tensor, rotation: Rotation) -> KeyMean | None:
    """Return the mean before rotation of rotated keys x [heads, n, dim] at `positions` [n], or None where it is small.

    The mean is nonzero only in the rotary pairs where its square exceeds 8 times the variance.
    """
    before = unrotate(x[None], rotation.angles(positions), rotation.pairing)[0]
    width, neighbors = 2 * len(rotation.frequencies), rotation.pairing != "half"
    mean = before.mean(1)
    first, second = pairs(mean[:, :width], neighbors)
    variances = pairs(before.var(1)[:, :width], neighbors)
    large = first.square() + second.square() > _MEAN_RATIO * (variances[0] + variances[1]) / 2
    if not large.any():
        return None
    kept = torch.zeros_like(mean)
    kept[:, :width] = joined(first * large, second * large, neighbors)
    return KeyMean(kept, replace(rotation, frequencies=rotation.frequencies.cpu()))
