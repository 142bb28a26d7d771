"""Score a fitted codec on held-out sequences."""

from collections.abc import Mapping
from typing import Any

from eigencache.calibration.session import Session
from eigencache.codec.saved.card import Expected
from eigencache.corpora.sequences import Sequences
from eigencache.evaluate.codec_scoring import score_codecs
from eigencache.records.quality import Quality, ReadingProtocol

CONTEXT = 2048  # tokens at which a size is meant


DEFAULT_MAX_NLL = 0.01  # nats


def expected_of(quality: Quality, context: int, bits_per_value: float, coded_bits: float) -> Expected:
    """The promise of a codec that was scored on sequences kept apart."""
    return Expected(
        context=context,
        bits_per_value=bits_per_value,
        coded_bits=coded_bits,
        tokens=quality.tokens,
        delta_nll=quality.delta_nll,
        delta_nll_interval=quality.delta_nll_interval,
        kl=quality.kl,
        top1_agreement=quality.top1_agreement,
    )


def score_held_out(session: Session, apart: Sequences, codecs: Mapping[str, Any]) -> dict[str, Quality]:
    """Codecs scored on sequences kept apart, behind prefixes of half their length."""
    protocol = ReadingProtocol(kind="prefix", length=max(8, apart.corpus.max_length // 2))
    scores = score_codecs(
        session.reporting(lambda _, done, of: session.on_progress(f"scoring {len(codecs)} codecs", done, of)),
        apart,
        {name: codec.to(session.loaded.device) for name, codec in codecs.items()},
        protocol,
        calibration=apart.corpus,
    )
    return scores.quality
