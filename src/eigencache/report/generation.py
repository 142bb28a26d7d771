"""The lines that `eigencache generate` prints below the text: bytes, speed, and the first difference to the plain cache."""

from collections.abc import Callable
from typing import Any

from eigencache.records.generation import Generated

_EXCERPT = 24  # tokens shown on either side of the first difference


def cost_line(generated: Generated, name: str) -> str:
    """Return one line with the bytes, the ratio and the speed of one cache.

    Args:
        generated: The generation to describe.
        name: What to call its cache.
    """
    speed = generated.tokens_per_second
    return (
        f"{name}: {generated.nbytes:,} bytes for {generated.prompt_tokens + len(generated.tokens) - 1:,} tokens, "
        f"ratio to 16 bits {generated.sixteen_bit_nbytes / generated.nbytes:.2f}"
        + (f"; side information {generated.side_nbytes:,} bytes, stored once" if generated.side_nbytes else "")
        + f"; prompt {generated.prompt_seconds:.2f} s"
        + (f", {speed:.1f} tokens per second (median)" if speed else "")
        + (f"; backend {generated.backend}" if generated.backend else "")
    )


def comparison_lines(
    compressed: Generated, plain: Generated, first_difference: int | None, dtype: str, decode: Callable[[list[int]], Any]
) -> list[str]:
    """Describe the plain cache, and where its text first differs from that of the compressed cache.

    Args:
        compressed: Generated from the compressed cache.
        plain: Generated from the plain cache.
        first_difference: Index of the first token that differs; None if the texts are equal.
        dtype: Dtype of the plain cache, such as `bfloat16`.
        decode: Turns token ids into text.
    """
    lines = [cost_line(plain, f"plain cache in {dtype}")]
    if first_difference is None:
        return [*lines, f"all {len(compressed.tokens)} tokens are equal"]

    def excerpt(generated: Generated) -> str:
        return repr(decode(generated.tokens[max(0, first_difference - _EXCERPT) : first_difference + _EXCERPT]))

    lines.append(f"the first {first_difference} tokens are equal, then the texts differ:")
    return [*lines, f"  compressed: {excerpt(compressed)}", f"  plain:      {excerpt(plain)}"]
