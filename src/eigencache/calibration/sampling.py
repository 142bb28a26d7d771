"""Keep the vectors of all layers, concatenated, of tokens evenly spaced over a text."""

from collections.abc import Sequence

import torch
from torch import Tensor

from eigencache.spectral.wide import Sample

_NUMBER, _COPIES = 4, 4  # bytes of a number; of these copies of the vectors, three are made by a decomposition
_GOLDEN = (5**0.5 - 1) / 2  # multiples of it are spread evenly over the unit interval


class Sampling:
    """A sample that is collected batch by batch. It does not depend on the batches.

    Args:
        step: distance of the tokens that are kept. The first one differs from sequence to sequence.
    """

    def __init__(self, step: int) -> None:
        self.step = step
        self._kept: dict[int, Tensor] = {}  # sequence → vectors [n, p]

    @staticmethod
    def nbytes(width: int) -> int:
        """Return the bytes of a vector of `width` dimensions, and of the copies that a decomposition makes."""
        return _COPIES * _NUMBER * width

    def add(self, layers: Sequence[Tensor], sequences: Sequence[int], lengths: Sequence[int]) -> None:
        """Add one batch.

        Args:
            layers: tensors of the layers [batch, heads, seq, dim].
            sequences: index of the sequence in each row.
            lengths: tokens of each row; the rest is padding.
        """
        for row, (sequence, length) in enumerate(zip(sequences, lengths, strict=True)):
            tokens = range(int(_GOLDEN * sequence % 1 * self.step), length, self.step)
            if tokens:
                parts = [layer[row, :, list(tokens)].transpose(0, 1).flatten(1).cpu() for layer in layers]
                self._kept[sequence] = torch.cat(parts, -1).float()

    @property
    def sample(self) -> Sample:
        """The vectors collected so far, sequence after sequence."""
        kept = [self._kept[sequence] for sequence in sorted(self._kept)]
        return Sample(torch.cat(kept), tuple(map(len, kept)))
