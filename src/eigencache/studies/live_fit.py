"""Fitting the codec of the live cache: basis, steps and widths of every bundle of heads, widths for a budget of bits.

Keys are taken as attention reads them, after rotation, without the mean before rotation where it is large. Widths come
from one price of a bit for all layers, keys and values (reverse water-filling with measured distortions, THEORY 6).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from eigencache.codec.live import LiveCodec
from eigencache.codec.packed import PackedHeads
from eigencache.codec.turning import Turning
from eigencache.errors import BudgetError, StatisticsError
from eigencache.kernels.reference import GROUP, Widths
from eigencache.spectral.rope import Rotation, unrotate
from eigencache.spectral.spectrum import eigenbasis_of
from eigencache.studies.eigen_basis import scaled_metrics
from eigencache.studies.eigen_fit import outstanding
from eigencache.studies.source import Source

VECTORS = 16_384  # that bases and steps are fitted on
_BITS = (0, 2, 4, 8)
_GAUSSIAN = {2: 0.996, 4: 0.335, 8: 0.031}  # steps in standard deviations that suit a normal distribution
_STEPS = (0.6, 0.7, 0.8, 0.9, 1.0, 1.15, 1.3, 1.5, 1.75, 2.0)  # times that
_TURNING = 8.0  # a pair's mean is taken out where its square is so many times the variance
_ROUNDS = 50
_SINKS = 4  # found by themselves; learned positions make more of the first ones stand out, which 8 bits hold


@dataclass(frozen=True)
class LiveSettings:
    """What of a live codec is chosen. Heads share a basis while they have at most `shared` numbers together.

    More numbers take fewer bytes and more time per step. `sinks` None: as many first positions as stand out.
    """

    alpha: float = 0.75
    shared: int = 128
    sinks: int | None = None
    window: int = 0

    def describe(self) -> str:
        """One line for tables."""
        return f"live · fisher^{self.alpha:g}"


def check_bits(bits: float) -> None:
    """Raises `BudgetError` for bits per value that no widths give."""
    if not 0 < bits <= 8:
        raise BudgetError(f"{bits:g} bits per value: a live codec has widths up to 8 bits: ask for more than 0, at most 8")


@dataclass(frozen=True, eq=False)
class FittedSlot:
    """One slot of one layer: E and D at step 1 and full rank, `steps` and `costs` of every width by coefficient."""

    mean: Tensor  # [heads, dim]
    turning: Turning | None
    encoder: Tensor  # [bundles, coefficients, numbers of a bundle]
    decoder: Tensor
    steps: dict[int, Tensor]  # bits → [bundles, coefficients]
    costs: dict[int, Tensor]  # bits → mean squared error in the metric

    def groups(self, bits: int) -> Tensor:
        """Cost of 8 coefficients at a time [bundles, groups]."""
        return self.costs[bits].unflatten(-1, (-1, GROUP)).sum(-1)

    def at(self, bits: Tensor) -> PackedHeads:
        """With so many bits for the coefficients of every group [bundles, groups]."""
        widths = tuple(Widths(*(GROUP * int((own == b).sum()) for b in (8, 4, 2))) for own in bits)
        most = max(w.coefficients for w in widths)
        encoder, decoder = (torch.zeros(len(widths), most, self.decoder.shape[2]) for _ in range(2))
        for i, own in enumerate(bits.repeat_interleave(GROUP, 1)):
            order = own.argsort(descending=True, stable=True)[: widths[i].coefficients]
            steps = torch.stack([self.steps[int(own[c])][i, c] for c in order]) if len(order) else torch.empty(0)
            encoder[i, : len(order)] = self.encoder[i, order] / steps[:, None]
            decoder[i, : len(order)] = self.decoder[i, order] * steps[:, None]
        return PackedHeads(widths, encoder, decoder, self.mean, self.turning)


@dataclass(frozen=True, eq=False)
class LiveFit:
    """Everything of a live codec but its widths."""

    settings: LiveSettings
    slots: Mapping[tuple[int, int], FittedSlot]
    sinks: int
    dtype: torch.dtype

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
        """8 bits for every coefficient of keys (and of MLA's latent), 4 for every one of values (and of its rotary key)."""
        every = lambda at: torch.full_like(self.slots[at].groups(0), (8, 4)[at[1]], dtype=torch.int64)  # noqa: E731
        return self._codec({at: every(at) for at in self.slots}, "live · safe")

    def _widths(self, price: float) -> dict[tuple[int, int], Tensor]:
        """Bits of every group of every slot [bundles, groups] when a bit costs so much."""
        found = {}
        for at, slot in self.slots.items():
            costs = torch.stack([slot.groups(b) + price * b * GROUP for b in _BITS])
            found[at] = torch.tensor(_BITS)[costs.argmin(0)]
        return found

    def _rate(self, widths: Mapping[tuple[int, int], Tensor]) -> float:
        """Bits per value of these widths."""
        bits = sum(GROUP * int(own.sum()) for own in widths.values())
        return bits / sum(slot.mean.numel() for slot in self.slots.values())

    def _codec(self, widths: Mapping[tuple[int, int], Tensor], name: str) -> LiveCodec:
        layers: dict[int, list[PackedHeads]] = {}
        for at, slot in sorted(self.slots.items()):
            layers.setdefault(at[0], []).append(slot.at(widths[at]))
        pairs = {i: (keys, values) for i, (keys, values) in layers.items()}
        return LiveCodec(name, pairs, self.sinks, self.settings.window, self.dtype)


def fit_live(source: Source, settings: LiveSettings | None = None) -> LiveFit:
    """Fit on what `source` gathers of a model. Raises what gathering raises."""
    settings = settings or LiveSettings()
    metrics = source.stored_metric()
    sinks = settings.sinks
    if sinks is None:
        roots = scaled_metrics(source.metric("fisher"), settings.alpha)[1]
        sinks = min(_SINKS, outstanding(source.samples.less_mean(source.samples.mean), roots))
    elif sinks >= max(source.samples.lengths):
        raise StatisticsError(f"no sequence is longer than {sinks} sinks: keep fewer --sinks or raise --max-length")
    vectors, positions = _stored(source, sinks)
    ats = sorted(vectors)
    _, roots, inverses = scaled_metrics([metrics[at] for at in ats], settings.alpha)
    slots = {}
    for at, root, inverse in zip(ats, roots, inverses, strict=True):
        layer_idx, slot = at
        rotation = source.samples.layout.rotations.get(layer_idx)
        own = rotation[1] if rotation and rotation[0] == slot else None
        slots[at] = _fit_slot(vectors[at], positions, own, root, inverse, settings.shared)
    return LiveFit(settings, slots, sinks, source.loaded.model.dtype)


def _stored(source: Source, sinks: int) -> tuple[dict[tuple[int, int], Tensor], Tensor]:
    """What every slot stores of some tokens [heads, n, dim], keys rotated, and the tokens' positions [n]."""
    samples = source.samples
    chosen = (samples.positions >= sinks).nonzero().flatten()
    chosen = chosen[:: max(1, len(chosen) // VECTORS)]
    marked = torch.zeros(len(samples.vectors), dtype=torch.bool).index_fill_(0, chosen, True)
    found: dict[tuple[int, int], list[Tensor]] = {}
    for rows, keep in zip(samples.vectors.split(list(samples.lengths)), marked.split(list(samples.lengths)), strict=True):
        for at, x in samples.layout.slots(rows[None], 0).items():
            found.setdefault(at, []).append(x[0][:, keep])
    return {at: torch.cat(parts, 1) for at, parts in found.items()}, samples.positions[chosen]


def _fit_slot(
    x: Tensor, positions: Tensor, rotation: Rotation | None, root: Tensor, inverse: Tensor, shared: int
) -> FittedSlot:
    """Of vectors [heads, n, dim] at positions [n]; `root`, `inverse`: M^{α/2}, M^{−α/2} [heads, dim, dim]."""
    heads, _, dim = x.shape
    turning = rotation and large_mean(x, positions, rotation)
    if turning:
        x = x - turning.at(positions[None])[0]
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


def large_mean(x: Tensor, positions: Tensor, rotation: Rotation) -> Turning | None:
    """The mean before rotation of keys [heads, n, dim] at `positions`, in the pairs where it outweighs the variance."""
    before = unrotate(x[None], rotation.angles(positions), rotation.pairing)[0]
    turns, halves = 2 * len(rotation.frequencies), rotation.pairing == "half"

    def pairs(t: Tensor) -> Tensor:
        """What turns together [heads, pairs, 2]."""
        return t[:, :turns].unflatten(-1, (2, -1)).mT if halves else t[:, :turns].unflatten(-1, (-1, 2))

    mean, variance = before.mean(1), before.var(1)
    large = pairs(mean).square().sum(-1) > _TURNING * pairs(variance).mean(-1)
    if not large.any():
        return None
    both = large[..., None].expand(*large.shape, 2)
    kept = torch.zeros_like(mean)
    kept[:, :turns] = mean[:, :turns] * (both.mT if halves else both).flatten(1)
    return Turning(kept, replace(rotation, frequencies=rotation.frequencies.cpu()))
