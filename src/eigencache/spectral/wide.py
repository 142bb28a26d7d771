"""Spectra of vectors with more dimensions than a matrix of moments should have, from a sample of the vectors.

n vectors span at most n dimensions, and coordinates in an orthonormal basis of that space keep all their products. The
eigenvalues other than zero, the energies and the norm of the mean are therefore those of n coordinates.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from eigencache.spectral.moments import Moments, SecondOrder

DECOMPOSED = 6144  # most dimensions of a decomposition, and vectors where there are more dimensions: a minute on one core
_FOLDS = 2  # the halves of held-out energies
_COLUMNS = 1024  # at a time


@dataclass(frozen=True, eq=False)
class Sample:
    """Vectors of some tokens of a text.

    Args:
        x: vectors [n, p], sequence after sequence.
        lengths: vectors of each sequence, n in total.
    """

    x: Tensor
    lengths: tuple[int, ...]

    def thinned(self, most: int) -> "Sample":
        """Return at most `most` of the vectors, evenly spaced."""
        step = -(-len(self.x) // most)
        if step == 1:
            return self
        rows = [part[part % step == 0] for part in torch.arange(len(self.x)).split(list(self.lengths))]
        return Sample(self.x[torch.cat(rows)], tuple(len(part) for part in rows if len(part)))

    def moments(self) -> Moments:
        """Return the moments of the vectors, in coordinates of their span where there are fewer vectors than dimensions."""
        n, width = self.x.shape
        if n < width:
            moments: Moments = SpannedMoments(self.x)
            coordinates = torch.linalg.qr(self.x.double().mT, mode="r").R.mT
        else:
            moments, coordinates = Moments(width, folds=_FOLDS, device=self.x.device), self.x
        parts = coordinates.unsqueeze(1).split(list(self.lengths))
        for index, part in enumerate(parts):
            moments.update(part, fold=index * _FOLDS // len(parts))
        return moments


class SpannedMoments(Moments):
    """Moments of n vectors of p > n dimensions, in n coordinates of the space that they span.

    Args:
        x: the vectors [n, p].

    Attributes:
        dimensions: p.
    """

    def __init__(self, x: Tensor) -> None:
        super().__init__(len(x), folds=_FOLDS, device=x.device)
        self.dimensions = x.shape[1]
        parts = [part.double() for part in x.split(_COLUMNS, 1)]
        self._raw = torch.cat([p.var(0, correction=0) for p in parts]), torch.cat([p.square().mean(0) for p in parts])

    def raw(self, total: SecondOrder) -> tuple[Tensor, Tensor]:
        """Return the variances and the mean squares of the p raw dimensions; `total` is that of all folds."""
        return self._raw
