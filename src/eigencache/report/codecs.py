"""A fitted codec in one table: what it holds at several lengths, what it loses, and what is held once."""

from collections.abc import Sequence

from eigencache.codec.card import Expected
from eigencache.codec.eigen import EigenCodec
from eigencache.codec.ledger import CONTEXTS, ledger
from eigencache.report.table import Table


def codec_table(
    model: str, codec: EigenCodec, expected: Expected, values_per_token: int, warnings: Sequence[str] = ()
) -> Table:
    """Bytes of one sequence as the context grows; size and loss in the notes, with the tokens behind them."""
    rows = tuple(
        (
            f"{row.context:,}",
            f"{row.sixteen_bit_nbytes:,}",
            f"{row.payload_nbytes:,}",
            f"{8 * row.payload_nbytes / (row.context * values_per_token):.3f}",
            f"{row.ratio:.1f}",
            f"{row.ratio_with_basis:.1f}",
        )
        for row in ledger(codec, values_per_token, CONTEXTS, coded_bits=expected.coded_bits)
    )
    interval = expected.delta_nll_interval
    loss = f"{expected.delta_nll:+.4f} nats" + (f" [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else "")
    notes = (
        f"Loses {loss}, KL {expected.kl:.4f}, top-1 {100 * expected.top1_agreement:.1f} %, on {expected.tokens:,} tokens "
        "that nothing was fitted on, behind prefixes of half a sequence.",
        f"{codec.transform.coefficients:,} of {values_per_token:,} coefficients are coded, {codec.kept.sinks} sinks and a "
        f"window of {codec.kept.window} kept in {codec.kept.bits} bits; {codec.nbytes:,} bytes are held once for all "
        "sequences.",
    )
    columns = ("Context", "16 bit", "Held", "Bits per value", "Ratio", "with what is held once")
    return Table(f"{model}: {codec.name}", columns, rows, notes=notes, warnings=tuple(warnings))
