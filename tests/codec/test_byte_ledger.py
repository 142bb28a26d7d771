"""The ledger's bytes are those that encoding makes, and the basis is paid back where it says."""

import pytest
import torch

from eigencache.codec.byte_ledger import ledger, paid_back_at
from eigencache.codec.pca import Part, PCACodec, PCAGroup
from eigencache.spectral.moments import SecondOrder
from eigencache.spectral.transform import fit_transform

DIM = 16
TRANSFORM = fit_transform(SecondOrder(100, torch.zeros(DIM).double(), torch.eye(DIM).double())).to(torch.float32)


def codec(rank: int, bits: int) -> PCACodec:
    full = PCACodec("v", (PCAGroup((Part(0, 1, (0, 1), DIM),), TRANSFORM),), {}, torch.float32, bits)  # type: ignore[arg-type]
    return full.truncated(rank)


@pytest.mark.parametrize(("rank", "bits"), [(4, 16), (7, 8), (7, 4), (16, 16)])
def test_bytes_are_those_that_encoding_makes(rank: int, bits: int) -> None:
    one = codec(rank, bits)
    for row in ledger(one, 2 * DIM, (1, 63, 64, 65, 300)):
        cache = {0: (torch.randn(1, 1, row.context, DIM), torch.randn(1, 1, row.context, DIM))}
        assert row.payload_nbytes == one.encode(cache, 0).nbytes
        assert row.sixteen_bit_nbytes == sum(x.half().nbytes for x in cache[0])
        assert row.basis_nbytes == one.nbytes
        assert row.ratio_with_basis < row.ratio


def test_the_basis_is_paid_back_where_it_says() -> None:
    for rank, bits in ((4, 16), (8, 8), (8, 4)):
        one = codec(rank, bits)
        tokens = paid_back_at(one, 2 * DIM)
        assert tokens is not None
        before, after = ledger(one, 2 * DIM, (max(1, tokens - 64), tokens + 64))
        assert before.ratio_with_basis < 1 <= after.ratio_with_basis
    assert paid_back_at(codec(16, 16), 2 * DIM) is None
