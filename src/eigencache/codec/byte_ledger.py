"""The byte ledger: what a codec holds as the context grows, and where its basis is paid back (THEORY 11)."""

import math
from bisect import bisect_left

from eigencache.codec.eigen.codec import EigenCodec
from eigencache.codec.live.codec import LiveCodec
from eigencache.codec.pca import PCACodec
from eigencache.errors import CodecError
from eigencache.records.quality import LedgerRow

CONTEXTS = (512, 2048, 8192, 32_768, 131_072)
_LONGEST = 2**22  # tokens that are looked at


def ledger(
    codec: PCACodec | EigenCodec | LiveCodec,
    values_per_token: int,
    contexts: tuple[int, ...] = CONTEXTS,
    *,
    coded_bits: float | None = None,
) -> list[LedgerRow]:
    """One row per context length of one sequence; bytes by arithmetic that a test holds against what `encode` makes.

    `coded_bits`: what a coded token of an `EigenCodec` is expected to cost; raises `CodecError` where it is needed and
    not given.
    """
    return [
        LedgerRow(
            context=context,
            sixteen_bit_nbytes=2 * values_per_token * context,
            payload_nbytes=_payload_nbytes(codec, context, values_per_token, coded_bits),
            basis_nbytes=codec.nbytes,
        )
        for context in contexts
    ]


def paid_back_at(
    codec: PCACodec | EigenCodec | LiveCodec, values_per_token: int, *, coded_bits: float | None = None
) -> int | None:
    """Return the tokens of one sequence from which payload and what is held once are less than 16 bits.

    None where 4 million tokens are too few. Blocks and scales come in groups of tokens: the figure is exact to one group.
    `coded_bits` as in `ledger`.
    """

    def pays(tokens: int) -> bool:
        (row,) = ledger(codec, values_per_token, (tokens,), coded_bits=coded_bits)
        return row.payload_nbytes + row.basis_nbytes < row.sixteen_bit_nbytes

    if not pays(_LONGEST):
        return None
    return bisect_left(range(_LONGEST), True, lo=1, key=pays)


def _payload_nbytes(
    codec: PCACodec | EigenCodec | LiveCodec, tokens: int, values_per_token: int, coded_bits: float | None
) -> int:
    if isinstance(codec, LiveCodec):
        return codec.nbytes_of(tokens)
    if isinstance(codec, PCACodec):
        return codec.payload_nbytes(tokens, values_per_token - sum(group.transform.width for group in codec.groups))
    if coded_bits is None:
        raise CodecError(f"{codec.name}: its bytes depend on the text: what a coded token is expected to cost is needed")
    return math.ceil(codec.nbytes_of(tokens, coded_bits))
