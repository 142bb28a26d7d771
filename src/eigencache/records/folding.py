"""Records of attention on coefficients."""

from dataclasses import dataclass


@dataclass(frozen=True)
class FoldingResult:
    """The largest differences of logits over a text for one codec."""

    codec: str
    tokens: int
    rounding: float  # folded against decode-then-attend
    effect: float  # decode-then-attend against the uncompressed model
    scale: float  # largest absolute logit
    coefficients_nbytes: int  # held by the folded cache after the last sequence
    vectors_nbytes: int  # what an ordinary cache held
    dtype: str  # of the model
