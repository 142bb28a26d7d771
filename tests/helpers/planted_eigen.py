"""Fits of `eigen` to drawn vectors of a known covariance, without a model."""

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from eigencache.calibration.vectors import SampledVectors
from eigencache.codec.eigen.codec import EigenCodec
from eigencache.codec.layout import Layout, Part, by_layer
from eigencache.fitting.eigen import EigenFit, EigenSettings, Source
from eigencache.fitting.eigen_basis import stored_inverses
from eigencache.fitting.weighed_vectors import WeighedVectors
from eigencache.spectral.metric import inverted

LAYOUT = Layout(tuple(Part(i, slot, (0, 2), 6) for i in range(2) for slot in (0, 1)), {})
WIDTH = LAYOUT.width
DEVIATIONS = np.geomspace(3, 0.02, WIDTH)
PLAIN = EigenSettings("joint", "frobenius", text=False, sinks=0, kept_bits=8, block=64)


def gaussian(n: int, seed: int) -> Tensor:
    """Vectors whose covariance has eigenvalues from 9 to 0.0004, turned at random."""
    rng = np.random.default_rng(seed)
    turn = np.linalg.qr(np.random.default_rng(9).normal(size=(WIDTH, WIDTH)))[0]
    return torch.from_numpy(rng.normal(size=(n, WIDTH)) * DEVIATIONS @ turn.T).float()


def fit_of(
    fitted: Tensor,
    apart: Tensor,
    held: Tensor,
    settings: EigenSettings = PLAIN,
    layout: Layout = LAYOUT,
    inverses: Sequence[Tensor] = (),
    sequences: int = 1,
) -> EigenFit:
    """Return a fit to vectors [n, width] of three kinds, in so many sequences, with a metric of these blocks of R⁻¹."""
    stored, mean = stored_inverses(inverses), fitted.mean(0)
    sources = []
    for x in (fitted, apart, held):
        lengths = (len(x) // sequences,) * sequences
        samples = SampledVectors(layout, x, torch.zeros(len(x), dtype=torch.int64), lengths)
        sources.append(Source(WeighedVectors(samples, 0, mean, inverted(stored))))
    return EigenFit(
        settings=settings,
        layout=layout,
        inverse_roots=stored,
        text=None,
        positions=None,
        sinks=0,
        fitted=sources[0],
        apart=sources[1],
        held=sources[2],
        held_out=None,  # type: ignore[arg-type]
        dtype=torch.float32,
        spread=float(sources[0].vectors.columns(0, layout.width).square().mean().sqrt()),
    )


@functools.cache
def planted(amortize: int = PLAIN.amortize) -> EigenFit:
    """Return a fit to vectors of `gaussian`."""
    settings = EigenSettings(**{**vars(PLAIN), "amortize": amortize})
    return fit_of(gaussian(8_000, 0), gaussian(8_000, 2), gaussian(4_000, 1), settings)


def cached(vectors: Tensor, layout: Layout = LAYOUT) -> dict[int, tuple[Tensor, Tensor]]:
    """Return the cache that holds vectors [seq, width]."""
    return by_layer(layout.slots(vectors[None], 0), torch.float32)


def decoded(codec: EigenCodec, x: Tensor) -> Tensor:
    """Return vectors [seq, width] as a container gives them back."""
    return codec.layout.vectors(codec.decode(codec.encode(cached(x, codec.layout), 0)), 0)[0]
