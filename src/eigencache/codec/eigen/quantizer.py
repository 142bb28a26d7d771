"""One step for all coefficients: a dead-zone quantizer with thresholds and centroids chosen for bits, not error alone.

In units of the step, |y| below the dead zone is 0; beyond it |q| = max(1, round(|y| − offset)), decoded to |q| minus a
centroid shift, one for |q| = 1 and one for the rest (THEORY 6; Sullivan 1996). Thresholds lie where the two neighbors
cost the same in distortion + λ · bits, with λ the slope of rate against distortion of a uniform step at high rate. A
coefficient whose bits cost more than they save is dropped. Coefficients of like spread share these numbers.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from eigencache.errors import CodecError

LAMBDA = 2 * np.log(2) / 12  # of distortion in units of step², per bit
LARGEST = 2**30  # beyond it an integer would not survive 32 bits
_ROUNDS = 4
_SAMPLES = 100_000  # magnitudes of a class that are looked at
_LEVELS = 200
_OFFSETS = (2, 8)  # the levels whose thresholds an offset is the mean of


@dataclass(frozen=True, eq=False)
class DeadZone:
    """Per coefficient, in units of the step, float32 [coefficients]: thresholds and centroid shifts."""

    dead_zone: Tensor  # |y| below it is 0, in [0.5, 1.2]
    offset: Tensor  # taken from |y| before rounding
    first: Tensor  # |q| = 1 is decoded to 1 − first
    rest: Tensor

    def quantize(self, y: Tensor) -> Tensor:
        """Integers int32 of y / step [..., coefficients]. Raises `CodecError` for NaN, infinite and absurdly large y."""
        magnitude = y.abs()
        if not bool((magnitude < LARGEST).all()):  # NaN too
            largest = float(magnitude.max())
            raise CodecError(f"coefficients up to {largest:.3g} steps: the cache holds NaN or is not the model's")
        q = (magnitude - self.offset).round_().clamp_(min=1)
        return torch.where(magnitude < self.dead_zone, 0, q.mul_(y.sign())).to(torch.int32)

    def dequantize(self, q: Tensor) -> Tensor:
        """y / step of integers, float32."""
        y = q.float()
        magnitude = y.abs()
        shift = torch.where(magnitude == 1, self.first, self.rest)
        return (magnitude - shift).mul_(y.sign())

    def to(self, device: str | torch.device) -> "DeadZone":
        """The same where the coefficients are."""
        return DeadZone(*(x.to(device) for x in (self.dead_zone, self.offset, self.first, self.rest)))


@dataclass(frozen=True)
class ClassFit:
    """The numbers of one class of coefficients, and whether its bits are worth what they save."""

    dead_zone: float
    offset: float
    first: float
    rest: float
    worth: bool


def fit_class(magnitudes: np.ndarray) -> ClassFit:
    """Thresholds and centroids for |y| / step of one class [n], by alternating both (Chou, Lookabaugh & Gray 1989)."""
    v = magnitudes
    if v.size > _SAMPLES:
        v = v[np.random.default_rng(0).integers(0, v.size, _SAMPLES)]
    dead_zone, offset, first, rest = 0.6, 0.1, 0.0, 0.0
    for _ in range(_ROUNDS):
        q = _quantized(v, dead_zone, offset)
        share, bits = _costs(q)
        first = float(1 - v[q == 1].mean()) if (q == 1).any() else 0.0
        rest = float((q[q > 1] - v[q > 1]).mean()) if (q > 1).any() else first
        level = 1 - first
        dead_zone = float(np.clip((level**2 + LAMBDA * (bits[1] - bits[0])) / (2 * level), 0.5, 1.2))
        if (q > 1).sum() > 50:
            k = np.arange(*_OFFSETS)
            dearer = np.average(bits[k] - bits[k - 1], weights=share[k])
            offset = float(np.clip(LAMBDA * dearer / 2 - rest, -0.2, 0.4))
    q = _quantized(v, dead_zone, offset)
    decoded = q - np.where(q == 0, 0, np.where(q == 1, first, rest))
    saved = (v**2).mean() - ((v - decoded) ** 2).mean()
    share, bits = _costs(q)
    return ClassFit(dead_zone, offset, first, rest, bool(q.any()) and saved > LAMBDA * float(share @ bits))


def _quantized(v: np.ndarray, dead_zone: float, offset: float) -> np.ndarray:
    return np.where(v < dead_zone, 0, np.maximum(np.rint(v - offset), 1)).astype(np.int64)


def _costs(q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Share of every magnitude, and the bits it takes with its sign."""
    counts = np.bincount(np.minimum(q, _LEVELS + 1), minlength=_LEVELS + 2) + 0.02
    share = counts / counts.sum()
    return share, -np.log2(share) + (np.arange(len(share)) > 0)
