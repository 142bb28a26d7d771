"""The table of a fitted codec prints its record: bytes by context length, loss, and side information."""

from typing import Any

import pytest

from eigencache.records.fit import Expected, FittedEigenRecord, FittedLiveRecord
from eigencache.records.quality import LedgerRow
from eigencache.report.codecs import codec_table, live_table

EXPECTED = Expected(
    context=2048,
    bits_per_value=1.5,
    coded_bits=200.0,
    tokens=4096,
    delta_nll=0.0123,
    delta_nll_interval=(0.01, 0.015),
    kl=0.02,
    top1_agreement=0.985,
)
ROWS = [
    LedgerRow(context=512, sixteen_bit_nbytes=196_608, payload_nbytes=19_660, basis_nbytes=38_400),
    LedgerRow(context=2048, sixteen_bit_nbytes=786_432, payload_nbytes=73_728, basis_nbytes=38_400),
]
COMMON: dict[str, Any] = {
    "model": "tiny",
    "codec": "a codec",
    "expected": EXPECTED,
    "values_per_token": 192,
    "ledger": ROWS,
    "stored_once_nbytes": 38_400,
    "sinks": 4,
}
EIGEN = FittedEigenRecord(
    **COMMON, break_even_context=120, warnings=["REPETITIVE"], coded_coefficients=60, amortize=32_000, window=16, kept_bits=8
)
LIVE = FittedLiveRecord(**COMMON, break_even_context=None, packed_bits_per_value=3.125, longest_window=191)


def test_a_row_has_the_bytes_and_ratios_of_one_context_length() -> None:
    table = codec_table(EIGEN)
    assert table.title == "tiny: a codec" and table.warnings == ("REPETITIVE",)
    assert table.rows == (
        ("512", "196,608", "19,660", "1.600", "10.0", "3.4"),
        ("2,048", "786,432", "73,728", "1.500", "10.7", "7.0"),
    )


def test_the_notes_state_the_loss_what_is_coded_and_the_side_information() -> None:
    loss, stored = codec_table(EIGEN).notes
    assert "ΔNLL +0.0123 nats [0.0100, 0.0150] per token" in loss and "98.5 %, on 4,096 held-out tokens" in loss
    assert stored.startswith("60 of 192 coefficients per token are coded; 4 sinks and a window of 16 tokens")
    assert "Side information: 38,400 bytes" in stored and "16-bit cache of 100 tokens" in stored
    assert "break-even context: 120 tokens." in stored
    assert stored.endswith("Shared by 32,000 stored tokens, it adds 0.050 bits per value.")


def test_what_escapes_or_saturates_is_stated_where_it_was_counted() -> None:
    expected = EXPECTED.model_copy(update={"out_of_range": 0.00123})
    escaped = codec_table(EIGEN.model_copy(update={"expected": expected})).notes[1]
    assert "0.12 % of the held-out integers exceed their table and cost 32 bits more." in escaped
    saturated = live_table(LIVE.model_copy(update={"expected": expected})).notes[1]
    assert "0.12 % of the packed coefficients saturate in the calibration set." in saturated
    assert not any("%" in table.notes[1] for table in (codec_table(EIGEN), live_table(LIVE)))


def test_without_an_interval_or_a_break_even_context_none_is_stated() -> None:
    expected = EXPECTED.model_copy(update={"delta_nll_interval": None})
    loss, stored = live_table(LIVE.model_copy(update={"expected": expected})).notes
    assert "+0.0123 nats per token" in loss
    assert stored.startswith("3.125 bits per packed value; 4 sinks and at most 191 most recent tokens")
    assert stored.endswith("no sequence is long enough to break even.")


def test_a_loss_that_chose_the_size_is_said_to_be_biased() -> None:
    chosen = EXPECTED.model_copy(update={"chosen_by_loss": True})
    said = "The size was chosen on the same tokens, which biases the loss downwards."
    assert live_table(LIVE.model_copy(update={"expected": chosen})).notes[0].endswith(said)
    assert said not in live_table(LIVE).notes[0]


@pytest.mark.parametrize("record", [EIGEN, LIVE])
def test_a_record_survives_json(record) -> None:
    assert type(record).model_validate_json(record.model_dump_json()) == record
