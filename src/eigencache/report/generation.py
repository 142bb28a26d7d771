"""What a generation took, in lines under its text."""

from eigencache.models.load import LoadedModel
from eigencache.records.generation import Generated

_AROUND = 24  # tokens shown on either side of where two answers part


def cost_line(found: Generated, what: str) -> str:
    """Bytes, ratio and speed of one cache."""
    speed = found.tokens_per_second
    return (
        f"{what}: {found.nbytes:,} bytes for {found.prompt_tokens + len(found.tokens) - 1:,} tokens, "
        f"{found.sixteen_bit_nbytes / found.nbytes:.2f} x smaller than 16 bits; prompt {found.prompt_seconds:.2f} s"
        + (f", {speed:.1f} tokens per second" if speed else "")
        + (f"; blocks read by {found.backend}" if found.backend else "")
    )


def comparison_lines(loaded: LoadedModel, found: Generated, plain: Generated, parted: int | None) -> list[str]:
    """The plain cache beside the compressed one, and where their answers part."""
    lines = [cost_line(plain, f"plain cache in {str(loaded.model.dtype).removeprefix('torch.')}")]
    if parted is None:
        return [*lines, f"all {len(found.tokens)} tokens are the same"]
    decode = loaded.tokenizer.decode
    around = lambda one: repr(decode(one.tokens[max(0, parted - _AROUND) : parted + _AROUND]))  # noqa: E731 - of both
    lines.append(f"the same for {parted} tokens, then they part:")
    return [*lines, f"  compressed: {around(found)}", f"  plain:      {around(plain)}"]
