"""Digits of tokens: every rank comes back, no other cell is taken for one, and their tables come near the tokens' own."""

import numpy as np
import pytest
import torch

from eigencache.codec.eigen.entropy_tables import MAX_HALF, fit_tables
from eigencache.codec.eigen.token_digits import digit_count, token_digits
from eigencache.errors import CodecError


@pytest.mark.parametrize("vocabulary", [1, 2, 3, 255, 256, 4096, 50_257, 65_026, 151_936])
def test_every_rank_comes_back_and_fits_a_table(vocabulary):
    digits = token_digits(vocabulary)
    ranks = torch.arange(vocabulary)
    split = digits.split(ranks)
    assert split.dtype == torch.int32 and int(split.abs().max()) <= MAX_HALF
    assert torch.equal(digits.joined(split), ranks)
    assert digits.count == next(d for d in range(1, 9) if 255**d >= vocabulary)


def test_products_rise_with_the_rank():
    digits = token_digits(4096)
    product = (digits.digits.long() + digits.side // 2 + 1).prod(1)
    assert (product.diff() >= 0).all() and product[0] == 1


def test_a_cell_without_a_token_is_damage():
    digits = token_digits(50_257)  # 225 x 225 cells
    unused = next(cell for cell, rank in enumerate(digits.ranks.tolist()) if rank < 0)
    place = torch.tensor([unused // digits.side, unused % digits.side]) - digits.side // 2
    for bad in (place, torch.tensor([digits.side, 0]), torch.tensor([0, -digits.side]), torch.tensor([2**31 - 1, 0])):
        with pytest.raises(CodecError, match="a token that the vocabulary does not have"):
            digits.joined(bad[None].to(torch.int32))


def test_zipfian_tokens_take_little_more_than_their_entropy():
    share = 1 / (np.arange(4096) + 2.7)
    share /= share.sum()
    ranks = np.random.default_rng(0).choice(4096, 60_000, p=share)
    symbols = token_digits(4096).split(torch.from_numpy(ranks)).T.contiguous().numpy()
    bits = fit_tables(symbols[:, ::2], np.arange(2)).bits(symbols[:, 1::2]) / 30_000
    assert -(share * np.log2(share)).sum() - 0.05 < bits < -(share * np.log2(share)).sum() + 0.2


@pytest.mark.parametrize("vocabulary", [1, 2, 255, 256, 65_025, 65_026, 262_144])
def test_how_many_digits_there_are_is_known_without_making_them(vocabulary: int) -> None:
    assert digit_count(vocabulary) == token_digits(vocabulary).count


def test_the_largest_vocabulary_of_a_card_costs_nothing_to_check() -> None:
    assert digit_count(2**24) == 4
