"""The byte ledger: what a codec holds as the context grows, and where its basis is paid back (THEORY 11)."""

import math

from eigencache.codec.eigen import EigenCodec
from eigencache.codec.live import LiveCodec
from eigencache.codec.pca import PCACodec
from eigencache.errors import CodecError
from eigencache.quality import LedgerRow

CONTEXTS = (512, 2048, 8192, 32_768, 131_072)


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


def paid_back_at(codec: PCACodec, values_per_token: int) -> int | None:
    """Tokens from which payload and basis together are less than 16 bits; None where nothing is saved per token.

    Scales come in groups of tokens, so a step of one group is looked at: the figure is exact to 64 tokens.
    """
    first, far = ledger(codec, values_per_token, (64, 64 * 1024))
    saved = (far.sixteen_bit_nbytes - far.payload_nbytes) / far.context
    if saved <= 0 or first.sixteen_bit_nbytes <= first.payload_nbytes:
        return None
    return int(-(-codec.nbytes // saved))


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
