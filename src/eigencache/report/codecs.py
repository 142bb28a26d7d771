"""The table that `eigencache fit` prints: bytes of one sequence by context length, with size and loss in the notes."""

from eigencache.records.fit import Expected, FittedEigenRecord, FittedLiveRecord, FittedRecord
from eigencache.report.core.table import Table

_COLUMNS = ("Context", "16-bit bytes", "Bytes", "Bits per value", "Ratio", "Ratio with side information")


def codec_table(record: FittedEigenRecord) -> Table:
    """Return the bytes of one sequence by context length for a fitted `EigenCodec`."""
    kept = f"{record.sinks} sinks and a window of {record.window} tokens are stored in {record.kept_bits} bits."
    coded = f"{record.coded_coefficients:,} of {record.values_per_token:,} coefficients per token are coded; {kept}"
    shared = 8 * record.stored_once_nbytes / (record.amortize * record.values_per_token)
    amortized = f"Shared by {record.amortize:,} stored tokens, it adds {shared:.3f} bits per value."
    return _table(record, f"{coded} {_escaped(record.expected)}{_stored_once(record)} {amortized}")


def live_table(record: FittedLiveRecord) -> Table:
    """Return the bytes of one sequence by context length for a fitted `LiveCodec`."""
    kept = f"{record.sinks} sinks and at most {record.longest_window} most recent tokens are stored in 16 bits."
    packed = f"{record.packed_bits_per_value:.3f} bits per packed value; {kept}"
    return _table(record, f"{packed} {_saturated(record.expected)}{_stored_once(record)}")


def _escaped(expected: Expected) -> str:
    share = expected.out_of_range
    return (
        "" if share is None else f"{100 * share:.2g} % of the held-out integers exceed their table and cost 32 bits more. "
    )


def _saturated(expected: Expected) -> str:
    share = expected.out_of_range
    return "" if share is None else f"{100 * share:.2g} % of the packed coefficients saturate in the calibration set. "


def _table(record: FittedRecord, note: str) -> Table:
    rows = tuple(
        (
            f"{row.context:,}",
            f"{row.sixteen_bit_nbytes:,}",
            f"{row.payload_nbytes:,}",
            f"{8 * row.payload_nbytes / (row.context * record.values_per_token):.3f}",
            f"{row.ratio:.1f}",
            f"{row.ratio_with_basis:.1f}",
        )
        for row in record.ledger
    )
    title = f"{record.model}: {record.codec}"
    return Table(title, _COLUMNS, rows, notes=(_loss(record.expected), note), warnings=tuple(record.warnings))


def _stored_once(record: FittedRecord) -> str:
    """State the size of the side information and the context length from which it pays."""
    if record.break_even_context is None:
        pays = "no sequence is long enough to break even"
    else:
        pays = f"break-even context: {record.break_even_context:,} tokens"
    sixteen_bit_tokens = record.stored_once_nbytes / (2 * record.values_per_token)
    return (
        f"Side information: {record.stored_once_nbytes:,} bytes, stored once for all sequences "
        f"(the 16-bit cache of {sixteen_bit_tokens:,.0f} tokens); {pays}."
    )


def _loss(expected: Expected) -> str:
    interval = expected.delta_nll_interval
    loss = f"{expected.delta_nll:+.4f} nats" + (f" [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else "")
    return (
        f"ΔNLL {loss} per token, KL {expected.kl:.4f} nats, top-1 agreement {100 * expected.top1_agreement:.1f} %, on "
        f"{expected.tokens:,} held-out tokens{'' if interval else ', too few for an interval'}; the first half of every "
        "sequence is compressed."
    ) + (" The size was chosen on the same tokens, which biases the loss downwards." if expected.chosen_by_loss else "")
