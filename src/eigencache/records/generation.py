"""The result of generating text with one cache: tokens, bytes and times."""

from dataclasses import dataclass


@dataclass(frozen=True, eq=False)
class Generated:
    """Generated text, the size of its cache, and the time it took."""

    tokens: list[int]  # generated after the prompt
    text: str
    prompt_tokens: int
    nbytes: int  # of the cache at the end
    sixteen_bit_nbytes: int  # of the same tokens in 16 bits
    prompt_seconds: float  # until the first token
    step_seconds: float | None  # median over the tokens after the first; None if there is only one
    backend: str | None = None  # that read packed blocks; None for a plain cache
    side_nbytes: int = 0  # of the codec, stored once for all sequences

    @property
    def tokens_per_second(self) -> float | None:
        """Speed of a median step, in which a backend is not compiled; None if there is none."""
        return 1 / self.step_seconds if self.step_seconds else None
