"""Summarize fitted codecs as records that a report can print."""

from collections.abc import Sequence
from typing import Any

from eigencache.codec.byte_ledger import CONTEXTS, ledger, paid_back_at
from eigencache.codec.eigen.codec import EigenCodec
from eigencache.codec.live.codec import LiveCodec
from eigencache.kernels.packed.format import BLOCK
from eigencache.records.fit import Expected, FittedEigenRecord, FittedLiveRecord


def eigen_record(
    model: str, codec: EigenCodec, expected: Expected, values_per_token: int, amortize: int, warnings: Sequence[str] = ()
) -> FittedEigenRecord:
    """Summarize a fitted `EigenCodec`.

    Args:
        model: Name of the model whose cache the codec serves.
        codec: The fitted codec.
        expected: Size and loss on the held-out sequences.
        values_per_token: Numbers that the model caches for one token.
        amortize: Stored tokens that share the side information.
        warnings: Warnings about the calibration text.
    """
    return FittedEigenRecord(
        **_common(model, codec, expected, values_per_token, expected.coded_bits),
        sinks=codec.kept.sinks,
        warnings=list(warnings),
        coded_coefficients=codec.transform.coefficients,
        amortize=amortize,
        window=codec.kept.window,
        kept_bits=codec.kept.bits,
    )


def live_record(model: str, codec: LiveCodec, expected: Expected, values_per_token: int) -> FittedLiveRecord:
    """Summarize a fitted `LiveCodec`; the arguments are those of `eigen_record`."""
    return FittedLiveRecord(
        **_common(model, codec, expected, values_per_token, None),
        sinks=codec.sinks,
        packed_bits_per_value=codec.bits_per_value,
        longest_window=codec.window + BLOCK - 1,
    )


def _common(
    model: str, codec: EigenCodec | LiveCodec, expected: Expected, values_per_token: int, coded_bits: float | None
) -> dict[str, Any]:
    """Return the fields of `FittedRecord`, apart from `sinks` and `warnings`."""
    return {
        "model": model,
        "codec": codec.name,
        "expected": expected,
        "values_per_token": values_per_token,
        "ledger": ledger(codec, values_per_token, CONTEXTS, coded_bits=coded_bits),
        "stored_once_nbytes": codec.nbytes,
        "break_even_context": paid_back_at(codec, values_per_token, coded_bits=coded_bits),
    }
