"""A fitted codec in one table: what it holds at several lengths, what it loses, and what is held once."""

from collections.abc import Sequence

from eigencache.codec.byte_ledger import CONTEXTS, ledger, paid_back_at
from eigencache.codec.eigen.codec import EigenCodec
from eigencache.codec.live.codec import LiveCodec
from eigencache.codec.saved.card import Expected
from eigencache.kernels.packed.format import BLOCK
from eigencache.report.core.table import Table


def codec_table(
    model: str, codec: EigenCodec, expected: Expected, values_per_token: int, warnings: Sequence[str] = ()
) -> Table:
    """Bytes of one sequence as the context grows; size and loss in the notes, with the tokens behind them."""
    notes = (
        _loss(expected),
        f"{codec.transform.coefficients:,} of {values_per_token:,} coefficients are coded, {codec.kept.sinks} sinks and a "
        f"window of {codec.kept.window} kept in {codec.kept.bits} bits. {_held_once(codec, values_per_token, expected)}",
    )
    return _table(model, codec, values_per_token, notes, warnings, expected.coded_bits)


def live_table(model: str, codec: LiveCodec, expected: Expected, values_per_token: int) -> Table:
    """The same of the codec of a live cache."""
    notes = (
        _loss(expected),
        f"{codec.bits_per_value:.3f} bits per packed value; {codec.sinks} sinks and up to {codec.window + BLOCK - 1} last "
        f"tokens in 16 bits. {_held_once(codec, values_per_token, expected)}",
    )
    return _table(model, codec, values_per_token, notes)


def _table(
    model: str,
    codec: EigenCodec | LiveCodec,
    values_per_token: int,
    notes: tuple[str, ...],
    warnings: Sequence[str] = (),
    coded_bits: float | None = None,
) -> Table:
    rows = tuple(
        (
            f"{row.context:,}",
            f"{row.sixteen_bit_nbytes:,}",
            f"{row.payload_nbytes:,}",
            f"{8 * row.payload_nbytes / (row.context * values_per_token):.3f}",
            f"{row.ratio:.1f}",
            f"{row.ratio_with_basis:.1f}",
        )
        for row in ledger(codec, values_per_token, CONTEXTS, coded_bits=coded_bits)
    )
    columns = ("Context", "16 bit", "Held", "Bits per value", "Ratio", "with what is held once")
    return Table(f"{model}: {codec.name}", columns, rows, notes=notes, warnings=tuple(warnings))


def _held_once(codec: EigenCodec | LiveCodec, values_per_token: int, expected: Expected) -> str:
    """What comes on top of every sequence's bytes, once, and how long one sequence must be to make up for it."""
    bits = expected.coded_bits if isinstance(codec, EigenCodec) else None
    tokens = paid_back_at(codec, values_per_token, coded_bits=bits)
    when = "none is long enough to make up for them" if tokens is None else f"one of {tokens:,} tokens makes up for them"
    return (
        f"{codec.nbytes:,} bytes are held once for all sequences, as many as {codec.nbytes / (2 * values_per_token):,.0f} "
        f"tokens in 16 bits; {when}."
    )


def _loss(expected: Expected) -> str:
    interval = expected.delta_nll_interval
    loss = f"{expected.delta_nll:+.4f} nats" + (f" [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else "")
    return (
        f"Loses {loss}, KL {expected.kl:.4f}, top-1 {100 * expected.top1_agreement:.1f} %, on {expected.tokens:,} tokens "
        "that nothing was fitted on, behind prefixes of half a sequence."
    )
