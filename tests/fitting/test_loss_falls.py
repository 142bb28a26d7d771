"""More bits lose less: on every bundled model and on a pretrained one, at every doubling of the bits of `eigen`."""

import pytest

from eigencache.calibration.calibration_set import CalibrationSet
from eigencache.calibration.session import Session
from eigencache.corpora.resolve import read_text
from eigencache.corpora.sequences import pack
from eigencache.fitting.eigen import EigenSettings, fit_eigen
from eigencache.fitting.eigen_search import at_bits
from eigencache.fitting.heldout_score import score_held_out
from eigencache.models.load import LoadedModel
from real_models import smollm2
from stub_codecs import bundled

BITS, SEQUENCES = (1.0, 2.0, 4.0), 16


def divergences(loaded: LoadedModel, settings: EigenSettings, length: int) -> list[float]:
    """KL in nats at each number of bits per value, of sequences that nothing was fitted on."""
    text = pack(read_text("stdlib"), loaded.tokenizer, tokens=SEQUENCES * length, max_length=length)
    fit = fit_eigen(CalibrationSet(Session(loaded, batch_size=4), text), settings)
    codecs = {f"{bits:g}": at_bits(fit, bits, context=2048).codec for bits in BITS}
    return [quality.kl for quality in score_held_out(Session(loaded), fit.held_out, codecs).values()]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ref-gpt2", "ref-llama", "ref-deepseek"])
def test_of_a_bundled_model(name: str) -> None:
    one, two, four = divergences(bundled(name), EigenSettings(text=False), 256)
    assert two < one / 2 and four < two / 4 and four < 3e-4


@pytest.mark.slow
@pytest.mark.real
def test_of_a_pretrained_model() -> None:
    one, two, four = divergences(smollm2(), EigenSettings("layer", "frobenius", text=False, sinks=4, kept_bits=16), 64)
    assert two < one / 2 and four < two / 4 and four < 3e-3
