"""What the text already says of a cache: a linear prediction of every vector from the tokens at it and before it.

A vector is predicted from features of its token and of the previous one (zero at the first of a block, so that blocks
decode alone), and only the rest is transformed and coded. The tokens are coded beside it, as ranks in order of
frequency (`token_digits.py`). The encoder needs no text: it finds each token as the one whose features predict best
what the first layer holds, which before any mixing is a function of the token alone. A wrong guess costs bits, never
correctness.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from eigencache.codec.eigen.token_digits import TokenDigits, token_digits
from eigencache.codec.eigen.token_features import EmbeddingFeatures, StoredFeatures
from eigencache.codec.row_major import RowMajor
from eigencache.modes import constant

_ROWS = 128  # tokens that are looked for at a time: what is compared stays in the processor's own memory
_AT_A_TIME = 8192  # tokens of the vocabulary whose features are made
_TABLE = 2**24  # numbers a table of all tokens' predictions may have: 64 MB


@dataclass(frozen=True, eq=False)
class TokenPredictor(RowMajor):
    """Tokens by rank, of h `features` each; prediction [f(t), f(t − 1)] @ `mix` [2h, k] @ `rows` [k, width].

    `finder` [columns, n] float32 brings columns from `first` of a vector to where `places` [h, n] puts features.
    """

    features: EmbeddingFeatures | StoredFeatures
    mix: Tensor
    rows: Tensor
    first: Tensor  # int32, one number
    finder: Tensor
    places: Tensor

    def find(self, x: Tensor) -> Tensor:
        """Ranks int64 [batch, seq] of the tokens of vectors [batch, seq, width] less their mean."""
        start = int(self.first)
        seen = x[..., start : start + len(self.finder)] @ self.finder
        found = [_largest((part @ self._known.mT).sub_(self._norms)) for part in seen.flatten(0, 1).split(_ROWS)]
        return torch.cat(found).view(x.shape[:2]) if found else x.new_zeros(x.shape[:2], dtype=torch.int64)

    def predict(self, ranks: Tensor, block: int) -> Tensor:
        """Vectors less their mean [batch, seq, width] float32 of ranks [batch, seq], in blocks that begin with the first."""
        if self.features.vocabulary * self.rows.shape[1] > _TABLE:
            here = self.features.of(ranks.flatten()).view(*ranks.shape, -1)
            return torch.cat([here, _before(here, block)], -1) @ self.mix.float() @ self.rows.float()
        alone, next_to = self._predictions
        return F.embedding(ranks, alone).add_(F.embedding(_before(1 + ranks[..., None], block)[..., 0], next_to))

    @cached_property
    def digits(self) -> TokenDigits:
        """How ranks become integers and back."""
        return token_digits(self.features.vocabulary)

    @cached_property
    @constant
    def _predictions(self) -> tuple[Tensor, Tensor]:
        """What a token adds at its own place [vocabulary, width], and to the next one's [1 + vocabulary, width].

        Row 0 of the second stands for no token. Looking up costs a tenth of the products, so small vocabularies get it.
        """
        features = torch.cat(list(self._every()))
        here, before = (features @ part @ self.rows.float() for part in self.mix.float().chunk(2))
        return here, F.pad(before, (0, 0, 1, 0))

    @cached_property
    @constant
    def _known(self) -> Tensor:
        return torch.cat([part @ self.places for part in self._every()])

    def _every(self) -> Iterator[Tensor]:
        """Features of all tokens by rank, some at a time."""
        ranks = torch.arange(self.features.vocabulary, device=self.mix.device)
        yield from map(self.features.of, ranks.split(_AT_A_TIME))

    @cached_property
    @constant
    def _norms(self) -> Tensor:
        return self._known.square().sum(-1) / 2


def _before(x: Tensor, block: int) -> Tensor:
    """x [batch, seq, n] of the token before, 0 at the first of a block."""
    before = F.pad(x, (0, 0, 1, 0))[:, :-1].clone()
    before[:, ::block] = 0
    return before


def _largest(x: Tensor) -> Tensor:
    """Where the largest number of every row [n, m] is: on a CPU NumPy finds it a dozen times as fast."""
    return torch.from_numpy(x.detach().numpy().argmax(-1)) if x.device.type == "cpu" else x.argmax(-1)
