"""The Lloyd–Max codebook of a standard Gaussian: 2^b numbers, each the mean of the values nearest to it.

Max, Quantizing for minimum distortion, 1960; Lloyd, Least squares quantization in PCM, 1982. For 1 bit ±√(2/π).
"""

import functools
import math

import torch
from torch import Tensor

from eigencache.modes import constant


@functools.cache
@constant
def gaussian_codebook(bits: int) -> Tensor:
    """Return the 2^bits numbers, ascending, in float32; Lloyd's iteration finds them in float64."""
    numbers = torch.erfinv(torch.arange(1, 2 ** (bits + 1), 2, dtype=torch.float64) / 2**bits - 1) * math.sqrt(2)
    for _ in range(10_000):
        edges = torch.cat([torch.tensor([-math.inf]), borders(numbers), torch.tensor([math.inf])])
        mass = (0.5 * torch.erf(edges / math.sqrt(2))).diff()
        density = torch.exp(-edges.square() / 2) / math.sqrt(2 * math.pi)
        moved = -density.diff() / mass
        settled = float((moved - numbers).abs().max()) < 1e-12
        numbers = moved
        if settled:
            break
    return numbers.float()


def borders(numbers: Tensor) -> Tensor:
    """Return the midpoints between neighbors: a value between two of them is coded as the number between them."""
    return (numbers[1:] + numbers[:-1]) / 2
