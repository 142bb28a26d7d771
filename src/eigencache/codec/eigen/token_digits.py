"""Tokens as a few digits, so that small entropy tables code them.

Tokens are ranked by falling frequency and assigned to the cells of a grid by rising product of (digit + 1), as if every
digit followed Zipf's law: the product of the digits' shares is then close to the token's. One table per digit costs a tenth
of a bit more than the distribution of tokens, which has too many entries for a table. Digits are centered: 0 is the middle
of a table's range.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from eigencache.codec.eigen.entropy_tables import MAX_HALF
from eigencache.errors import CodecError
from eigencache.modes import constant


@dataclass(frozen=True, eq=False)
class TokenDigits:
    """`digits` [vocabulary, d] int32 of every rank, and `ranks` [side^d] int64 of every cell, −1 for an empty one."""

    side: int
    digits: Tensor
    ranks: Tensor

    @property
    def count(self) -> int:
        """Digits of a token."""
        return self.digits.shape[1]

    def split(self, ranks: Tensor) -> Tensor:
        """Return the digits int32 [..., d] of ranks [...]."""
        return self.digits.to(ranks.device)[ranks]

    def joined(self, digits: Tensor) -> Tensor:
        """Return the ranks int64 [...] of digits [..., d].

        Raises:
            CodecError: The digits name a token that the vocabulary does not have.
        """
        cell = torch.zeros(digits.shape[:-1], dtype=torch.int64, device=digits.device)
        places = digits.long() + self.side // 2
        known = ((places >= 0) & (places < self.side)).all(-1)
        for digit in places.clamp(0, self.side - 1).unbind(-1):
            cell = cell * self.side + digit
        ranks = torch.where(known, self.ranks.to(digits.device)[cell], -1)
        if bool((ranks < 0).any()):
            raise CodecError("corrupt block: it names a token that the vocabulary does not have")
        return ranks


def digit_count(vocabulary: int) -> int:
    """Return the digits of a token of a vocabulary: as few as possible with at most 255 values each."""
    count, largest = 1, 2 * MAX_HALF + 1
    while largest**count < vocabulary:
        count += 1
    return count


@lru_cache(maxsize=8)
@constant
def token_digits(vocabulary: int) -> TokenDigits:
    """Return the digits of every token of a vocabulary."""
    count = digit_count(vocabulary)
    side = max(1, round(vocabulary ** (1 / count)))
    while side**count < vocabulary:
        side += 1
    cells = np.indices((side,) * count).reshape(count, -1)
    order = np.argsort((cells + 1).prod(0), kind="stable")[:vocabulary]
    ranks = np.full(side**count, -1, np.int64)
    ranks[order] = np.arange(vocabulary)
    digits = (cells[:, order].T - side // 2).astype(np.int32)
    return TokenDigits(side, torch.from_numpy(digits), torch.from_numpy(ranks))
