"""Fit one slot of the live codec: the basis of every bundle of heads, and steps and distortions of every bit width."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from eigencache.codec.live.packed_heads import PackedHeads
from eigencache.codec.live.rotated_mean import KeyMean
from eigencache.kernels.packed.format import GROUP, Widths
from eigencache.spectral.rope import Rotation, joined, pairs, unrotate
from eigencache.spectral.spectrum import eigenbasis_of

_GAUSSIAN = {2: 0.996, 4: 0.335, 6: 0.104, 8: 0.031}  # bits → best step for a normal distribution, in standard deviations
_STEPS = (0.6, 0.7, 0.8, 0.9, 1.0, 1.15, 1.3, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 6.0, 8.0)  # tested multiples of that step
_MEAN_RATIO = 8.0  # the mean of a rotary pair is subtracted where its square exceeds this multiple of the variance


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
        saturated: bit width → share of the vectors whose coefficient is out of range [bundles, coefficients].
    """

    mean: Tensor
    rotated_mean: KeyMean | None
    encoder: Tensor
    decoder: Tensor
    steps: dict[int, Tensor]
    costs: dict[int, Tensor]
    saturated: dict[int, Tensor]

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


def fit_slot(
    x: Tensor, positions: Tensor, rotation: Rotation | None, root: Tensor, inverse: Tensor, shared: int
) -> FittedSlot:
    """Fit one slot to vectors x [heads, n, dim] at positions [n]; `root`, `inverse`: M^{α/2}, M^{−α/2} [heads, dim, dim]."""
    heads, _, dim = x.shape
    rotated_mean = rotation and large_mean(x, positions, rotation)
    if rotated_mean:
        x = x - rotated_mean.rotated_to(positions[None])[0]
    mean = x.mean(1, dtype=torch.float64).float()  # exact for a constant
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
    y = torch.stack(coefficients)
    steps, costs = fitted_steps(y)
    saturated = {bits: (y.abs() > 2 ** (bits - 1) * s[..., None]).float().mean(-1) for bits, s in steps.items()}
    return FittedSlot(mean, rotated_mean or None, torch.stack(encoders), torch.stack(decoders), steps, costs, saturated)


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
