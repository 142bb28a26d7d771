"""The result of comparing the latent cache of an MLA model with a cache of expanded keys and values."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LatentComparison:
    """Bytes per token of both caches, and the difference of their logits."""

    latent_nbytes: int  # latent and rotary key, 16 bits
    expanded_nbytes: int  # keys and values of all heads, 16 bits
    tokens: int  # compared
    largest_difference: float  # absolute, of any logit
    largest_logit: float  # absolute
