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
    seconds: float  # for the tokens after the first
    backend: str | None = None  # that read packed blocks; None for a plain cache

    @property
    def tokens_per_second(self) -> float | None:
        """Speed of the tokens after the first; None if there is only one."""
        return (len(self.tokens) - 1) / self.seconds if len(self.tokens) > 1 and self.seconds > 0 else None
