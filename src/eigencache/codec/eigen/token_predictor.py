"""Token prediction: the first stage of a vector is predicted linearly from its token and the previous one.

The previous token's features are zero at the first token of a block, so that blocks decode independently. The tokens are
coded too, as ranks by frequency (`token_digits.py`). The encoder needs no text: what the first layer stores depends on the
token alone, so it takes the token whose features predict that best. A wrong guess costs bits, never correctness.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from eigencache.codec.eigen.token_digits import TokenDigits, token_digits
from eigencache.codec.eigen.token_features import EmbeddingFeatures
from eigencache.codec.row_major import RowMajor
from eigencache.modes import constant

_ROWS = 128  # tokens that are searched for at a time, so that the scores stay in the processor's cache
_AT_A_TIME = 8192  # tokens of the vocabulary whose features are computed at a time
_TABLE = 2**24  # largest table of all tokens' predictions, in numbers: 64 MB


@dataclass(frozen=True, eq=False)
class TokenPredictor(RowMajor):
    """Predicts [f(t), f(t − 1)] @ `mix` @ `rows` from the features f of tokens, and finds the token of a vector.

    Args:
        features: h features of every token, by rank.
        mix: Float16 [2h, k].
        rows: Float16 [k, columns of the first stage], in the metric.
        first: First column of a vector that the search uses, int32 [1].
        finder: Maps those columns to the space of the search, float32 [columns, n].
        places: Maps features to that space, float32 [h, n].
    """

    features: EmbeddingFeatures
    mix: Tensor
    rows: Tensor
    first: Tensor
    finder: Tensor
    places: Tensor

    def find(self, x: Tensor) -> Tensor:
        """Return the ranks int64 [batch, seq] of the tokens of centered vectors [batch, seq, width]."""
        start = int(self.first)
        points = x[..., start : start + len(self.finder)] @ self.finder
        ranks = [_largest((part @ self._known.mT).sub_(self._norms)) for part in points.flatten(0, 1).split(_ROWS)]
        return torch.cat(ranks).view(x.shape[:2]) if ranks else x.new_zeros(x.shape[:2], dtype=torch.int64)

    def predict(self, ranks: Tensor, block: int) -> Tensor:
        """Return what is predicted for the first stage.

        Args:
            ranks: Ranks [batch, seq] of tokens that begin with the first token of a block.
            block: Tokens per block.

        Returns:
            Float32 [batch, seq, columns of the first stage], in the metric.
        """
        if self.features.vocabulary * self.rows.shape[1] > _TABLE:
            here = self.features.of(ranks.flatten()).view(*ranks.shape, -1)
            return torch.cat([here, _before(here, block)], -1) @ self.mix.float() @ self.rows.float()
        alone, next_to = self._predictions
        return F.embedding(ranks, alone).add_(F.embedding(_before(1 + ranks[..., None], block)[..., 0], next_to))

    @cached_property
    def digits(self) -> TokenDigits:
        """Ranks ⇄ digits."""
        return token_digits(self.features.vocabulary)

    @cached_property
    @constant
    def _predictions(self) -> tuple[Tensor, Tensor]:
        """What a token contributes to its own vector [vocabulary, columns], and to the next one [1 + vocabulary, columns].

        Row 0 of the second is "no token". A look-up takes a tenth of the time of the products.
        """
        features = torch.cat(list(self._every()))
        here, before = (features @ part @ self.rows.float() for part in self.mix.float().chunk(2))
        return here, F.pad(before, (0, 0, 1, 0))

    @cached_property
    @constant
    def _known(self) -> Tensor:
        return torch.cat([part @ self.places for part in self._every()])

    def _every(self) -> Iterator[Tensor]:
        """Yield the features of all tokens by rank, some at a time."""
        ranks = torch.arange(self.features.vocabulary, device=self.mix.device)
        yield from map(self.features.of, ranks.split(_AT_A_TIME))

    @cached_property
    @constant
    def _norms(self) -> Tensor:
        return self._known.square().sum(-1) / 2


def _before(x: Tensor, block: int) -> Tensor:
    """Return x [batch, seq, n] of the previous token, 0 at the first token of a block."""
    before = F.pad(x, (0, 0, 1, 0))[:, :-1].clone()
    before[:, ::block] = 0
    return before


def _largest(x: Tensor) -> Tensor:
    """Return the argmax of every row [n, m]; on a CPU NumPy is a dozen times as fast as torch."""
    return torch.from_numpy(x.detach().numpy().argmax(-1)) if x.device.type == "cpu" else x.argmax(-1)
