"""Sampled vectors in the metric of the loss, a range of columns at a time, so that no second copy of all is held."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from eigencache.calibration.vectors import SampledVectors
from eigencache.codec.eigen.token_predictor import TokenPredictor
from eigencache.errors import StatisticsError
from eigencache.spectral.metric import block_product, blocks_between


@dataclass(frozen=True, eq=False)
class WeighedVectors:
    """z = (x − μ) R of the tokens after the first ones of every sequence.

    Args:
        samples: vectors x of whole sequences.
        first: tokens of every sequence that are left out.
        mean: μ [width].
        roots: blocks of R [heads, dim, dim] in the order of the columns; empty: R = I.
    """

    samples: SampledVectors
    first: int
    mean: Tensor
    roots: tuple[Tensor, ...]

    def __len__(self) -> int:
        """Return the number of tokens."""
        return sum(self.lengths)

    @property
    def width(self) -> int:
        """Numbers of a vector."""
        return self.samples.layout.width

    @cached_property
    def rows(self) -> Tensor:
        """Rows of `samples` that are used [n]."""
        return rows_after(self.samples, self.first)

    @property
    def lengths(self) -> list[int]:
        """Used tokens of every sequence that has some."""
        return [length - self.first for length in self.samples.lengths if length > self.first]

    @property
    def ids(self) -> Tensor:
        """Token ids [n]."""
        return self.samples.ids[self.rows]

    def beginning(self, share: int) -> "WeighedVectors":
        """Return one of `share` sequences, at least one, the first ones."""
        count = max(1, len(self.samples.lengths) // share)
        return replace(self, samples=self.samples.sequences(0, count))

    def columns(self, start: int, stop: int, tokens: Tensor | None = None) -> Tensor:
        """Return the columns start … stop − 1 of z in float32.

        Args:
            start: first column, at the border of a head.
            stop: end of the columns, exclusive, at the border of a head.
            tokens: indices of the tokens [m]; None: all n.

        Returns:
            [m or n, stop − start].
        """
        x = self.samples.vectors(self.rows if tokens is None else self.rows[tokens], start, stop)
        return block_product(x.sub_(self.mean[start:stop]), blocks_between(self.roots, start, stop))

    def centered(self) -> Iterator[Tensor]:
        """Yield x − μ [tokens, width] of every sequence."""
        for rows in self.rows.split(self.lengths):
            yield self.samples.vectors(rows).sub_(self.mean)

    def ranks(self, text: TokenPredictor) -> Tensor:
        """Return the ranks of the tokens [n] as encoding finds them."""
        return torch.cat([text.find(x[None])[0] for x in self.centered()])

    def predicted(self, text: TokenPredictor, ranks: Tensor, block: int) -> Tensor:
        """Return what tokens of these ranks predict for the first stage [n, columns]."""
        return torch.cat([text.predict(part[None], block)[0] for part in ranks.split(self.lengths)])


def rows_after(samples: SampledVectors, first: int) -> Tensor:
    """Return the rows of all but the `first` tokens of every sequence [n].

    Raises:
        StatisticsError: no sequence has more than `first` tokens.
    """
    rows = (samples.positions >= first).nonzero().flatten()
    if not len(rows):
        raise StatisticsError(f"No sequence is longer than {first} sinks. Lower `sinks` or raise `max_length`.")
    return rows
