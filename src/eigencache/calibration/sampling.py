"""Keep the vectors of all layers, concatenated, of tokens evenly spaced over a text."""

from collections.abc import Sequence

import torch
from torch import Tensor

from eigencache.spectral.wide import Sample

_NUMBER, _COPIES = 4, 3  # bytes of a number, and copies of the vectors that a decomposition makes
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
    def nbytes(widths: Sequence[int]) -> int:
        """Return the bytes of a vector of every tensor, and of the copies that the decomposition of one of them makes.

        Args:
            widths: dimensions of the tensors.
        """
        return _NUMBER * (sum(widths) + _COPIES * max(widths))

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
