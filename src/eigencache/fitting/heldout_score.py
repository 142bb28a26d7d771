"""Score a fitted codec on held-out sequences."""

from collections.abc import Mapping
from typing import Any

from eigencache.calibration.session import Session
from eigencache.corpora.sequences import Sequences
from eigencache.evaluate.codec_scoring import score_codecs
from eigencache.records.fit import Expected
from eigencache.records.quality import Quality, ReadingProtocol

CONTEXT = 2048  # default context length, in tokens, at which a size is evaluated
DEFAULT_MAX_NLL = 0.01  # default loss budget, in nats per token


def expected_of(
    quality: Quality,
    context: int,
    bits_per_value: float,
    coded_bits: float,
    out_of_range: float,
    *,
    chosen_by_loss: bool,
) -> Expected:
    """Return the expected size and loss that are saved with a codec.

    Args:
        quality: scores of the codec on the held-out sequences.
        context: context length, in tokens, of `bits_per_value`.
        bits_per_value: size of all that is stored, sinks, window and headers included.
        coded_bits: mean bits of one coded token, of all layers together.
        out_of_range: share of the numbers that escape or saturate.
        chosen_by_loss: whether the size is the smallest within a loss on the held-out sequences.
    """
    return Expected(
        context=context,
        bits_per_value=bits_per_value,
        coded_bits=coded_bits,
        out_of_range=out_of_range,
        tokens=quality.tokens,
        delta_nll=quality.delta_nll,
        delta_nll_interval=quality.delta_nll_interval,
        kl=quality.kl,
        top1_agreement=quality.top1_agreement,
        chosen_by_loss=chosen_by_loss,
    )


def loss_of(quality: Quality) -> float:
    """Return the loss that a budget is compared with, in nats per token: ΔNLL or KL, whichever is larger.

    A few thousand tokens determine a ΔNLL of 0.01 nats poorly, and it can be negative although predictions change. The KL is
    determined by the same tokens several times better.

    Args:
        quality: scores of a codec on the held-out sequences.
    """
    return max(quality.delta_nll, quality.kl)


def score_held_out(session: Session, held_out: Sequences, codecs: Mapping[str, Any]) -> dict[str, Quality]:
    """Score codecs on held-out sequences: each codec compresses a prefix of half the length and predicts the rest.

    Args:
        session: the model and how it is run.
        held_out: sequences on which nothing was fitted.
        codecs: name → codec of a whole cache.

    Returns:
        The scores by the names of `codecs`.
    """
    protocol = ReadingProtocol(kind="prefix", length=max(8, held_out.corpus.max_length // 2))
    what = "scoring a codec" if len(codecs) == 1 else f"scoring {len(codecs)} codecs"
    scores = score_codecs(
        session.reporting(lambda _, done, of: session.on_progress(what, done, of)),
        held_out,
        {name: codec.to(session.loaded.device) for name, codec in codecs.items()},
        protocol,
        calibration=held_out.corpus,
    )
    return scores.quality
