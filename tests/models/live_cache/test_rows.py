"""Rows of a live cache begin where their first token stands, once, and take that with them."""

import pytest
import torch

from eigencache.errors import CodecError
from eigencache.models.live_cache.rows import Rows, unpadded


def seen(*leading: int, new: int = 4) -> torch.Tensor:
    """`leading` tokens of every row are padding."""
    return torch.arange(new)[None] >= torch.tensor(leading)[:, None]


def held(rows: Rows) -> list[tuple[int, int]]:
    return list(zip(rows.first.tolist(), rows.origin.tolist(), strict=True))


def test_padding_is_counted_until_a_row_has_a_token_and_then_never_again() -> None:
    rows = unpadded(3)
    assert rows.begin_after(0)
    rows = rows.begun(seen(0, 3, 4), None, 0)
    assert held(rows) == [(0, 0), (3, -3), (4, -4)] and rows.begin_after(4)
    rows = rows.begun(seen(0, 0, 2), None, 4)
    assert held(rows) == [(0, 0), (3, -3), (6, -6)] and not rows.begin_after(8)


def test_the_first_token_says_at_which_position_its_row_stands() -> None:
    positions = torch.tensor([[7, 8, 9, 10], [0, 0, 5, 6]])
    rows = unpadded(2).begun(seen(0, 2), positions, 0)
    assert held(rows) == [(0, 7), (2, 3)]
    rows.require_neighbors(seen(0, 2), positions, 0)
    rows.require_neighbors(seen(0, 0, new=1), torch.tensor([[11], [7]]), 4)
    with pytest.raises(
        CodecError, match="sequence 1: the compressed cache expects position 7 next, not 8: pass consecutive position_ids"
    ):
        rows.require_neighbors(seen(0, 0, new=1), torch.tensor([[11], [8]]), 4)


def test_chosen_rows_are_those() -> None:
    rows = Rows(torch.tensor([0, 3, 5]), torch.tensor([1, -3, 2]))
    assert held(rows.select(torch.tensor([2, 0, 2]))) == [(5, 2), (0, 1), (5, 2)]
