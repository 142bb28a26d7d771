"""The record of a fitted codec agrees with the codec, and its break-even context is exact."""

from eigencache.calibration.session import Session
from eigencache.codec.byte_ledger import ledger
from eigencache.fitting.eigen import EigenSettings
from eigencache.fitting.fit import Goal, fit_codec
from eigencache.fitting.summary import eigen_record
from stub_codecs import random_sequences, tiny_loaded


def test_the_record_of_an_eigen_codec_has_its_sizes_and_its_break_even_context() -> None:
    settings = EigenSettings(metric="frobenius", text=False)
    fitted = fit_codec(Session(tiny_loaded("llama")), random_sequences(*[40] * 64), settings, Goal.of(bits=4))
    record = eigen_record("tiny", fitted.codec, fitted.expected, 192, 5_000, ["REPETITIVE"])
    assert (record.model, record.codec, record.expected) == ("tiny", fitted.codec.name, fitted.expected)
    assert record.stored_once_nbytes == fitted.codec.nbytes and record.warnings == ["REPETITIVE"]
    assert record.amortize == 5_000
    assert all(row.sixteen_bit_nbytes == row.context * 192 * 2 for row in record.ledger)
    paid = record.break_even_context
    assert paid
    before, after = ledger(fitted.codec, 192, (paid - 1, paid), coded_bits=fitted.expected.coded_bits)
    assert before.ratio_with_basis <= 1 < after.ratio_with_basis
