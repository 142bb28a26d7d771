"""A dead-zone quantizer with one step for all coefficients; thresholds and centroids minimize distortion + λ · bits.

In units of the step, |y| below the dead zone is 0; beyond it |q| = max(1, round(|y| − offset)), decoded to |q| minus a
centroid shift, one for |q| = 1 and one for larger ones (THEORY 6; Sullivan 1996). A threshold lies where the two
neighboring integers cost the same in distortion + λ · bits; λ is the slope of distortion against rate of a uniform
quantizer at high rate. A coefficient whose bits cost more than they save is dropped. Coefficients of similar spread form
a class and share these numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from eigencache.errors import CodecError

LAMBDA = 2 * np.log(2) / 12  # of distortion in units of step², per bit
LARGEST = 2**30  # a larger integer would not fit into 32 bits
_ROUNDS = 4
_SAMPLES = 100_000  # magnitudes of a class that are used, drawn at random
_LEVELS = 200
_OFFSETS = (2, 8)  # the levels over whose thresholds the offset is averaged


@dataclass(frozen=True, eq=False)
class DeadZone:
    """Thresholds and centroid shifts of every coefficient, float32 [coefficients], in units of the step."""

    dead_zone: Tensor  # |y| below it becomes 0; in [0.5, 1.2]
    offset: Tensor  # subtracted from |y| before rounding
    first: Tensor  # |q| = 1 is decoded to 1 − first
    rest: Tensor  # |q| > 1 is decoded to |q| − rest

    def quantize(self, y: Tensor) -> Tensor:
        """Return the integers int32 of y / step [..., coefficients].

        Raises:
            CodecError: y holds NaN, or magnitudes of 2^30 steps or more.
        """
        magnitude = y.abs()
        if not bool((magnitude < LARGEST).all()):  # NaN too
            largest = float(magnitude.max())
            raise CodecError(f"coefficients up to {largest:.3g} steps: the cache holds NaN or is of another model")
        q = (magnitude - self.offset).round_().clamp_(min=1)
        return torch.where(magnitude < self.dead_zone, 0, q.mul_(y.sign())).to(torch.int32)

    def dequantize(self, q: Tensor) -> Tensor:
        """Return y / step in float32 of integers."""
        y = q.float()
        magnitude = y.abs()
        shift = torch.where(magnitude == 1, self.first, self.rest)
        return (magnitude - shift).mul_(y.sign())

    def split(self, counts: Sequence[int]) -> list["DeadZone"]:
        """Return the quantizers of consecutive coefficients, `counts` of them each."""
        pieces = (x.split(list(counts)) for x in (self.dead_zone, self.offset, self.first, self.rest))
        return [DeadZone(*parts) for parts in zip(*pieces, strict=True)]

    def to(self, device: str | torch.device) -> "DeadZone":
        """Return the quantizer on `device`."""
        return DeadZone(*(x.to(device) for x in (self.dead_zone, self.offset, self.first, self.rest)))


@dataclass(frozen=True)
class ClassFit:
    """The numbers of one class of coefficients.

    `gain`: by how many bits per integer the distortion that it saves exceeds what it costs, at λ; −∞ if all are 0.
    """

    dead_zone: float
    offset: float
    first: float
    rest: float
    gain: float


def fit_class(magnitudes: np.ndarray) -> ClassFit:
    """Fit thresholds and centroids, in turns, to |y| / step [n] of one class (Chou, Lookabaugh & Gray 1989)."""
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
            extra_bits = np.average(bits[k] - bits[k - 1], weights=share[k])
            offset = float(np.clip(LAMBDA * extra_bits / 2 - rest, -0.2, 0.4))
    q = _quantized(v, dead_zone, offset)
    decoded = q - np.where(q == 0, 0, np.where(q == 1, first, rest))
    saved = (v**2).mean() - ((v - decoded) ** 2).mean()
    share, bits = _costs(q)
    return ClassFit(dead_zone, offset, first, rest, saved / LAMBDA - float(share @ bits) if q.any() else -np.inf)


def _quantized(v: np.ndarray, dead_zone: float, offset: float) -> np.ndarray:
    return np.where(v < dead_zone, 0, np.maximum(np.rint(v - offset), 1)).astype(np.int64)


def _costs(q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the share of every magnitude, and its bits with its sign."""
    counts = np.bincount(np.minimum(q, _LEVELS + 1), minlength=_LEVELS + 2) + 0.02
    share = counts / counts.sum()
    return share, -np.log2(share) + (np.arange(len(share)) > 0)
