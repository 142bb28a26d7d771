"""Text generated from a cache, with its bytes and its time."""

from dataclasses import dataclass


@dataclass(frozen=True, eq=False)
class Generated:
    """`tokens` that followed a prompt, bytes of the cache in the end and of the same in 16 bits, and how long it took."""

    tokens: list[int]
    text: str
    prompt_tokens: int
    nbytes: int
    sixteen_bit_nbytes: int
    prompt_seconds: float
    seconds: float  # of the tokens after the first
    backend: str | None = None  # what read packed blocks

    @property
    def tokens_per_second(self) -> float | None:
        """Of the tokens after the first; None where there is one only."""
        return (len(self.tokens) - 1) / self.seconds if len(self.tokens) > 1 and self.seconds > 0 else None
