"""Records of a fitted codec: what was measured on held-out text, and the size of the compressed cache by context length."""

from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveInt

from eigencache.records.base import Record
from eigencache.records.quality import LedgerRow

_Finite = Annotated[float, Field(allow_inf_nan=False)]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Expected(Record):
    """Size and loss of a codec, measured at fitting on held-out sequences; stored in the card of the codec.

    `out_of_range` is, for `eigen`, the share of the integers beyond their entropy table, which cost 32 bits more. For a live
    codec it is the share of the packed coefficients beyond their bit width, which saturate, in the calibration set.
    """

    context: PositiveInt  # tokens; the context length of `bits_per_value`
    bits_per_value: _Positive  # all bytes of a sequence of `context` tokens
    coded_bits: _NonNegative  # bits per entropy-coded token, without the states of the lanes
    out_of_range: Annotated[float, Field(ge=0, le=1)] | None = None  # share of the numbers; None in codecs of before
    tokens: PositiveInt  # scored
    delta_nll: _Finite  # nats per token above the uncompressed cache
    delta_nll_interval: tuple[_Finite, _Finite] | None  # 95 %; None with fewer than 8 sequences
    kl: _Finite  # nats per token; rounding can make it negative
    top1_agreement: Annotated[float, Field(ge=0, le=1)]  # share of tokens
    chosen_by_loss: bool = False  # whether the size is the smallest within a loss on these tokens


class FittedRecord(Record):
    """What every fitted codec has: its measured loss, its bytes by context length, and its side information."""

    model: str
    codec: str
    expected: Expected
    values_per_token: PositiveInt  # numbers that the model caches for one token
    ledger: list[LedgerRow]  # by context length, ascending
    stored_once_nbytes: NonNegativeInt  # side information, shared by all sequences
    break_even_context: int | None  # tokens; None if no sequence is long enough
    sinks: NonNegativeInt  # first tokens that are not transformed
    warnings: list[str] = []


class FittedEigenRecord(FittedRecord):
    """A fitted `EigenCodec`."""

    coded_coefficients: NonNegativeInt  # per token, of all `values_per_token`
    amortize: PositiveInt  # stored tokens that share the side information
    window: NonNegativeInt  # most recent tokens that are not transformed
    kept_bits: PositiveInt  # bits per value of sinks and window


class FittedLiveRecord(FittedRecord):
    """A fitted `LiveCodec`."""

    packed_bits_per_value: float  # without sinks and window
    longest_window: NonNegativeInt  # most recent tokens in 16 bits, at most: the window and an incomplete block
