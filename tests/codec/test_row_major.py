"""Tensors that are held row by row, whatever they were made of, and move together."""

from dataclasses import dataclass

import torch
from torch import Tensor

from eigencache.codec.row_major import RowMajor


@dataclass(frozen=True, eq=False)
class Two(RowMajor):
    one: Tensor
    other: Tensor


def test_every_tensor_is_contiguous_and_what_it_was() -> None:
    turned, row = torch.arange(6.0).view(2, 3).mT, torch.arange(3)
    two = Two(turned, row)
    assert two.one.is_contiguous() and torch.equal(two.one, turned)
    assert [id(t) for t in two.tensors()] == [id(two.one), id(row)]


def test_all_of_them_move() -> None:
    moved = Two(torch.ones(2), torch.ones(3)).to("meta")
    assert type(moved) is Two and [t.device.type for t in moved.tensors()] == ["meta", "meta"]
