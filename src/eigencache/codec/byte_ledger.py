"""The byte ledger: bytes of a codec as the context grows, and the context at which its basis is paid back (THEORY 11)."""

from bisect import bisect_left

from eigencache.codec.saved.registry import AnyCodec, kind_of
from eigencache.records.quality import LedgerRow

CONTEXTS = (512, 2048, 8192, 32_768, 131_072)
_LONGEST = 2**22  # longest context that `paid_back_at` tries, in tokens


def ledger(
    codec: AnyCodec,
    values_per_token: int,
    contexts: tuple[int, ...] = CONTEXTS,
    *,
    coded_bits: float | None = None,
) -> list[LedgerRow]:
    """Compute the bytes of one sequence at several context lengths, without encoding.

    Args:
        codec: A codec of a kind that can be saved.
        values_per_token: Numbers that the model caches per token.
        contexts: Context lengths in tokens.
        coded_bits: Expected bits of a coded token; required for an `EigenCodec`, whose bytes depend on the text.

    Returns:
        One row per context length.

    Raises:
        CodecError: `coded_bits` is required.
    """
    kind = kind_of(codec)
    return [
        LedgerRow(
            context=context,
            sixteen_bit_nbytes=2 * values_per_token * context,
            payload_nbytes=kind.payload_nbytes(codec, context, values_per_token, coded_bits),
            basis_nbytes=codec.nbytes,
        )
        for context in contexts
    ]


def paid_back_at(codec: AnyCodec, values_per_token: int, *, coded_bits: float | None = None) -> int | None:
    """Return the break-even context: the shortest at which payload and basis take fewer bytes than a 16-bit cache.

    Args:
        codec: A codec of a kind that can be saved.
        values_per_token: Numbers that the model caches per token.
        coded_bits: Expected bits of a coded token, as for `ledger`.

    Returns:
        Tokens of one sequence, exact to one block or group of tokens; None where 4 million are not enough.
    """

    def pays(tokens: int) -> bool:
        (row,) = ledger(codec, values_per_token, (tokens,), coded_bits=coded_bits)
        return row.payload_nbytes + row.basis_nbytes < row.sixteen_bit_nbytes

    if not pays(_LONGEST):
        return None
    return bisect_left(range(_LONGEST), True, lo=1, key=pays)
