"""The result of comparing attention on coefficients with decoding before attention."""

from dataclasses import dataclass


@dataclass(frozen=True)
class FoldingResult:
    """Largest absolute differences of logits over a text for one codec, and the bytes of both caches."""

    codec: str
    tokens: int  # compared
    rounding: float  # folded attention vs decoding before attention: rounding errors only
    effect: float  # decoding before attention vs the uncompressed model: the effect of compression
    scale: float  # largest absolute logit
    coefficients_nbytes: int  # of the folded cache after the last sequence
    vectors_nbytes: int  # of the plain cache after the last sequence
    dtype: str  # of the model
