"""Records of an MLA latent against its expansion."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LatentComparison:
    """Bytes per token of both ways to cache, and how far their logits are apart."""

    latent_nbytes: int  # latent and rotary key, 16 bit
    expanded_nbytes: int  # keys and values of all heads, 16 bit
    tokens: int  # compared
    largest_difference: float  # of any logit
    largest_logit: float
