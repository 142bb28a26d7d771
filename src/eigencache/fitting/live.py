"""Fitting the codec of the live cache: basis, steps and widths of every bundle of heads, widths for a budget of bits.

Keys are taken as attention reads them, after rotation, without the mean before rotation where it is large: rotated to
positions from all over the model's reach, wherever they were captured, and their metric with them. Steps fitted to the
angles of short texts would cut off what long ones hold. Widths come from one price of a bit for all layers, keys and
values (reverse water-filling with measured distortions, THEORY 6).
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

VECTORS = 16_384  # that bases and steps are fitted on
SAFE = 6.875  # bits per value: with a few first tokens and a window still 2.2 times smaller than 16 bits at 2,048 tokens
REACH = 4096  # positions, of a model that does not say how many it has
_GAUSSIAN = {2: 0.996, 4: 0.335, 6: 0.104, 8: 0.031}  # steps in standard deviations that suit a normal distribution
_STEPS = (0.6, 0.7, 0.8, 0.9, 1.0, 1.15, 1.3, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 6.0, 8.0)  # times that
_TURNING = 8.0  # a pair's mean is taken out where its square is so many times the variance
_ROUNDS = 50
_TURNS = 256  # positions over which a metric is averaged


@dataclass(frozen=True)
class LiveSettings:
    """What of a live codec is chosen. Heads share a basis while they have at most `shared` numbers together.

    More numbers take fewer bytes and more time per step. `sinks`: first positions that are never packed. `reach`: at
    how many positions keys are meant to stand; None: at as many as the model has. `alpha`, the power of the metric:
    None is 0.75, and 1 where nothing is rotated: learned positions make the first tokens rare and far off.
    """

    alpha: float | None = None
    shared: int = 128
    sinks: int = FIRST_EXACT
    window: int = 0
    reach: int | None = None

    def describe(self) -> str:
        """One line for tables."""
        return "live" if self.alpha is None else f"live · fisher^{self.alpha:g}"


def check_bits(bits: float) -> None:
    """Raises `BudgetError` for bits per value that no widths give."""
    if not 0 < bits <= 8:
        raise BudgetError(f"{bits:g} bits per value: a live codec has widths up to 8 bits: ask for more than 0, at most 8")


@dataclass(frozen=True, eq=False)
class FittedSlot:
    """One slot of one layer: E and D at step 1 and full rank, `steps` and `costs` of every width by coefficient."""

    mean: Tensor  # [heads, dim]
    turning: KeyMean | None
    encoder: Tensor  # [bundles, coefficients, numbers of a bundle]
    decoder: Tensor
    steps: dict[int, Tensor]  # bits → [bundles, coefficients]
    costs: dict[int, Tensor]  # bits → mean squared error in the metric

    def widths(self, price: float) -> Tensor:
        """Bits of every coefficient [bundles, coefficients] int64 when a bit costs so much: what costs least in the end.

        Digits come in groups of 8, and what has the most to gain gets one first: one of 8 bits, of 4, of 2. A coefficient
        with the last two has 6 bits.
        """
        spent = {bits: cost + price * bits for bits, cost in self.costs.items()}
        eight = _worth(torch.stack([spent[b] for b in (0, 2, 4, 6)]).amin(0) - spent[8])
        gain = torch.minimum(spent[0], spent[2]) - torch.minimum(spent[4], spent[6])
        four = _worth(gain.masked_fill(eight, -torch.inf))
        gain = torch.where(four, spent[4] - spent[6], spent[0] - spent[2])
        two = _worth(gain.masked_fill(eight, -torch.inf))
        return 8 * eight + 4 * four + 2 * two

    def at(self, bits: Tensor) -> PackedHeads:
        """With so many bits for every coefficient [bundles, coefficients], as `widths` gives them."""
        counts = [{b: int((own == b).sum()) for b in (8, 6, 4, 2)} for own in bits]
        widths = tuple(Widths(n[8], n[4] + n[6], n[2] + n[6]) for n in counts)
        most = max(w.coefficients for w in widths)
        encoder, decoder = (torch.zeros(len(widths), most, self.decoder.shape[2]) for _ in range(2))
        for i, own in enumerate(bits):
            digits = [(b, at) for b in (8, 4, 6, 6, 2) for at in [(own == b).nonzero().flatten()]]
            scales = (1.0, 1.0, 4.0, 1.0, 1.0)  # of 6 bits first come the higher 4, then the lower 2
            row = 0
            for (b, at), scale in zip(digits, scales, strict=True):
                if len(at):
                    steps = self.steps[b][i, at, None]
                    encoder[i, row : row + len(at)] = self.encoder[i, at] / steps
                    decoder[i, row : row + len(at)] = self.decoder[i, at] * steps * scale
                row += len(at)
        return PackedHeads(widths, encoder, decoder, self.mean, self.turning, tuple(n[6] for n in counts))


def _worth(gain: Tensor) -> Tensor:
    """Which of every row [bundles, n] get a digit: so many times 8, those with the most gain, as makes its sum largest."""
    ordered, places = gain.sort(-1, descending=True)
    sums = torch.nn.functional.pad(ordered.double().cumsum(-1), (1, 0))[:, ::GROUP]
    count = GROUP * sums.argmax(-1)
    return torch.zeros_like(gain, dtype=torch.bool).scatter(-1, places, torch.arange(gain.shape[-1]) < count[:, None])


@dataclass(frozen=True, eq=False)
class LiveFit:
    """Everything of a live codec but its widths."""

    settings: LiveSettings
    slots: Mapping[tuple[int, int], FittedSlot]
    sinks: int
    dtype: torch.dtype
    reach: int

    def at_bits(self, bits: float, name: str | None = None) -> LiveCodec:
        """The codec of at most `bits` per packed value. Raises `BudgetError` for more than widths give, and for none."""
        check_bits(bits)
        low, high = -60.0, 60.0  # of the logarithm of a bit's price
        for _ in range(_ROUNDS):
            middle = (low + high) / 2
            low, high = (middle, high) if self._rate(self._widths(math.exp(middle))) > bits else (low, middle)
        found = self._widths(math.exp(high))
        if not self._rate(found):
            raise BudgetError(f"{bits:g} bits per value: fewer than one group of coefficients takes: ask for more")
        return self._codec(found, name or f"{self.settings.describe()} · {bits:g} bits")

    def safe(self) -> LiveCodec:
        """6.9 bits per value, as `at_bits` deals them out; 8 for every key and 4 for every value would lose more."""
        return self.at_bits(SAFE, "live · safe")

    def _widths(self, price: float) -> dict[tuple[int, int], Tensor]:
        """Bits of every coefficient of every slot when a bit costs so much."""
        return {at: slot.widths(price) for at, slot in self.slots.items()}

    def _rate(self, widths: Mapping[tuple[int, int], Tensor]) -> float:
        """Bits per value of these widths."""
        bits = sum(int(own.sum()) for own in widths.values())
        return bits / sum(slot.mean.numel() for slot in self.slots.values())

    def _codec(self, widths: Mapping[tuple[int, int], Tensor], name: str) -> LiveCodec:
        layers: dict[int, list[PackedHeads]] = {}
        for at, slot in sorted(self.slots.items()):
            layers.setdefault(at[0], []).append(slot.at(widths[at]))
        pairs = {i: (keys, values) for i, (keys, values) in layers.items()}
        return LiveCodec(name, pairs, self.sinks, self.settings.window, self.dtype, self.reach)


def fit_live(source: CalibrationSet, settings: LiveSettings | None = None) -> LiveFit:
    """Fit on what `source` gathers of a model. Raises what gathering raises."""
    settings = settings or LiveSettings()
    if settings.alpha is None:
        settings = replace(settings, alpha=0.75 if source.samples.layout.rotations else 1.0)
    alpha = settings.alpha
    assert alpha is not None
    longest = max(source.samples.lengths)
    reach = settings.reach or getattr(source.loaded.model.config, "max_position_embeddings", None) or REACH
    reach = reach if source.samples.layout.rotations else longest
    metrics = _stored_metric(source, reach)
    sinks = settings.sinks
    if sinks >= longest:
        raise StatisticsError(f"no sequence is longer than {sinks} sinks: keep fewer `sinks` or raise `max_length`")
    vectors, positions = _stored(source, sinks, reach)
    ats = sorted(vectors)
    _, roots, inverses = scaled_metrics([metrics[at] for at in ats], alpha)
    slots = {}
    for at, root, inverse in zip(ats, roots, inverses, strict=True):
        layer_idx, slot = at
        rotation = source.samples.layout.rotations.get(layer_idx)
        own = rotation[1] if rotation and rotation[0] == slot else None
        slots[at] = _fit_slot(vectors[at], positions, own, root, inverse, settings.shared)
    return LiveFit(settings, slots, sinks, source.loaded.model.dtype, reach)


def _stored_metric(source: CalibrationSet, reach: int) -> dict[tuple[int, int], Tensor]:
    """Layer and slot → the Fisher metric of what is stored [heads, dim, dim]; of keys E R_n M R_nᵀ over positions n."""
    layout = source.samples.layout
    found = {(part.layer_idx, part.slot): m for part, m in zip(layout.parts, source.metric("fisher"), strict=True)}
    positions = torch.linspace(0, reach - 1, _TURNS).long()
    for layer_idx, (slot, rotation) in layout.rotations.items():
        metric = found[layer_idx, slot]
        axes = torch.eye(metric.shape[-1])[None, :, None].expand(-1, -1, len(positions), -1)
        turns = rotate(axes, replace(rotation, scale=1.0).angles(positions), rotation.pairing)[0].to(metric)  # R_n e_i
        found[layer_idx, slot] = torch.einsum("inx,hij,jny->hxy", turns, metric, turns) / len(positions)
    return found


def _stored(source: CalibrationSet, sinks: int, reach: int) -> tuple[dict[tuple[int, int], Tensor], Tensor]:
    """What every slot stores of some tokens [heads, n, dim], keys rotated to positions within reach; the positions [n]."""
    samples = source.samples
    chosen = (samples.positions >= sinks).nonzero().flatten()
    chosen = chosen[:: max(1, len(chosen) // VECTORS)]
    marked = torch.zeros(len(samples.vectors), dtype=torch.bool).index_fill_(0, chosen, True)
    generator, positions = torch.Generator().manual_seed(0), samples.positions.clone()
    lengths = list(samples.lengths)
    found: dict[tuple[int, int], list[Tensor]] = {}
    for rows, keep, own in zip(*(x.split(lengths) for x in (samples.vectors, marked, positions)), strict=True):
        start = int(torch.randint(max(1, reach - len(rows) + 1), (), generator=generator)) if samples.layout.rotations else 0
        own += start
        for at, x in samples.layout.slots(rows[None], start).items():
            found.setdefault(at, []).append(x[0][:, keep])
    return {at: torch.cat(parts, 1) for at, parts in found.items()}, positions[chosen]


def _fit_slot(
    x: Tensor, positions: Tensor, rotation: Rotation | None, root: Tensor, inverse: Tensor, shared: int
) -> FittedSlot:
    """Of vectors [heads, n, dim] at positions [n]; `root`, `inverse`: M^{α/2}, M^{−α/2} [heads, dim, dim]."""
    heads, _, dim = x.shape
    turning = rotation and large_mean(x, positions, rotation)
    if turning:
        x = x - turning.rotated_to(positions[None])[0]
    mean = x.mean(1)
    share = max(n for n in range(1, heads + 1) if heads % n == 0 and (n == 1 or n * dim <= shared))
    bundled = lambda y: y.unflatten(0, (-1, share)).transpose(1, 2).flatten(2)  # noqa: E731 - [bundles, n, share · dim]
    weighed = bundled((x - mean[:, None]) @ root)
    encoders, decoders, variances = [], [], []
    for i, own in enumerate(weighed):
        basis = eigenbasis_of(own.mT.double() @ own.double() / len(own))[1].float()
        basis = torch.nn.functional.pad(basis, (0, -basis.shape[1] % GROUP))
        of = slice(i * share, (i + 1) * share)
        encoders.append((torch.block_diag(*root[of]) @ basis).mT)
        decoders.append(basis.mT @ torch.block_diag(*inverse[of]))
        variances.append((own @ basis).mT)
    steps, costs = fitted_steps(torch.stack(variances))
    return FittedSlot(mean, turning or None, torch.stack(encoders), torch.stack(decoders), steps, costs)


def fitted_steps(y: Tensor) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """For every width the step of least squared error of coefficients y [bundles, coefficients, n], and that error."""
    deviation = y.square().mean(-1).sqrt()
    costs, steps = {0: deviation.square()}, {}
    for bits, gaussian in _GAUSSIAN.items():
        most = 2**bits - 1
        tried = deviation.clamp_min(1e-12) * gaussian * torch.tensor(_STEPS)[:, None, None]
        errors = torch.stack(
            [
                (y - ((y / s[..., None] + most / 2).round().clamp(0, most) - most / 2) * s[..., None]).square().mean(-1)
                for s in tried
            ]
        )
        costs[bits], best = errors.min(0)
        steps[bits] = tried.gather(0, best[None])[0]
    return steps, costs


def large_mean(x: Tensor, positions: Tensor, rotation: Rotation) -> KeyMean | None:
    """The mean before rotation of keys [heads, n, dim] at `positions`, in the pairs where it outweighs the variance."""
    before = unrotate(x[None], rotation.angles(positions), rotation.pairing)[0]
    turns, neighbors = 2 * len(rotation.frequencies), rotation.pairing != "half"
    mean = before.mean(1)
    first, second = pairs(mean[:, :turns], neighbors)
    variances = pairs(before.var(1)[:, :turns], neighbors)
    large = first.square() + second.square() > _TURNING * (variances[0] + variances[1]) / 2
    if not large.any():
        return None
    kept = torch.zeros_like(mean)
    kept[:, :turns] = joined(first * large, second * large, neighbors)
    return KeyMean(kept, replace(rotation, frequencies=rotation.frequencies.cpu()))
