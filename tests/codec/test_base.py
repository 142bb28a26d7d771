"""Bytes are those of storages, tensors that are stored own theirs, and 16 bits refuse what they cannot hold."""

import pytest
import torch

from eigencache.codec.base import Encoded, layers_of, owned, sixteen_bit, storage_bytes, to_sixteen_bit
from eigencache.errors import CodecError


def test_layers_are_named_once_in_their_order() -> None:
    assert layers_of(["3.0", "3.1", "0.codes", "0.scale", "12.x"]) == [3, 0, 12]


def test_a_shared_storage_counts_once_and_a_view_with_all_of_it() -> None:
    x = torch.zeros(10)
    assert storage_bytes([x, x[:1], x[5:]]) == 40
    assert Encoded({"0.0": x[:1]}, 0, 1).nbytes == 40
    assert storage_bytes([owned(x[:1])]) == 4
    assert owned(x) is x


def test_sixteen_bits_are_the_models_own_or_float16() -> None:
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    assert [sixteen_bit(dtype) for dtype in dtypes] == [torch.float16, torch.bfloat16, torch.float16, torch.float16]
    with pytest.raises(CodecError, match=r"layer 3: 1e\+06 does not fit into torch.float16"):
        to_sixteen_bit(torch.tensor([1e6]), "layer 3")
